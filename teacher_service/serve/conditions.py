"""Conditional requests, range requests (RFC 9110)."""

import re

from starlette.responses import Response

from teacher_service.serve.problems import Problem

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def matches(header: str | None, tag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags (If-Match, If-None-Match) has this one.

    Args:
        header: The list; None or empty matches nothing.
        tag: A strong tag with its quotes.
        weak: Whether ``W/`` is looked over, as If-None-Match does.
    """
    if not header:
        return False
    tags = [part.strip() for part in header.split(",")]
    return "*" in tags or tag in ([each.removeprefix("W/") for each in tags] if weak else tags)


def not_modified(tag: str, if_none_match: str | None) -> Response | None:
    """304 for a client that has these bytes already."""
    if not matches(if_none_match, tag, weak=True):
        return None
    return Response(status_code=304, headers={"ETag": tag, "Cache-Control": "private, no-cache"})


def require_match(tag: str, if_match: str | None) -> None:
    """Refuse a client that wants other bytes.

    Raises:
        Problem: precondition-failed.
    """
    if if_match is not None and not matches(if_match, tag, weak=False):
        raise Problem("precondition-failed", f"the object is {tag} now; read it again from its start")


def parse_range(header: str | None, size: int) -> range | None:
    """The bytes asked for; None for all of them: no header, or one that may be ignored (several ranges, other units).

    Raises:
        Problem: range-not-satisfiable.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None  # not a range at all
    if start >= size:
        raise Problem(
            "range-not-satisfiable", f"the object has {size:,} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return range(start, stop)
