"""What the network does is waited out; the user's mistakes are not."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError

from speech_finetuning.base.errors import RunEnded, UserError, one_line

logger = logging.getLogger(__name__)


def is_network_error(error: BaseException) -> bool:
    """Whether waiting may help: everything that the network or a server does but 401, 403 and 404."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    statuses = [
        e.response.status_code
        for e in chain
        if isinstance(e, HfHubHTTPError) and e.response is not None
    ]
    if HF_HUB_OFFLINE or any(status in (401, 403, 404) for status in statuses):
        return False
    clients = (
        "httpx",
        "httpcore",
        "requests",
        "urllib3",
        "aiohttp",
        "socket",
    )  # the last one: gaierror
    kinds = (ConnectionError, TimeoutError)
    return bool(statuses) or any(
        isinstance(e, kinds) or type(e).__module__.startswith(clients) for e in chain
    )


@contextlib.contextmanager
def as_user_error(*kinds: type[Exception], where: str, advice: str = "") -> Iterator[None]:
    """Raises: UserError that says where, in place of errors of these kinds; what the network did stays as it is."""
    try:
        yield
    except kinds as error:
        if is_network_error(error):
            raise
        raise UserError(f"{where}: {one_line(error)[:600]}{advice}") from error


@dataclass
class Backoff:
    """Waits out network errors: 1, 2, 4 ... 60 s between tries, up to a limit that starts anew after each success."""

    limit_in_seconds: float
    pause_in_seconds: float = 1.0
    began: float | None = None

    def wait(self, error: Exception, task: str) -> None:
        """Sleeps. Raises: the error if waiting cannot help, RunEnded(75) if it has lasted too long."""
        if not is_network_error(error):
            if isinstance(error, HfHubHTTPError):
                raise UserError(
                    f"{task}: {one_line(error)} Check the name, and HF_TOKEN, and start again."
                ) from error
            raise error
        now = time.monotonic()
        self.began = self.began or now
        left = self.began + self.limit_in_seconds - now
        if left <= 0:
            minutes = self.limit_in_seconds / 60
            raise RunEnded(
                75, f"{task}: no network for {minutes:g} minutes ({one_line(error)[:300]})"
            ) from error
        pause = min(self.pause_in_seconds, left)
        logger.warning("%s: %s Trying again in %.0f s.", task, one_line(error)[:300], pause)
        time.sleep(pause)
        self.pause_in_seconds = min(2 * self.pause_in_seconds, 60.0)

    def reset(self) -> None:
        self.pause_in_seconds, self.began = 1.0, None


def retry_on_network_error(
    function: Callable[..., Any], *args: Any, limit_in_seconds: float, task: str
) -> Any:
    """function(*args), again after network errors. Raises: its other errors, RunEnded(75) past the limit."""
    patience = Backoff(limit_in_seconds)
    while True:
        try:
            return function(*args)
        except Exception as error:
            patience.wait(error, task)
