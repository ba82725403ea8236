"""How every command opens the tars it is given."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TarOptions:
    """How tars are opened.

    Attributes:
        allow_pipe: Run the commands of ``pipe:`` and other tars that start a program; only for lists of tars you trust.
        scratch: Where remote and compressed tars are copied to, and stay; default the system's temporary folder.
    """

    allow_pipe: bool = False
    scratch: Path | None = None


DEFAULT = TarOptions()
