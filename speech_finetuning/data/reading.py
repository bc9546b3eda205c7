"""The encoded bytes of a row's audio: from its cell, a local file or an address."""

import os
import stat
import unicodedata
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import fsspec

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.network import (
    LONGEST_SILENCE_IN_SECONDS,
    Backoff,
    WebPage,
    check_body_size,
    http_statuses,
    is_hub_reachable,
    is_network_error,
    with_causes,
)
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.signatures import is_web_page

MAX_FILE_IN_BYTES = 2**30  # nine hours of 16-bit samples at 16 kHz
CHUNK_IN_BYTES = 2**20
TRIES_OF_AN_ADDRESS = 5  # half a minute
LOCAL_PROTOCOLS = ("file://", "local://")
REFUSALS = (401, 403)
WORTH_WAITING_FOR = (408, 425, 429)  # of the statuses that blame the client


def read_audio(value: str | dict[str, Any] | None) -> bytes:
    """The encoded bytes of an undecoded audio cell, at most MAX_FILE_IN_BYTES from outside it.

    value: a path (local, hf:// or any fsspec address), or {"bytes": ..., "path": ...}.
    Raises: Rejection if there are none, or for whatever the file system says of this row; errors of
    the network, and a server's refusals (401, 403), which `read_patiently` judges.
    """
    cell: dict[str, Any] = {"path": value} if isinstance(value, str) else (value or {})
    data = cell.get("bytes")
    path = cell.get("path")
    if data is None and path:
        data = read_address(path) if is_address(path) else read_local_file(path)
    if not data:
        raise Rejection("audio_empty", "no bytes")
    return data


def is_address(path: str) -> bool:
    return "://" in path and not path.startswith(LOCAL_PROTOCOLS)


def read_local_file(path: str) -> bytes:
    """Only of a regular file: a device or a pipe may have no end, and keep the thread for ever.

    Raises: Rejection; network errors of a file system that lies on another machine.
    """
    for protocol in LOCAL_PROTOCOLS:
        path = path.removeprefix(protocol)
    path = spelling_on_disk(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Rejection("audio_unreadable", f"{path}: {file_type(status.st_mode)}, not a file")
        if status.st_size == 0:  # also what the kernel makes up, as in /proc
            return b""
        check_size(path, status.st_size)
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejection("audio_missing", path) from error
    except (OSError, ValueError) as error:
        if is_network_error(error):
            raise
        raise unreadable(error) from error


def spelling_on_disk(path: str) -> str:
    """The path, or the same letters as the file has them: macOS writes names decomposed (NFD),
    spreadsheets write them composed (NFC)."""
    if path.isascii() or os.path.exists(path):
        return path
    spellings = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((spelling for spelling in spellings if os.path.exists(spelling)), path)


def file_type(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


def check_size(path: str, size_in_bytes: int) -> None:
    """Raises: Rejection(audio_too_large)."""
    if size_in_bytes > MAX_FILE_IN_BYTES:
        detail = f"{path}: {size_in_bytes} bytes, the limit is {MAX_FILE_IN_BYTES}"
        raise Rejection("audio_too_large", detail)


def unreadable(error: Exception) -> Rejection:
    return Rejection("audio_unreadable", f"{type(error).__name__}: {one_line(error)}")


def read_address(address: str) -> bytes:
    """Raises: as `read_audio`."""
    try:
        with open_address(address) as file:
            data = read_to_the_end(file, address)
    except Rejection:
        raise
    except Exception as error:
        if is_network_error(error) or http_statuses(with_causes(error)):
            raise
        if isinstance(error, FileNotFoundError):
            raise Rejection("audio_missing", address) from error
        # Unknown protocols are a ValueError, those whose package is missing an ImportError.
        raise unreadable(error) from error
    if is_web_page(data):
        raise WebPage(f"{address}: answered with a web page (HTML)")
    return data


def open_address(address: str) -> Any:
    """fsspec's file, whose requests have time-outs: its own for the web is five minutes in all."""
    if not address.startswith(("http://", "https://")):
        return fsspec.open(address, "rb")
    import aiohttp  # takes 0.3 s, and only addresses of the web need it

    timeout = aiohttp.ClientTimeout(
        total=None,
        sock_connect=LONGEST_SILENCE_IN_SECONDS,
        sock_read=LONGEST_SILENCE_IN_SECONDS,
    )
    return fsspec.open(address, "rb", client_kwargs={"timeout": timeout})


def read_to_the_end(file: Any, address: str) -> bytes:
    """Raises: Rejection(audio_too_large), WrongBody for less or more than was announced."""
    size = getattr(file, "size", None)
    if isinstance(size, int):
        check_size(address, size)
        data = file.read()
        check_body_size(data, size, address)
        return data
    chunks = []
    num_bytes = 0
    while chunk := file.read(CHUNK_IN_BYTES):
        num_bytes += len(chunk)
        check_size(address, num_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


# ---- waiting, but not for the dead -------------------------------------------------------------


@dataclass
class KnownHosts:
    """What this process has seen of the hosts that its rows name; threads share it."""

    answered: dict[str, str] = field(default_factory=dict)  # host: address that was read last
    silent: set[str] = field(default_factory=set)  # never answered while the network worked

    def remember_answer(self, address: str) -> None:
        host = host_of(address)
        self.answered[host] = address
        self.silent.discard(host)

    def is_row_at_fault(self, address: str) -> bool:
        """Whether the network works all the same, so that waiting for this address is in vain.

        A host that has answered before must answer for another address now: else it is out of
        service, and waited for. A host that never has is dead if any other answers, or the Hub.
        """
        host = host_of(address)
        if host in self.answered:
            return can_be_read(self.answered[host])
        others = list(self.answered.values())[-1:]
        if any(can_be_read(other) for other in others) or is_hub_reachable():
            self.silent.add(host)
            return True
        return False


KNOWN_HOSTS = KnownHosts()


def host_of(address: str) -> str:
    """With protocol and port; of hf:// all are one."""
    if address.startswith("hf://"):
        return "hf://"
    try:
        parts = urlsplit(address)
    except ValueError:  # such as http://[::1
        return address
    return f"{parts.scheme}://{parts.netloc}"


def can_be_read(address: str) -> bool:
    """Whether the first byte comes."""
    try:
        with open_address(address) as file:
            return len(file.read(1)) == 1
    except Exception:  # whatever it is, it does not prove that the network works
        return False


def read_patiently(value: str | dict[str, Any] | None, limit_in_seconds: float) -> bytes:
    """`read_audio`, again after network errors, unless it is the row's own address that is dead.

    Raises: Rejection; RunEnded(75) if the network was gone for the whole limit; UserError if the
    Hub refuses all of a data set.
    """
    backoff = Backoff(limit_in_seconds)
    path = value if isinstance(value, str) else (value or {}).get("path")
    while True:
        try:
            data = read_audio(value)
        except Rejection:
            raise
        except Exception as error:
            if path and is_address(path):
                reject_dead_address(path, error, backoff.num_errors)
            backoff.wait(error, "reading audio")
        else:
            if path and is_address(path):
                KNOWN_HOSTS.remember_answer(path)
            return data


def reject_dead_address(address: str, error: Exception, num_errors_before: int) -> None:
    """Raises: Rejection if the address is at fault, and not the network or the whole Hub.

    A 403 and a web page are asked for once more: a signed address may have expired, or a proxy may
    have answered in place of the server.
    """
    is_on_hub = address.startswith("hf://")
    is_asked_anew = num_errors_before > 0
    detail = f"{address}: {one_line(error)[:300]}"
    statuses = http_statuses(with_causes(error))
    status = statuses[0] if statuses else None
    if status in (404, 410):
        raise Rejection("audio_missing", detail)
    if status == 401 or (status == 403 and is_asked_anew):
        if not is_on_hub or KNOWN_HOSTS.is_row_at_fault(address):
            raise Rejection("audio_missing", detail)
    if is_on_hub:
        return
    if isinstance(error, WebPage) and is_asked_anew:
        raise Rejection("audio_unreadable", detail)
    if status is not None and 400 <= status < 500:
        if status not in (*REFUSALS, *WORTH_WAITING_FOR):
            raise Rejection("audio_missing", detail)
    has_tried_enough = num_errors_before + 1 >= TRIES_OF_AN_ADDRESS
    if has_tried_enough or host_of(address) in KNOWN_HOSTS.silent:
        if KNOWN_HOSTS.is_row_at_fault(address):
            raise Rejection("audio_missing", f"{detail} Others answer.")
