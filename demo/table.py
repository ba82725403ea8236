"""The results as rows of text, the same for the terminal and the report."""

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from demo.results import Results
from demo.students import SettingResult

COLUMNS = ("Labels", "Method", "Top-1 %", "Spread", "Seeds", "s / step", "Teacher s")
TEXT_COLUMNS = 2  # the others are numbers and stand on the right


def rows(results: Results) -> list[tuple[str, ...]]:
    """One row of cells per setting. Spread is the sample standard deviation over seeds."""
    return [_row(setting) for setting in results.settings]


def _row(setting: SettingResult) -> tuple[str, ...]:
    return (
        f"{setting.labels} ({setting.images:,})",
        setting.method,
        f"{setting.mean:.1f}",
        "-" if setting.spread is None else f"{setting.spread:.1f}",
        str(len(setting.seeds)),
        f"{setting.seconds_per_step:.3f}",
        f"{setting.teacher_seconds:.1f}",
    )


def facts(results: Results) -> dict[str, str]:
    """Notes below the table, by name."""
    teacher, store, student = results.teacher, results.store, results.student
    return {
        "Teacher": f"{teacher.name}, {teacher.parameters:,} weights: {teacher.top1:.1f} % top-1 after "
        f"{teacher.train_seconds:.0f} s of training on all labels",
        "Student": f"{student.name}, {student.parameters:,} weights, "
        f"{results.settings[0].steps} steps in every setting",
        "Store": f"{decimal(store.bytes)} for {store.rows:,} rows ({store.views} views per image); "
        f"plan said {decimal(store.planned_bytes)}",
        "Teacher time, cached": f"{store.teacher_seconds:.1f} s once, for all students "
        f"(the whole cache job took {store.seconds:.1f} s)",
        "Teacher time, live": f"{_mean_live_seconds(results):.1f} s in every run that has the teacher in its loop",
        "Test images": f"{results.test_images:,}; one image is {100 / results.test_images:.1f} points",
        "This run": f"{results.seconds:.0f} s on the clock, {results.cpu_seconds:.0f} s of CPU",
    }


def _mean_live_seconds(results: Results) -> float:
    live = [s.teacher_seconds for s in results.settings if s.teacher_seconds]
    return sum(live) / len(live)


def rich_table(results: Results) -> Table:
    """The table for a terminal."""
    table = Table(title="Handwritten digits: one student, five ways to train it", box=SIMPLE_HEAD)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < TEXT_COLUMNS else "right", no_wrap=True)
    previous = results.settings[0].labels
    for setting, cells in zip(results.settings, rows(results), strict=True):
        if setting.labels != previous:
            table.add_section()
        previous = setting.labels
        table.add_row(*cells)
    return table
