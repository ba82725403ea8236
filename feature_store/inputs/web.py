"""HTTP streams of tars from web servers or the Hugging Face Hub."""

import base64
import http.client
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from feature_store.errors import InputError, ResourceError

HUB = "hf://"
_SECONDS = 60  # a server may send nothing
_TRY_AGAIN = (408, 425, 429)  # and all of 500 and above
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


class UnreachableError(ResourceError):
    """The server or the network failed; the same request may succeed later."""


class WebTar(NamedTuple):
    """A response whose headers have arrived.

    Attributes:
        version: Entity tag, modification time and length, as the server gives them.
        size: Its length in bytes; None if the server does not say.
        stream: The body.
    """

    version: str
    size: int | None
    stream: Any


@contextmanager
def open_web(url: str) -> Iterator[WebTar]:
    """Ask for a tar at ``http(s)://`` or ``hf://``; nothing of the body is read yet, so a known version costs little.

    A GET, not a HEAD: signed URLs are good for one method.

    Raises:
        InputError: Not a URL, or the server refuses the request.
        UnreachableError: Network or server failed; also from within the context.
    """
    request = _hub_request(url) if url.startswith(HUB) else _request(url)
    try:
        with urlopen(request, timeout=_SECONDS) as response:  # nosec B310 # http and https, see expand_tars
            headers = response.headers
            length = headers.get("Content-Length", "")
            version = f"{headers.get('ETag')} {headers.get('Last-Modified')} {length}"
            yield WebTar(version, int(length) if length.isdecimal() else None, response)
    except HTTPError as error:
        error.close()
        raise _refused(url, error) from error
    except http.client.InvalidURL as error:
        raise InputError(f"tar {url} is no URL: {error}; correct it") from error
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or error
        kind = ResourceError if isinstance(reason, ssl.SSLCertVerificationError) else UnreachableError
        raise kind(f"tar {url} cannot be fetched: {reason!s:.300}; check the URL and the network") from error


def _request(url: str, token: str | None = None) -> Request:
    """The request; its password or token is not repeated where the server redirects it to."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "scalekd-cache"}
    try:
        parts = urlsplit(quote(url, safe=_URL_CHARACTERS))
        host = parts.netloc.rpartition("@")[2]
        request = Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise InputError(f"tar {url} is no URL: {error}; correct it") from error
    if not usable:
        raise InputError(f"tar {url} names no host and port; correct it")
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
    elif token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _hub_request(url: str) -> Request:
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    try:
        found: Any = HfFileSystem().resolve_path(url)
        address = hf_hub_url(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision)
    except (OSError, ValueError, NotImplementedError, AttributeError) as error:  # network, no such place or form
        raise InputError(f"tar {url} is not there: {error!s:.300}; check the URL, the network and the token") from error
    return _request(address, get_token())


def _refused(url: str, error: HTTPError) -> InputError | ResourceError:
    phrase = http.client.responses.get(error.code, "")  # the server's own phrase may hold control characters
    answer = f"tar {url} cannot be fetched: the server answered {error.code} {phrase}".rstrip()
    if error.code >= 500 or error.code in _TRY_AGAIN:
        return UnreachableError(f"{answer}; try again later")
    if error.code in (401, 403, 407):
        return InputError(f"{answer}; write http://user:password@host/..., a signed URL, or fetch the tar yourself")
    return InputError(f"{answer}; correct the URL")
