"""Network failures are waited out; the user's mistakes are not."""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

# Has no public name in huggingface_hub 2.4.
from huggingface_hub.utils._http import default_client_factory

from speech_finetuning.base.errors import ExitCode, RunEnded, UserError, one_line
from speech_finetuning.base.responses import check_response, forget_long_waits

logger = logging.getLogger(__name__)

PERMANENT_STATUSES = (401, 403, 404)  # waiting does not help
# Packages whose errors come from the network. `socket` stands for gaierror: no such host.
NETWORK_PACKAGES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "socket")
# Their errors about an address that no server will ever be asked for.
ERRORS_OF_ADDRESSES = ("InvalidURL", "UnsupportedProtocol", "InvalidSchema", "MissingSchema")
LONGEST_PAUSE_IN_SECONDS = 60.0
LONGEST_SILENCE_IN_SECONDS = 30.0  # of a server, before it counts as gone
SHORTEST_SILENCE_IN_SECONDS = 2.0
PROBE_IN_SECONDS = 10.0
OFFLINE = "HF_HUB_OFFLINE is set, so that nothing is fetched: unset it, or pass a folder."


class WrongBody(ConnectionError):
    """What came over the network is not what was announced: less, more, or something else."""


class WebPage(WrongBody):
    """A page of HTML came in place of a file, with a status that says that all is well."""


def check_body_size(data: bytes, announced_size: int, address: str) -> None:
    """Raises: WrongBody, which is waited out as any other network error."""
    if len(data) != announced_size:
        found = f"{len(data)} bytes came, {announced_size} were announced"
        raise WrongBody(f"{address}: {found}")


def with_causes(error: BaseException) -> list[BaseException]:
    """The error, its cause (or what was being handled when it was raised), the cause of that ..."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def ending_within(error: BaseException) -> RunEnded | None:
    """The end of the run, by a signal, say, that a library took for an error of its own work:
    transformers (5.24) says that a configuration cannot be loaded, whatever was raised meanwhile."""
    return next((cause for cause in with_causes(error) if isinstance(cause, RunEnded)), None)


def http_statuses(errors: list[BaseException]) -> list[int]:
    """Of those errors that are a server's answer, to whichever client."""
    statuses = []
    for error in errors:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if type(error).__module__.startswith("aiohttp"):
            status = getattr(error, "status", None)
        if isinstance(status, int) and status > 0:
            statuses.append(status)
    return statuses


def is_network_error(error: BaseException) -> bool:
    """Whether waiting may help: for all that the network or a server does except 401, 403, 404.

    That includes bodies which are not what was announced. What we have raised ourselves is final,
    whatever caused it.
    """
    return not HF_HUB_OFFLINE and comes_from_network(error)


def comes_from_network(error: BaseException) -> bool:
    """As `is_network_error`, and also if nothing may be fetched."""
    if isinstance(error, UserError | RunEnded):
        return False
    errors = with_causes(error)
    statuses = http_statuses(errors)
    if statuses:
        return not any(status in PERMANENT_STATUSES for status in statuses)
    if any(type(error).__name__ in ERRORS_OF_ADDRESSES for error in errors):
        return False
    return any(
        isinstance(error, ConnectionError | TimeoutError)
        or type(error).__module__.startswith(NETWORK_PACKAGES)
        or is_wrong_body(error)
        for error in errors
    )


def is_not_there_offline(error: BaseException) -> bool:
    """Whether something is not on this disk, and was not to be fetched."""
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled)
    return any(isinstance(cause, kinds) for cause in with_causes(error))


def is_wrong_body(error: BaseException) -> bool:
    """Whether a library met a body that is not what was announced, such as HTML in place of
    JSON."""
    if isinstance(error, OSError):
        # huggingface_hub 2.4, file_download.py:443: a plain OSError when a file has another size.
        return str(error).startswith("Consistency check failed")
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return came_through(error, NETWORK_PACKAGES)
    return False


def came_through(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether a function of these packages was running: response.json(), not a file that is
    read."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__", "").startswith(packages):
            return True
        traceback = traceback.tb_next
    return False


def is_hub_reachable() -> bool:
    """Whether the Hub can be reached now, whatever it says."""
    try:
        huggingface_hub.get_session().head(ENDPOINT, timeout=PROBE_IN_SECONDS)
    except Exception:  # the network's errors, HF_HUB_OFFLINE, a proxy that is set up wrongly ...
        return False
    return True


def limit_silence(limit_in_seconds: float) -> None:
    """Has every request to the Hub fail, as a network error, when the server says nothing for long.

    By itself huggingface_hub (2.4, utils/_http.py) waits for ever for most answers; what has a
    shorter time-out keeps it. It asks six times, with 23 s of pauses, before we hear of it, which
    no public setting changes: with 30 s of silence each, a failure lasts up to 3.5 minutes before
    the limit begins to count. limit_in_seconds: for how long a lost network is waited for in all.
    """
    silence_in_seconds = min(
        LONGEST_SILENCE_IN_SECONDS, max(SHORTEST_SILENCE_IN_SECONDS, limit_in_seconds)
    )
    make_client = functools.partial(make_impatient_client, silence_in_seconds)
    huggingface_hub.set_client_factory(make_client)


def make_impatient_client(silence_in_seconds: float) -> Any:
    """The library's HTTP client; its requests have time-outs, and its answers are looked at."""
    client = default_client_factory()
    hook = functools.partial(set_missing_timeouts, silence_in_seconds)
    client.event_hooks["request"].append(hook)
    client.event_hooks["response"] += [check_response, forget_long_waits]
    return client


def set_missing_timeouts(silence_in_seconds: float, request: Any) -> None:
    """Not by the client's own setting, as many calls of the library ask for None by themselves."""
    asked = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        # The library itself waits 60 seconds, six times, for a file's metadata (file_download.py).
        phase: min(asked.get(phase) or silence_in_seconds, silence_in_seconds)
        for phase in ("connect", "read", "write", "pool")
    }


@contextlib.contextmanager
def as_user_error(*kinds: type[Exception], where: str, advice: str = "") -> Iterator[None]:
    """Turns errors of these kinds into a UserError that says where; network errors stay.

    where: what was being read, for example a flag with its value; advice: follows the message.
    Raises: UserError, network errors.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or is_network_error(error):
            raise
        # A KeyError's own text is the key alone.
        kind = "KeyError: " if isinstance(error, KeyError) else ""
        if HF_HUB_OFFLINE and is_not_there_offline(error):
            advice = f" {OFFLINE}{advice}"
        raise UserError(f"{where}: {kind}{one_line(error)[:600]}{advice}") from error


@dataclass
class Backoff:
    """Waits out network errors: 1, 2, 4 ... 60 s between tries, up to a limit.

    The limit is of time without success; every success starts it again (`reset`). One answer 403 is
    waited out, too: the Hub's files lie on other servers, under addresses that expire, and the next
    try asks for a new one.
    """

    limit_in_seconds: float
    pause_in_seconds: float = field(default=1.0, init=False)
    began: float | None = field(default=None, init=False)  # time.monotonic() of the first error
    num_errors: int = field(default=0, init=False)  # since the last success
    told: str | None = field(default=None, init=False)  # the last reason

    def wait(self, error: Exception, task: str) -> None:
        """Sleeps before the next try. task: what failed, for the log, as in "reading audio".

        Raises: the error (or a UserError from the Hub's answer) if waiting cannot help;
        RunEnded(75) if the errors have lasted longer than the limit.
        """
        if ending := ending_within(error):
            raise ending from None
        self.num_errors += 1
        if HF_HUB_OFFLINE and comes_from_network(error):
            raise UserError(f"{task}: {one_line(error)} {OFFLINE}") from error
        if not is_network_error(error) and not self.may_have_expired(error):
            if isinstance(error, HfHubHTTPError):
                advice = "Check the name, and HF_TOKEN, and start again."
                raise UserError(f"{task}: {one_line(error)} {advice}") from error
            raise error
        now = time.monotonic()
        if self.began is None:
            self.began = now
        left_in_seconds = self.began + self.limit_in_seconds - now
        reason = one_line(error)[:300]
        if left_in_seconds <= 0:
            minutes = self.limit_in_seconds / 60
            ending = (
                f"{task}: no network for {minutes:g} minutes ({reason.rstrip('.')}). When it is back, "
                "start the same command again."
            )
            raise RunEnded(ExitCode.TRY_AGAIN, ending) from error
        pause_in_seconds = min(self.pause_in_seconds, left_in_seconds)
        if reason == self.told:  # a long wait is a line a minute, not a paragraph
            logger.warning("%s: the same. Trying again in %.0f s.", task, pause_in_seconds)
        else:
            logger.warning(
                "%s: %s Trying again in %.0f s, for up to %.3g minutes (Ctrl-C ends it).",
                task,
                reason,
                pause_in_seconds,
                self.limit_in_seconds / 60,
            )
        self.told = reason
        time.sleep(pause_in_seconds)
        self.pause_in_seconds = min(2 * self.pause_in_seconds, LONGEST_PAUSE_IN_SECONDS)

    def reset(self) -> None:
        """After a success: the next error begins a new wait."""
        self.pause_in_seconds = 1.0
        self.began = None
        self.num_errors = 0
        self.told = None

    def may_have_expired(self, error: Exception) -> bool:
        """Whether this is the first answer 403."""
        is_first = self.num_errors == 1 and not HF_HUB_OFFLINE
        return is_first and 403 in http_statuses(with_causes(error))


def retry_on_network_error(
    function: Callable[..., Any], *args: Any, limit_in_seconds: float, task: str
) -> Any:
    """function(*args), called again after network errors.

    Raises: its other errors; UserError and RunEnded(75) as `Backoff.wait`.
    """
    backoff = Backoff(limit_in_seconds)
    while True:
        try:
            return function(*args)
        except Exception as error:
            backoff.wait(error, task)
