"""The tree of errors a user can meet, with exit codes.

UserError                       exit 2 unless a subclass says otherwise
├── InputError                  an argument, file or image that cannot be used
│   ├── ImageError              one sample's image cannot be decoded (the sample is quarantined, not the run)
│   └── UnknownFieldError       a field of a newer release in a manifest or commit record
├── MismatchError               two things that must agree do not; names the field, both values and the remedy
├── UncommittedError            a row without a commit record
├── CommittedError              a unit's views that another writer committed first
├── QuarantinedError            a row whose sample was quarantined when the store was written
├── FailedError                 the command ran, but what it was to check or make failed         exit 1
├── CorruptStoreError           committed bytes are missing or damaged                          exit 1
└── ResourceError               disk, network or device failed                                   exit 3
    └── WireError               a body from another machine is truncated, damaged or no frame
"""

import errno
from enum import StrEnum
from functools import partial
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Codes of an OSError for lack of room: a full disk, a quota, a limit on file sizes."""


class Remedy(StrEnum):
    """A remedy that is a command or option; the programs print it, see ``feature_store.tools.remedies``."""

    WRITE_STORE = "write-store"
    FINISH_STORE = "finish-store"
    REWRITE_UNIT = "rewrite-unit"
    RETRY_QUARANTINED = "retry-quarantined"
    REPAIR = "repair"
    EXACT_CODEC = "exact-codec"
    LOCAL_CHECKPOINT = "local-checkpoint"
    MODEL_OPTIONS = "model-options"
    TOKEN = "token"
    SOURCE = "source"
    ADD_TARS = "add-tars"
    ALLOW_PIPE = "allow-pipe"
    LABELS = "labels"
    LIST_TEACHERS = "list-teachers"
    NAME_TEACHER = "name-teacher"


class UserError(Exception):
    """Base of everything a user can cause or meet. The message says what, got, expected and the next step.

    Attributes:
        remedy: The command or option that is the next step, if one is.
    """

    exit_code = 2

    def __init__(self, message: str | None = None, *, remedy: Remedy | None = None) -> None:
        super().__init__(*([] if message is None else [message]))
        self.remedy = remedy


class InputError(UserError):
    """An argument, file or value that cannot be used."""


class ImageError(InputError):
    """One image that cannot be decoded or used; its sample is quarantined under this reason."""


class UnknownFieldError(InputError):
    """A field that this build does not know: a newer release wrote it, which is no damage."""


class MismatchError(UserError):
    """Two things that must agree do not.

    Attributes:
        field: Dotted name of what differs, e.g. ``teacher.weights_sha256``.
        expected: Value on the side that rules (usually the store's manifest).
        got: Value on the other side.
    """

    def __init__(self, field: str, *, expected: Any, got: Any, remedy: str, where: str = "store") -> None:
        self.field, self.expected, self.got = field, expected, got
        self._remedy, self._where = remedy, where
        super().__init__(f"{field} differs: {where} has {expected!r}, got {got!r}; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way out of a worker process."""
        keywords = {"expected": self.expected, "got": self.got, "remedy": self._remedy, "where": self._where}
        return partial(type(self), **keywords), (self.field,), {"remedy": self.remedy}


class UncommittedError(UserError):
    """A requested row has no commit record."""


class CommittedError(UserError):
    """A unit's views cannot be written because they have a commit record already; nothing was changed."""


class QuarantinedError(UserError):
    """A row was asked for whose sample was quarantined when the store was written."""


class FailedError(UserError):
    """The command ran, but its check or its result failed, such as runs of a sweep."""

    exit_code = 1


class CorruptStoreError(UserError):
    """Bytes that a commit record proves are missing or damaged."""

    exit_code = 1


class ResourceError(UserError):
    """I/O, network or device failure: disk full, network gone, device lost."""

    exit_code = 3


class WireError(ResourceError):
    """A body from another machine that is truncated, damaged, or not a frame (``feature_store.client.frames``)."""


def one_line(error: BaseException) -> str:
    """The message of another library's error, shortened for use inside one of this project's messages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
