"""is_network_error, Backoff: what is waited out, and for how long."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from speech_finetuning.base import network
from speech_finetuning.base.errors import RunEnded, UserError
from speech_finetuning.base.network import (
    Backoff,
    WrongBody,
    check_body_size,
    http_statuses,
    is_network_error,
    retry_on_network_error,
    with_causes,
)
from speech_finetuning.base.responses import forget_long_waits


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "HF_HUB_OFFLINE", False)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be slept, in place of sleeping."""
    seconds: list[float] = []
    monkeypatch.setattr(network.time, "sleep", seconds.append)
    return seconds


def answer(status: int, body: bytes = b"", **headers: str) -> httpx2.Response:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/x")
    return httpx2.Response(status, content=body, headers=headers, request=request)


def hub_error(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"status {status}", response=answer(status))


def raised(function: Callable, *arguments: object) -> Exception:
    """The error of a call, with its traceback."""
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_page_in_place_of_json_is_a_network_error():
    page = answer(200, b"<!DOCTYPE html><html>maintenance</html>")
    error = raised(page.json)
    assert isinstance(error, json.JSONDecodeError)
    assert is_network_error(error)
    bytes_of_something_else = answer(200, b"\xff\xfe\x00\x81")
    assert is_network_error(raised(bytes_of_something_else.json))


def test_broken_json_of_a_file_is_not(tmp_path: Path):
    (tmp_path / "config.json").write_text("<html>")
    error = raised(lambda: json.loads((tmp_path / "config.json").read_text()))
    assert not is_network_error(error)
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    assert not is_network_error(raised((tmp_path / "latin.txt").read_text, "utf-8"))


@pytest.mark.parametrize("size", [0, 99, 101])
def test_another_size_than_was_announced_is_a_network_error(size: int):
    check_body_size(bytes(100), 100, "https://x")
    error = raised(check_body_size, bytes(size), 100, "https://x/a.flac")
    assert isinstance(error, WrongBody) and is_network_error(error)
    assert str(error) == f"https://x/a.flac: {size} bytes came, 100 were announced"


def test_a_download_of_another_size_is_a_network_error():
    message = "Consistency check failed: file should be of size 10 but has size 7 (x)."
    assert is_network_error(OSError(message))
    assert not is_network_error(OSError("Corrupt snappy compressed data."))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_of_any_client_are_not_waited_out(status: int):
    assert not is_network_error(hub_error(status))
    assert not is_network_error(raised(answer(status).raise_for_status))
    import aiohttp

    request = aiohttp.RequestInfo("https://x", "GET", {}, "https://x")
    refused = aiohttp.ClientResponseError(request, (), status=status)
    wrapped = FileNotFoundError("https://x")
    wrapped.__cause__ = refused
    assert http_statuses(with_causes(wrapped)) == [status]
    assert not is_network_error(wrapped)
    refused.status = 503
    assert is_network_error(wrapped)


def test_an_address_that_is_none_is_not_waited_for():
    for address in ("foo://x", "", "https://x:port"):
        assert not is_network_error(raised(httpx2.get, address))


def test_nothing_is_waited_out_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network, "HF_HUB_OFFLINE", True)
    assert not is_network_error(WrongBody("short"))
    assert not is_network_error(hub_error(503))


def test_what_cannot_be_fetched_offline_is_one_line(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float]
):
    monkeypatch.setattr(network, "HF_HUB_OFFLINE", True)
    error = ConnectionError("Couldn't reach 'alice/speech' on the Hub (OfflineModeIsEnabled)")
    with pytest.raises(UserError) as raised:
        retry(Answers(error))
    assert str(raised.value) == (
        "reading: Couldn't reach 'alice/speech' on the Hub (OfflineModeIsEnabled). HF_HUB_OFFLINE is "
        "set, so that nothing is fetched: unset it, or pass a folder."
    )
    assert pauses == []


class Answers:
    """Raises the given errors one after the other, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def retry(function: Answers) -> str:
    return retry_on_network_error(function, limit_in_seconds=600, task="reading")


def test_a_403_is_asked_for_anew_once(pauses: list[float]):
    function = Answers(hub_error(403))
    assert retry(function) == "done"
    assert function.num_calls == 2 and pauses == [1.0]
    refused = Answers(hub_error(403), hub_error(403), hub_error(403))
    with pytest.raises(UserError, match="HF_TOKEN"):
        retry(refused)
    assert refused.num_calls == 2


def test_each_address_may_expire_once(pauses: list[float]):
    """The next success forgives: hours later another signed address may expire."""
    backoff = Backoff(600)
    for _ in range(3):
        backoff.wait(hub_error(403), "reading")
        backoff.reset()
    assert pauses == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("status", [401, 404])
def test_other_refusals_are_final_at_once(status: int, pauses: list[float]):
    function = Answers(hub_error(status))
    with pytest.raises(UserError):
        retry(function)
    assert function.num_calls == 1 and pauses == []


def test_short_bodies_are_waited_out(pauses: list[float]):
    function = Answers(WrongBody("7 of 10"), WrongBody("7 of 10"), WrongBody("7 of 10"))
    assert retry(function) == "done"
    assert pauses == [1.0, 2.0, 4.0]


def test_a_long_wait_tells_its_reason_once(pauses: list[float], caplog: pytest.LogCaptureFixture):
    same = [ConnectionResetError("reset by peer"), ConnectionResetError("reset by peer")]
    assert retry(Answers(*same, WrongBody("7 of 10"))) == "done"
    assert [record.getMessage() for record in caplog.records] == [
        "reading: reset by peer. Trying again in 1 s, for up to 10 minutes (Ctrl-C ends it).",
        "reading: the same. Trying again in 2 s.",
        "reading: 7 of 10. Trying again in 4 s, for up to 10 minutes (Ctrl-C ends it).",
    ]
    assert len(pauses) == 3


def test_a_signal_within_a_network_error_ends_the_wait(pauses: list[float]):
    lost = ConnectionResetError("reset by peer")
    lost.__context__ = RunEnded(130, "ended by SIGINT")
    with pytest.raises(RunEnded, match="SIGINT"):
        retry(Answers(lost))
    assert pauses == []


def test_waiting_ends_with_75(monkeypatch: pytest.MonkeyPatch):
    clock = [1000.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(network.time, "sleep", sleep)
    monkeypatch.setattr(network.time, "monotonic", lambda: clock[0])
    with pytest.raises(RunEnded, match="no network for 10 minutes") as caught:
        retry(Answers(*[ConnectionResetError()] * 100))
    assert caught.value.code == 75
    assert clock[0] == pytest.approx(1600.0)


def test_a_first_error_at_the_clocks_zero_counts(monkeypatch: pytest.MonkeyPatch):
    """time.monotonic() begins anywhere, also at 0 (a container just started)."""
    clock = [0.0]
    monkeypatch.setattr(network.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)
    backoff = Backoff(10)
    backoff.wait(ConnectionResetError(), "reading")
    clock[0] = 11.0
    with pytest.raises(RunEnded):
        backoff.wait(ConnectionResetError(), "reading")


def test_the_real_pauses_are_slept():
    began = time.monotonic()
    assert retry(Answers(ConnectionResetError())) == "done"
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize(
    ("headers", "is_kept"),
    [
        ({"Retry-After": "60"}, True),
        ({"RateLimit": '"api";r=0;t=55'}, True),
        ({"Retry-After": "3600"}, False),
        ({"Retry-After": "Fri, 31 Dec 2066 23:59:59 GMT"}, False),
        ({"RateLimit": '"api";r=0;t=300', "Retry-After": "1"}, False),
    ],
)
def test_a_long_wait_that_a_server_asks_for_is_left_to_the_limit(
    headers: dict[str, str], is_kept: bool
):
    """The library would sleep for it in silence, beyond --max_network_wait_in_minutes."""
    response = answer(429, **headers)
    forget_long_waits(response)
    assert {"retry-after", "ratelimit"} & set(response.headers) == (
        {name.lower() for name in headers} if is_kept else set()
    )


def test_the_hub_s_client_looks_at_every_answer():
    client = network.make_impatient_client(5.0)
    assert forget_long_waits in client.event_hooks["response"]
