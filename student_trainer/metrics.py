"""The run's numbers: metrics.jsonl, means over an epoch, and the pace of steps."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from feature_store.errors import InputError


class MetricsLog:
    """Appends one JSON object per line; every line names its ``kind``, and its ``step`` as optimizer steps done."""

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


def rewind_metrics(path: Path, step: int) -> None:
    """Drop every line later than a step: a run resumes from a checkpoint, which may be older than the log."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    rewound = path.with_name(path.name + ".partial")
    rewound.write_text("".join(json.dumps(record) + "\n" for record in kept))
    rewound.replace(path)


class Means:
    """Running means of named values, resumable to the bit."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}
        self._count: int = state["count"] if state else 0

    def add(self, values: Mapping[str, float]) -> None:
        """Count one step's values; every step has the same names."""
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean per name; NaN before the first step."""
        return {name: total / self._count if self._count else math.nan for name, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": dict(self._sums), "count": self._count}


class Pace:
    """How fast steps go: their median time, images per second, and the share spent waiting for data."""

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
        """Images per second, and data-wait share of the time, since this was last asked."""
        images, waited, total = self._since
        self._since = [0.0, 0.0, 0.0]
        return {"images_per_second": images / total, "data_wait": waited / total}
