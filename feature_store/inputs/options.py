"""Options of every command that opens images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feature_store.errors import InputError

InputFormat = Literal["tar", "folder", "parquet"]


@dataclass(frozen=True, kw_only=True)
class TarOptions:
    """Options for opening tars.

    Attributes:
        allow_pipe: Run the commands of ``pipe:`` and other URLs that start a program; only for lists of tars you trust.
        scratch: Folder where copies of remote and compressed tars are kept; default the system's temporary folder.
    """

    allow_pipe: bool = False
    scratch: Path | None = None


@dataclass(frozen=True, kw_only=True)
class SourceOptions(TarOptions):
    """Options for finding images and labels.

    Attributes:
        input_format: Kind of input: tar (webdataset tars), folder (class-per-folder tree of image files), parquet
            (parquet files, or a Hugging Face dataset folder); auto recognises it.
        labels: Whether samples need labels: required quarantines those without one, optional stores them with label -1,
            none reads no labels.
        label_field: Where labels are. In tars: cls, txt, or json.NAME for a field of the json member; default cls. In
            parquet files: the column; default label.
        classes: Text file of class names, one a line in order of their indexes; labels may then be names.
        unit_samples: Samples of a unit; of folders and parquet files, a tar is one unit.
        shuffle_seed: Seed of the order in which a folder's or parquet files' samples are divided into units.
    """

    input_format: InputFormat | Literal["auto"] = "auto"
    labels: Literal["required", "optional", "none"] = "required"
    label_field: str | None = None
    classes: Path | None = None
    unit_samples: int = 1000
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values no input could have.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        if not 1 <= self.unit_samples <= 2**24:
            raise InputError(f"unit_samples is {self.unit_samples}, expected 1 to {2**24}")
        if not 0 <= self.shuffle_seed < 2**64:
            raise InputError(f"shuffle_seed is {self.shuffle_seed}, expected an unsigned 64-bit integer")


DEFAULT = TarOptions()
