"""Findings as sentences made from the numbers, pleasant or not."""

from math import ceil, sqrt

from demo.results import Results
from demo.students import SettingResult

_SAME_START = 10  # steps over which a store-fed and a live run are compared closely


def findings(results: Results) -> list[str]:
    """Sentences for the report, most important first."""
    return [
        *(["This is a rehearsal with tiny sizes: its accuracies mean nothing."] if results.quick else []),
        _teacher(results),
        _few_labels(results),
        _all_labels(results),
        _store_or_live(results),
        _break_even(results),
        _step_cost(results),
        _caveats(results),
    ]


def _teacher(results: Results) -> str:
    teacher, plain = results.teacher.top1, results.setting("all", "No distillation").mean
    verdict = "is better than" if teacher > plain else "is NOT better than"
    return (
        f"The teacher ({teacher:.1f} %) {verdict} the student trained plainly with all labels ({plain:.1f} %): "
        f"{_points(teacher - plain)}. With {results.test_images} test images the standard error of such a number "
        f"is about {_standard_error(teacher, results.test_images):.1f} points."
    )


def _few_labels(results: Results) -> str:
    plain, kd, fd, scalekd = _store_fed(results, "few")
    best = max((plain, kd, fd, scalekd), key=lambda setting: setting.mean)
    others = "; ".join(_compare(scalekd, other) for other in (plain, kd, fd))
    return (
        f"With {plain.images} labels, the best of the store-fed methods is {best.method} ({_accuracy(best)}). "
        f"ScaleKD from the store ({_accuracy(scalekd)}) against the others: {others}."
    )


def _all_labels(results: Results) -> str:
    plain, kd, fd, scalekd = _store_fed(results, "all")
    doubt = 2 * sqrt(2) * _standard_error(plain.mean, results.test_images)
    apart = [setting.method for setting in (kd, fd, scalekd) if abs(setting.mean - plain.mean) > doubt]
    return (
        f"With all {plain.images:,} labels, KD is {_signed(kd.mean - plain.mean)}, FD "
        f"{_signed(fd.mean - plain.mean)} and ScaleKD from the store {_signed(scalekd.mean - plain.mean)} against "
        f"no distillation ({plain.mean:.1f} %). Differences above the {doubt:.1f} points that {results.test_images} "
        f"test images leave in doubt, {_seeds(plain)}: {' and '.join(apart) or 'none'}."
    )


def _store_or_live(results: Results) -> str:
    parts = []
    for labels in ("few", "all"):
        store, live = results.setting(labels, "ScaleKD, store"), results.setting(labels, "ScaleKD, live")
        parts.append(f"{_signed(store.mean - live.mean)} with {store.images:,} labels")
    start = max(_largest_gap(results, labels, _SAME_START) for labels in ("few", "all"))
    whole = max(_largest_gap(results, labels, None) for labels in ("few", "all"))
    return (
        f"ScaleKD from the store against the same with the teacher in the loop: {' and '.join(parts)}. Both see the "
        f"same views from the same initial weights, and differ by the store's 16-bit rounding alone: their cross "
        f"entropies stay within {start:.2g} of each other over the first {_SAME_START} steps and within {whole:.2g} "
        "over the whole run, as rounding differences grow step by step."
    )


def _break_even(results: Results) -> str:
    store = results.store
    live = [s for s in results.settings if s.method == "ScaleKD, live"]
    per_run = sum(s.teacher_seconds for s in live) / len(live)
    fed = [s for s in results.settings if s.method in ("KD", "FD", "ScaleKD, store")]
    runs = sum(len(s.seeds) for s in fed)
    return (
        f"Caching spent {store.teacher_seconds:.1f} s in the teacher once, in large batches; a live run spends "
        f"{per_run:.1f} s every time, batch by batch. In teacher seconds the store has paid for itself after "
        f"{_paid_after(store.teacher_seconds, per_run)}, counting the whole cache job ({store.seconds:.1f} s) after "
        f"{_paid_after(store.seconds, per_run)}. The {runs} store-fed distilled runs here would have spent "
        f"{runs * per_run:.0f} s in a live teacher. This teacher is tiny, and these are seconds on the clock: a busy "
        "machine, or two students side by side, lengthens them."
    )


def _step_cost(results: Results) -> str:
    plain, kd, _, scalekd = _store_fed(results, "all")
    live = results.setting("all", "ScaleKD, live")
    return (
        f"A ScaleKD step from the store takes {scalekd.seconds_per_step / plain.seconds_per_step:.1f} times a plain "
        f"step and {scalekd.seconds_per_step / live.seconds_per_step:.2f} times a live one (KD from the store: "
        f"{kd.seconds_per_step / plain.seconds_per_step:.1f} times a plain step). Beside a student of "
        f"{results.student.parameters:,} weights the projectors and the teacher's later blocks weigh much; "
        "all of it is dropped after training."
    )


def _caveats(results: Results) -> str:
    few = results.setting("few", "No distillation")
    return (
        "To keep in mind: the teacher was trained with all labels, so students with few labels learn from labels they "
        f"were not given; the seeds change weights and order, not which {few.images} images are labelled; training and "
        "test scans come from the same writers; and all settings share one learning rate and one number of steps."
    )


def _store_fed(results: Results, labels: str) -> list[SettingResult]:
    return [results.setting(labels, name) for name in ("No distillation", "KD", "FD", "ScaleKD, store")]


def _compare(mine: SettingResult, other: SettingResult) -> str:
    """The difference of means, and whether the seeds' ranges keep apart."""
    apart = min(mine.top1) > max(other.top1) or max(mine.top1) < min(other.top1)
    if len(mine.top1) < 2:
        return f"{_signed(mine.mean - other.mean)} against {other.method} (one seed)"
    seeds = "no seed overlaps" if apart else "the seeds overlap, so this may be chance"
    return f"{_signed(mine.mean - other.mean)} against {other.method} ({seeds})"


def _largest_gap(results: Results, labels: str, steps: int | None) -> float:
    """Largest difference of cross entropy between store-fed and live ScaleKD over the first steps, any seed."""
    store, live = results.setting(labels, "ScaleKD, store"), results.setting(labels, "ScaleKD, live")
    return max(
        abs(a - b)
        for one, other in zip(store.curves, live.curves, strict=True)
        for a, b in list(zip(one, other, strict=True))[:steps]
    )


def _paid_after(spent: float, per_run: float) -> str:
    runs = max(1, ceil(spent / per_run))
    return "1 student" if runs == 1 else f"{runs} students"


def _accuracy(setting: SettingResult) -> str:
    return f"{setting.mean:.1f} %" if setting.spread is None else f"{setting.mean:.1f} ± {setting.spread:.1f} %"


def _seeds(setting: SettingResult) -> str:
    return "with one seed" if len(setting.seeds) == 1 else f"with {len(setting.seeds)} seeds"


def _points(difference: float) -> str:
    return f"{abs(difference):.1f} points {'ahead' if difference > 0 else 'behind'}" if difference else "equal"


def _signed(difference: float) -> str:
    return f"{round(difference, 1) + 0.0:+.1f} points"  # + 0.0: never "-0.0"


def _standard_error(percent: float, images: int) -> float:
    """Of an accuracy measured on a number of images, in points."""
    return sqrt(percent * (100 - percent) / images)
