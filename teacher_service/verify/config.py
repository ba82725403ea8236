"""Configuration of ``verify``, read by tyro or made in Python."""

from dataclasses import dataclass
from pathlib import Path

from feature_store.processes import usable_cpus
from feature_store.tools.options import check_fields, require
from teacher_service.config import StoredInputs


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Store to verify and the tars it was written from; all other settings are the store's own.

    Attributes:
        inputs: The store's tars, all of them.
        store: The store: a directory or URL.
        teacher: Name of the teacher, compared with the store's; default the store's. Needed for one of your own
            (package.module:build): no code is imported because a store names it.
        checkpoint: The teacher's weights (safetensors or torch file); default timm's pretrained ones, fetched.
        sample: Rows to recompute, chosen at random. For checksums alone there is `feature-store verify`.
        seed: Chooses the rows.
        batch_size: Rows per forward pass.
        workers: Processes that compare checksums.
        device: Where the teacher runs, e.g. cuda:1; auto takes a GPU if there is one.
        json: Print the whole report as JSON.
    """

    inputs: StoredInputs
    store: str | Path
    teacher: str | None = None
    checkpoint: Path | None = None
    sample: int = 64
    seed: int = 0
    batch_size: int = 32
    workers: int = usable_cpus()
    device: str = "auto"
    json: bool = False

    def __post_init__(self) -> None:
        """Refuse values no run could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        require(self.sample >= 1, "--sample", self.sample, "at least 1 (for checksums alone: `feature-store verify`)")
        require(self.seed >= 0, "--seed", self.seed, "0 or more")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require(self.workers >= 1, "--workers", self.workers, "at least 1")
