"""Options of every command that opens tars."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TarOptions:
    """How tars are opened.

    Attributes:
        allow_pipe: Run the commands of ``pipe:`` and other URLs that start a program; only for lists of tars you trust.
        scratch: Folder where copies of remote and compressed tars are kept; default the system's temporary folder.
    """

    allow_pipe: bool = False
    scratch: Path | None = None


DEFAULT = TarOptions()
