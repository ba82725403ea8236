"""Results of a run of the demo: everything the table, the report and results.json are made from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.students import SettingResult


@dataclass(frozen=True)
class TeacherResult:
    """The teacher.

    Attributes:
        name: timm model name.
        parameters: Number of its weights.
        top1: Test accuracy, in percent.
        train_seconds: Wall time of its training.
    """

    name: str
    parameters: int
    top1: float
    train_seconds: float


@dataclass(frozen=True)
class StoreResult:
    """The store and what it took to write.

    Attributes:
        planned_bytes: Size that ``plan`` predicted before anything ran.
        bytes: Size on disk.
        rows: Views in it: images times views.
        views: Views per image.
        teacher_seconds: Time spent in the teacher, once.
        seconds: Time of the whole cache job.
    """

    planned_bytes: int
    bytes: int
    rows: int
    views: int
    teacher_seconds: float
    seconds: float


@dataclass(frozen=True)
class StudentResult:
    """The student: timm model name and number of weights, without any projectors."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Results:
    """Everything that was found.

    Attributes:
        quick: Whether this was the rehearsal with tiny sizes.
        test_images: Images the accuracies were measured on.
        teacher: The teacher.
        store: The store.
        student: The student.
        settings: Ten rows: five methods with few labels, then with all.
        seconds: Wall time of the demo.
        cpu_seconds: CPU time of the demo, its processes included.
        software: Versions.
    """

    quick: bool
    test_images: int
    teacher: TeacherResult
    store: StoreResult
    student: StudentResult
    settings: tuple[SettingResult, ...]
    seconds: float
    cpu_seconds: float
    software: dict[str, str]

    def setting(self, labels: str, method: str) -> SettingResult:
        """The row of a method."""
        return next(row for row in self.settings if (row.labels, row.method) == (labels, method))

    def with_labels(self, labels: str) -> list[SettingResult]:
        """The five rows with few or all labels."""
        return [row for row in self.settings if row.labels == labels]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return json.loads(json.dumps(asdict(self)))

    def write(self, path: Path) -> None:
        """Write results.json."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
