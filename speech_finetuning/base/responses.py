"""HTTP responses that are not what was asked for: a proxy's page, a part that is too short.

They come with a status that says success. Taken at their word they would be a damaged file, or
audio that no decoder knows, and rows would be lost for good over a fault of one second.
"""

import re

# What huggingface_hub 2.4 calls HTTP with; it tries again after a RemoteProtocolError of this one.
import httpx2

# A server may ask for a wait of any length, and huggingface_hub 2.4 sleeps it in silence, unheard by
# our limit. What is longer than this is left to Backoff.
LONGEST_WAIT_IN_SECONDS = 60
ANNOUNCED_SIZE = "announced_size"  # in a request's extensions, which its redirects inherit


def check_response(response: httpx2.Response) -> None:
    """A response hook: looks at the headers, before the body is read.

    Raises: httpx2.RemoteProtocolError, which counts as an error of the network.
    """
    request = response.request
    if response.has_redirect_location:
        size = response.headers.get("X-Linked-Size")  # of the file that the Hub redirects to
        if size is not None:
            request.extensions[ANNOUNCED_SIZE] = int(size)
        return
    if response.status_code not in (200, 206) or request.url.path.endswith((".html", ".htm")):
        return
    problem = None
    if response.headers.get("Content-Type", "").startswith("text/html"):
        problem = "a web page"
    elif request.method == "GET" and "Content-Encoding" not in response.headers:
        problem = problem_of_length(response)
    if problem is not None:
        place = f"{request.url.host}{request.url.path}"
        raise httpx2.RemoteProtocolError(f"{place} answered with {problem}.", request=request)


def forget_long_waits(response: httpx2.Response) -> None:
    """A response hook: takes out of a refusal for which the library would wait long."""
    headers = response.headers
    # "12", or a date; and, of the Hub: "api";r=0;t=55
    asked = [
        headers.get("Retry-After", "0"),
        *re.findall(r";t=(\d+)", headers.get("RateLimit", "")),
    ]
    if all(wait.isdecimal() and int(wait) <= LONGEST_WAIT_IN_SECONDS for wait in asked):
        return
    for name in ("Retry-After", "RateLimit"):
        headers.pop(name, None)


def problem_of_length(response: httpx2.Response) -> str | None:
    """In words, if the body will not be the bytes that were asked for."""
    length = response.headers.get("Content-Length")
    size = response.request.extensions.get(ANNOUNCED_SIZE)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", response.request.headers.get("Range", ""))
    if asked is None:
        if size is None or length is None or int(length) == size:
            return None
        return f"{length} of {size} bytes"
    first = int(asked.group(1))
    if response.status_code == 200:
        is_whole = first == 0 and size is not None and length == str(size)
        return None if is_whole else f"no part from byte {first} on, but all of something"
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None:
        return "a part without its place"
    last = int(asked.group(2)) if asked.group(2) else None
    if found.group(3) != "*":
        end = int(found.group(3)) - 1
        last = end if last is None else min(last, end)
    if int(found.group(1)) != first or (last is not None and int(found.group(2)) != last):
        return f"bytes {found.group(1)} to {found.group(2)} instead of {first} to {last}"
    num_bytes = int(found.group(2)) - first + 1
    if length is not None and int(length) != num_bytes:
        return f"{length} of {num_bytes} bytes"
    return None
