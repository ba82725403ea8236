"""The run's numbers: metrics.jsonl, throughput, memory."""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch

from feature_store.backends.files import write_text
from feature_store.errors import InputError


class MetricsLog:
    """Appends one JSON object per line; every line names its ``kind``, and its ``step`` as optimizer steps done.

    Step and epoch lines are nested: ``loss`` (weighted terms with their ``total``), ``raw`` (the same unweighted),
    ``val`` (top1, top5, samples, unreadable) and ``speed``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO = path.open("a")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line and hand it to the operating system."""
        print(json.dumps({"kind": kind, "step": step, **values}), file=self._file, flush=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; a last line cut short by a crash is left out.

    Raises:
        InputError: The file is missing, or a line before the last is no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: not the folder of a training run, or the file was removed")
    lines = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path} line {number} is damaged: {error}; remove the line") from error
    return records


def rewind_metrics(path: Path, step: int, epoch: int) -> None:
    """Drop every line later than a checkpoint, which may be older than the log.

    Args:
        path: The metrics file.
        step: Optimizer steps done by then.
        epoch: The epoch in progress then; its own line comes after its last step.
    """
    kept = [line for line in read_metrics(path) if line["step"] <= step and not _is_epoch_from(line, epoch)]
    _rewrite(path, kept)


def set_aside_accuracies(path: Path) -> None:
    """Rename ``val`` of every line to ``earlier_val``: accuracies on other validation tars do not compare."""
    lines = read_metrics(path)
    for line in lines:
        if "val" in line:
            line["earlier_val"] = line.pop("val")
    _rewrite(path, lines)


def _is_epoch_from(line: Mapping[str, Any], epoch: int) -> bool:
    return line["kind"] == "epoch" and line["epoch"] >= epoch


def _rewrite(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


class Throughput:
    """Speed of steps: median time, images per second, and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._since = [0.0, 0.0, 0.0]  # images, seconds waited, seconds in all since the last line

    def add(self, images: int, waited: float, computed: float) -> None:
        """Count one step; times in seconds."""
        self._seconds.append(waited + computed)
        self._since = [a + b for a, b in zip(self._since, (images, waited, waited + computed), strict=True)]

    def median(self) -> float | None:
        """Median seconds per step; None before the first."""
        return median(self._seconds) if self._seconds else None

    def since_last(self) -> dict[str, float]:
        """Images per second, and the share of the time spent waiting for data, since this was last asked."""
        images, waited, total = self._since
        self._since = [0.0, 0.0, 0.0]
        return {"images_per_second": images / total, "data_wait": waited / total}


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, in bytes: torch's on a GPU, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
