"""Lists at an address that the user typed: https://, s3://, gs://, hf://buckets/, by fsspec.

Never one that a data set names. What such a list's rows may name is bounded, too: files of the same
server, bucket or repository (`cells.check_path`).
"""

import os
from urllib.parse import urlsplit

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.network import http_statuses, is_network_error, with_causes
from speech_finetuning.data.reading import WORTH_WAITING_FOR, open_address
from speech_finetuning.data.signatures import is_web_page

PARTS_OF_HUB_ROOT = 3  # hf://buckets/OWNER/NAME
LISTED_PROTOCOLS = "https://, s3://, gs://, hf://buckets/"


def suffix_of_address(address: str) -> str:
    """Of its file, also with a query behind it."""
    return os.path.splitext(urlsplit(address).path)[1].lower()


def folder_of(path: str) -> str:
    """Where a list's relative paths start. path: of the list, or its address."""
    if not path.startswith(("https://", "http://")):
        return os.path.dirname(path)
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc}{os.path.dirname(parts.path)}".rstrip("/")


def root_of_address(address: str) -> str:
    """What the rows of a list may name files of: its server, bucket or repository."""
    parts = urlsplit(address)
    if parts.scheme != "hf":
        return f"{parts.scheme}://{parts.netloc}"
    return "hf://" + "/".join(address.removeprefix("hf://").split("/")[:PARTS_OF_HUB_ROOT])


def check_address(address: str) -> None:
    """Opens the list once, so that a wrong address is said at the start.

    Raises: UserError; errors of the network, which are waited out.
    """
    shown = address.partition("?")[0]  # a query may hold a signature
    try:
        with open_address(address) as file:
            beginning = file.read(1024)
    except Exception as error:
        statuses = http_statuses(with_causes(error))
        is_refused = any(
            400 <= status < 500 and status not in WORTH_WAITING_FOR for status in statuses
        )
        if not is_refused and is_network_error(error):
            raise
        # A package that fsspec lacks is an ImportError, which names it; a strange protocol a
        # ValueError; cloud storages have errors of their own.
        found = f"{type(error).__name__}: {one_line(error).replace(address, shown)}"
        if statuses:
            found = f"the server answers {statuses[0]}. Is the address right, and open to you?"
        raise UserError(f"--dataset_name {shown}: {found}") from error
    if is_web_page(beginning):
        raise UserError(
            f"--dataset_name {shown}: answered with a web page, not a list. Take the address of "
            "the file itself, as a browser's download shows it."
        )
