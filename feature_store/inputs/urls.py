"""Expands tar patterns to URLs."""

import glob
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import gopen_curl, gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls

from feature_store.backends.bucket import RemoteObjects
from feature_store.errors import InputError, Remedy

WEB, BUCKETS = ("http", "https"), ("s3", "gs")
_OWN = ("", "file", *WEB, "hf", *BUCKETS)  # schemes that are read without a program
_MOST_TARS = 1_000_000  # per pattern: {0..999999999} is a typing error that would fill the memory
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]+\]")
_HIDDEN = "\0"  # stands for the :: of an address, which separates no patterns


def expand_tars(patterns: Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Expand patterns to tar URLs, by webdataset's rules and the shell's.

    ``{000..146}`` counts, ``a::b`` joins two patterns, ``${NAME}`` is the environment variable WDS_NAME; ``*``, ``?``
    and ``[...]`` match files of this machine or a bucket; ``~`` is the home folder; ``@FILE`` is a file of patterns,
    one a line.

    Args:
        patterns: Paths and URLs (``file:``, ``http:``, ``https:``, ``s3:``, ``gs:``, ``hf:``, ``sftp:``...).
        allow_pipe: Also accept URLs that start a program: ``pipe:``, ``ais:``...

    Raises:
        InputError: Nothing listed, a tar listed twice, a broken pattern, an unknown or forbidden scheme.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    urls = [url for pattern in patterns for line in _lines(pattern) for url in _expand(line)]
    if not urls:
        raise InputError("no tars are listed, expected at least one path or URL; name the input tars")
    for url in urls:
        _require_allowed(url, allow_pipe)
    urls = [found for url in urls for found in _matches(url)]
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise InputError(f"tar {twice} is listed twice, expected each tar once; correct the list")
    return urls


def _lines(pattern: str) -> list[str]:
    """The patterns in ``@FILE``; any other pattern alone."""
    if not pattern.startswith("@"):
        return [pattern]
    path = Path(pattern[1:]).expanduser()
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"list of tars {pattern} cannot be read: {error}; name a text file of one pattern a line, or write ./@ "
            "before the name of a tar that begins with @"
        ) from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise InputError(f"list of tars {pattern} is empty, expected one path, URL or pattern a line; correct the file")
    return found


def _expand(pattern: str) -> list[str]:
    if _HIDDEN in pattern:
        raise InputError(f"tar pattern {pattern!r} has a NUL character, which no path or URL has; correct it")
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if count > _MOST_TARS:
        raise InputError(f"tar pattern {pattern!r} stands for {count:,} tars, expected at most {_MOST_TARS:,}")
    try:
        urls = expand_urls(_IPV6.sub(lambda address: address[0].replace("::", _HIDDEN), pattern))
    except AssertionError as error:  # how webdataset reports an unset variable
        raise InputError(f"tar pattern {pattern!r}: {error}; set it or take it out of the pattern") from error
    except ValueError as error:
        raise InputError(f"tar pattern {pattern!r} is broken: {error}; correct its braces") from error
    if "" in urls:
        raise InputError(f"tar pattern {pattern!r} names an empty path; correct it")
    return [_in_home(url.replace(_HIDDEN, "::")) for url in urls]


def _in_home(url: str) -> str:
    try:
        return str(Path(url).expanduser()) if url.startswith("~") else url
    except RuntimeError as error:
        raise InputError(f"tar {url}: {error}; write the folder out, or ./ before a name that begins with ~") from error


def _require_allowed(url: str, allow_pipe: bool) -> None:
    """Refuse URLs that start a program; judged after webdataset's GOPEN_REWRITE."""
    rewritten = rewrite_url(url)
    parsed = _parsed(rewritten)
    if parsed.scheme == "file" and parsed.netloc not in ("", "localhost"):
        raise InputError(f"tar {url} names a host, {parsed.netloc!r}; write file:///path for a file of this machine")
    if parsed.scheme in _OWN or gopen_schemes.get(parsed.scheme) is gopen_curl:
        return
    if parsed.scheme not in gopen_schemes:
        known = ", ".join(sorted({*gopen_schemes, *_OWN} - {"__default__", ""}))
        raise InputError(
            f"tar {url} has unknown scheme {parsed.scheme!r}, expected a path or one of {known}; copy the tar to a "
            "disk, or write ./ before a path with a colon"
        )
    if not allow_pipe:
        raise InputError(
            f"tar {rewritten} would start a program ({parsed.scheme}: runs a command on this machine); if you trust "
            "it, allow it (in Python allow_pipe=True)",
            remedy=Remedy.ALLOW_PIPE,
        )


def _parsed(url: str):
    try:
        return urlparse(url)
    except ValueError as error:
        raise InputError(f"tar {url} is no URL: {error}; correct it, or write ./ before a path") from error


def _matches(url: str) -> list[str]:
    """Files that match a glob, sorted; any other URL alone."""
    if not glob.has_magic(url):
        return [url]
    scheme = urlparse(url).scheme
    if scheme in BUCKETS:
        found = _in_bucket(url)
    elif scheme in WEB and "*" in urlparse(url).path:
        raise InputError(f"tar {url} has a *, and web servers do not list files; count with braces: {{000..146}}")
    elif (path := local_path(url)) is None or path.exists():
        return [url]
    else:
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - patterns may be absolute
    if not found:
        raise InputError(f"tar pattern {url!r} matches no file; correct it")
    return found


def _in_bucket(url: str) -> list[str]:
    bucket, key = bucket_key(url)
    if key in (found := (objects := RemoteObjects(bucket)).list(_glob_root(key))):
        return [url]
    return [f"{objects.url}/{name}" for name in found if fnmatchcase(name, key) and name.count("/") == key.count("/")]


def _glob_root(key: str) -> str:
    """The part of a pattern before its first special character."""
    return re.split(r"[*?\[]", key, maxsplit=1)[0]


def bucket_key(url: str) -> tuple[str, str]:
    """Bucket and key of an object: ``s3://bucket``, ``folder/a.tar``.

    Raises:
        InputError: It names no object.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket or not key or key.endswith("/"):
        raise InputError(f"tar {url} names no object of a bucket; expected {scheme}://bucket/folder/a.tar or .../*.tar")
    return f"{scheme.lower()}://{bucket}", key


def local_path(url: str) -> Path | None:
    """Local file of a path or ``file:`` URL; None for other URLs."""
    parsed = urlparse(url)
    if parsed.scheme == "file":
        return Path(url2pathname(parsed.path))
    return Path(url) if parsed.scheme == "" else None


def tar_name(url: str) -> str:
    """Last component of the URL's path."""
    path = urlparse(url).path if urlparse(url).scheme in ("file", *WEB) else url
    return path.rstrip("/").rsplit("/", 1)[-1]
