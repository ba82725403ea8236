"""docs/results.md, made from the committed results."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.study.figures import Point, accuracy_figure, cosine_figure, difference_figure, spectrum_figure
from benchmarks.study.questions import QUESTIONS, STORES, Question
from benchmarks.study.results import Results, read_results, runs_of
from benchmarks.study.stores import SPECTRUM_ROWS
from benchmarks.study.tiers import CPU, CPU_10K, GPU, STUDENTS, Tier
from student_trainer.sweeps.comparison import Difference, paired_difference

CONFIDENCE = 0.95
FIGURES = "figures"
POSITIONS = 16  # of the teacher's final map
HERE = Path(__file__).parent
_TIERS = (CPU, CPU_10K, GPU)
_PAIRS = (("KD", "FD"), ("KD", "ScaleKD"), ("FD", "ScaleKD"))  # also compared with each other where methods are
_ALSO = {
    "few-labels": tuple((f"Few labels, {a}", f"Few labels, {b}") for a, b in _PAIRS),
    "teachers": (("KD, weak teacher", "KD"), ("ScaleKD, weak teacher", "ScaleKD")),
    "ablation": (("CAP", "CAP + DFM"), ("CAP + DFM", "CAP + DFM + TPP"), ("CAP + DFM + TPP", "ScaleKD")),
}
_DIFFERENCES = ("views", "codec", "beta", "projector")  # figures of differences instead of accuracies


@dataclass(frozen=True)
class _Written:
    """Texts written by hand, by heading: predictions before the runs, comments after them."""

    predictions: Mapping[str, str]
    comments: Mapping[str, str]


def write_report(results: Path, docs: Path) -> None:
    """Write results.md and its figures into the folder of the documentation."""
    written = _Written(_sections(HERE / "predictions.md"), _sections(HERE / "comments.md"))
    tiers = {tier.name: read_results(results / tier.name) for tier in _TIERS}
    cpu = tiers[CPU.name]
    parts = [_opening(tiers), _made(cpu), written.comments.get("answers", ""), _status(tiers)]
    for question in QUESTIONS:
        parts.append(f"## {question.asks}\n\n{_quoted(written.predictions[question.prediction])}")
        found = [
            _question(question, tier, tiers[tier.name], written, docs)
            for tier in _TIERS
            if question.name in tiers[tier.name].questions
        ]
        parts += found or ["Not run."]
    parts += [_economics(tiers, written), _spectra(cpu, docs), _gpu(tiers[GPU.name])]
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    (docs / "results.md").write_text(text + "\n")


def _opening(tiers: dict[str, Results]) -> str:
    sizes = "\n".join(f"- **{name}**: {_sizes(results)}" for name, results in tiers.items())
    return (HERE / "opening.md").read_text().replace("{sizes}", sizes)


def _sizes(results: Results) -> str:
    tier = results.made.get("tier", {})
    if not tier:
        return "never run."
    return (
        f"{tier['images']:,} of the training images, {tier['steps']:,} steps of {tier['batch_size']} "
        f"({tier['epochs']} epochs), crops of {100 * tier['policy']['scale'][0]:.0f} to 100 % of the area and flips."
    )


def _made(cpu: Results) -> str:
    teachers = cpu.made.get("teachers", {})
    if not teachers:
        return ""
    rows = [
        (
            name, f"{said['top1']:.1f}", f"{said['train_images']:,}", str(said["recipe"]["epochs"]),
            f"{said['parameters'] / 1e6:.2f} M", f"{said['cpu_seconds'] / 60:.0f}", f"{said['wall_seconds'] / 60:.0f}",
        )
        for name, said in teachers.items()
    ]  # fmt: skip
    machine = cpu.made["machine"]
    students = ", ".join(f"{name} (`{given['student']}`)" for name, given in STUDENTS.items())
    header = ("Teacher", "Top-1 %", "Images", "Epochs", "Weights", "Core-minutes", "Minutes")
    return "\n\n".join(
        [
            "## Teachers and students",
            _table(header, rows),
            "The teacher is a ViT on the 4 x 4 map of a convolutional stem (`study_hybrid_32`, "
            "`benchmarks/study/networks.py`), cut before its last block. Students: "
            f"{students}, all with maps of 4 x 4. "
            f"Machine: {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}.",
        ]
    )


def _status(tiers: dict[str, Results]) -> str:
    rows = []
    for question in QUESTIONS:
        states = (_state(question, tier, _of(tiers[tier.name], question)) for tier in _TIERS)
        rows.append((question.asks, question.student, *states))
    header = ("Question", "Student", *(f"{tier.name} tier" for tier in _TIERS))
    return "\n\n".join(["## What has been run", _table(header, rows, left=len(header))])


def _state(question: Question, tier: Tier, found: dict[str, Any]) -> str:
    asked = question.settings(tier)
    done = sum(len(runs_of(found, name)) for name in asked)
    runs = len(asked) * len(tier.seeds)
    return f"all, {len(tier.seeds)} seeds" if done == runs else f"{done} of {runs} runs" if done else "not run"


def _question(question: Question, tier: Tier, results: Results, written: _Written, docs: Path) -> str:
    """A question's tables, sentences, figure and comment in one tier; a heading where it is not the first tier."""
    found, suffix = _of(results, question), "" if tier is CPU else f"-{tier.name}"
    points = _points(question, found, question.settings(tier))
    parts = [f"### The {tier.name} tier"] if suffix else []
    if suffix and (prediction := written.predictions.get(question.prediction + suffix)):
        parts.append(_quoted(prediction))
    parts.append(_accuracies(question, found, points))
    parts.append("\n".join(f"- {sentence}" for sentence in _verdicts(question, found, points)))
    if len(points) > 1:
        name = f"study-{question.name}{suffix}.svg"
        if question.name in _DIFFERENCES:
            difference_figure(docs / FIGURES / name, points, question.label(question.baseline))
        else:
            accuracy_figure(docs / FIGURES / name, points)
        parts.append(f"![{question.asks}]({FIGURES}/{name})")
    if question.name == "ablation":
        parts.append(_distances(found, question.settings(tier), suffix, docs))
    return "\n\n".join([*parts, written.comments.get(question.name + suffix, "")])


def _distances(found: dict[str, Any], settings: Iterable[str], suffix: str, docs: Path) -> str:
    """Distances of the projected maps of stage 4 to F^t, by setting."""
    paths = ("original", "alternative")
    cosines = {
        name: [_cosine([run["terms"].get(f"stage4_{path}") for run in runs]) for path in paths]
        for name in settings
        if (runs := found["settings"].get(name))
    }
    cosines = {name: values for name, values in cosines.items() if values != [None, None]}
    if not cosines:
        return ""
    header = ("Setting", "Cosine, original view path", "Cosine, alternative view path")
    rows = [(name, *("" if value is None else f"{value:.3f}" for value in values)) for name, values in cosines.items()]
    figure = f"study-distances{suffix}.svg"
    by_path = zip(paths, zip(*cosines.values(), strict=True), strict=True)
    cosine_figure(docs / FIGURES / figure, [*cosines], {f"{path} view path": values for path, values in by_path})
    return "\n\n".join(
        [
            "Mean cosine of the projected student map to the teacher's, over positions, in the last epoch; a path that "
            "a setting does not train is left out.",
            _table(header, rows),
            f"![Cosine of projected and teacher's maps]({FIGURES}/{figure})",
        ]
    )


def _cosine(losses: Sequence[float | None]) -> float | None:
    """From L = 2 sum_n (1 - cos) / B; None where no run has the term."""
    known = [1 - loss / 2 / POSITIONS for loss in losses if loss is not None]
    return mean(known) if known else None


def _points(question: Question, found: dict[str, Any], settings: Iterable[str]) -> list[Point]:
    """Settings that have a run, in their order."""
    points = []
    for name in settings:
        runs = runs_of(found, name)
        if runs:
            other = None if name == question.baseline else _difference(found, name, question.baseline)
            points.append(
                Point(
                    name,
                    question.label(name),
                    tuple(run.top1 for run in runs),
                    None if other is None else other.mean,
                    None if other is None else other.low,
                    None if other is None else other.high,
                )
            )
    return points


def _accuracies(question: Question, found: dict[str, Any], points: Sequence[Point]) -> str:
    rows = []
    for point in points:
        paces = [run.seconds_per_step for run in runs_of(found, point.setting) if run.seconds_per_step is not None]
        spread = f" +- {stdev(point.values):.1f}" if len(point.values) > 1 else ""
        rows.append(
            (
                point.name,
                f"{mean(point.values):.1f}{spread}",
                str(len(point.values)),
                "" if point.difference is None else f"{point.difference:+.1f}",
                "" if point.low is None else f"{point.low:+.1f} to {point.high:+.1f}",
                f"{1000 * min(paces):.0f}" if paces else "",
            )
        )
    header = (
        "Setting",
        "Top-1 % +- sd",
        "Seeds",
        f"vs {question.label(question.baseline)}",
        "95 % interval",
        "ms / step",
    )
    return _table(header, rows)


def _verdicts(question: Question, found: dict[str, Any], points: Sequence[Point]) -> list[str]:
    """A sentence per comparison, from its interval."""
    pairs = [(question.baseline, point.setting) for point in points if point.setting != question.baseline]
    pairs += [*_ALSO.get(question.name, _PAIRS if question.name.startswith("methods") else ())]
    sentences = []
    for base, name in pairs:
        if (difference := _difference(found, name, base)) is not None:
            sentences.append(_verdict(question.label(name), question.label(base), difference))
    return sentences


def _verdict(name: str, base: str, found: Difference) -> str:
    size = f"{found.mean:+.2f} points"
    if found.low is None or found.high is None:
        return f"{name} - {base}: {size} with {found.pairs} seed; no interval."
    interval = f"{size} ({found.low:+.2f} to {found.high:+.2f}, {found.pairs} seeds)"
    if found.pairs < len(CPU.seeds):
        return f"{name} - {base}: {interval}: a first look."
    if found.low > 0:
        return f"{name} - {base}: {interval}: **better**."
    if found.high < 0:
        return f"{name} - {base}: {interval}: **worse**."
    return f"{name} - {base}: {interval}: not told apart."


def _economics(tiers: dict[str, Results], written: _Written) -> str:
    parts = ["## What does the store cost and save?", _quoted(written.predictions["economics"])]
    for tier in _TIERS:
        results = tiers[tier.name]
        if stores := results.made.get("stores", {}):
            parts += [f"In the {tier.name} tier:", _stores(stores), _break_even(results, stores)]
    if len(parts) == 2:
        parts.append("Not run.")
    return "\n\n".join([*parts, written.comments.get("economics", "")])


def _stores(stores: dict[str, Any]) -> str:
    rows = [
        (
            name, f"{said['spec']['codec']}", f"{said['job']['images']:,}", f"{said['job']['bytes_written'] / 1e6:.0f}",
            f"{said['job']['predicted_bytes'] / 1e6:.0f}", f"{said['job']['teacher_seconds']:.0f}",
            f"{said['job']['seconds']:.0f}",
            "" if said["plan"]["seconds"] is None else f"{said['plan']['seconds']:.0f}",
        )
        for name, said in stores.items()
    ]  # fmt: skip
    header = ("Store", "Codec", "Views cached", "MB", "MB by plan", "Seconds in teacher", "Seconds of job", "by plan")
    return _table(header, rows)


def _break_even(results: Results, stores: dict[str, Any]) -> str:
    live = runs_of(results.questions.get("views", {"settings": {}}), "ScaleKD, live")
    per_run = mean(run.teacher_seconds for run in live) if live else 0
    if not per_run or "int8" not in stores:
        return "Break-even: no live run is finished."
    job = stores["int8"]["job"]
    share = job["teacher_seconds"] / job["images"] * results.made["tier"]["images"] * results.made["tier"]["views"]
    return (
        f"A live run of {live[0].steps:,} steps spent {per_run:.0f} s in the teacher (mean of {len(live)}). "
        f"Caching {results.made['tier']['views']} views of every image takes {share:.0f} s in the teacher, so the "
        f"store has paid for itself after {share / per_run:.1f} students of one teacher. Both were timed on a busy "
        "machine."
    )


def _spectra(cpu: Results, docs: Path) -> str:
    found: dict[str, Sequence[float]] = cpu.made.get("spectra", {})
    energies = {f"{STORES[store].teacher} teacher": values for store, values in found.items()}
    if not energies:
        return ""
    spectrum_figure(docs / FIGURES / "study-spectrum.svg", energies)
    ratios = ", ".join(f"{values[0] / values[1]:.1f} ({name})" for name, values in energies.items())
    return f"""## Where is the energy of the teacher's final map?

Orthonormal DCT of each channel's map, mean magnitude over {SPECTRUM_ROWS} images and all channels; frequencies are
grouped by the larger of their two indices. The direct component over the next group: {ratios}. The alternative view
path of DFM leaves out the direct component.

![Energy by spatial frequency]({FIGURES}/study-spectrum.svg)"""


def _gpu(gpu: Results) -> str:
    sizes = GPU
    state = f"{len(gpu.questions)} questions have results" if gpu.questions else "**It was never run.**"
    return f"""## The gpu tier

`make study-gpu DATA=cifar100 MINUTES=12` runs as many of the same questions as fit, in the order above, on one GPU, and
continues when it is called again: {len(sizes.seeds)} seeds, {sizes.epochs} epochs of the first {sizes.train_tars} tars,
views {", ".join(map(str, sizes.view_counts))}, {sizes.processes} runs at a time, teachers of
{sizes.teachers["strong"].epochs} epochs. {state} Its results go to `benchmarks/study/results/gpu`."""


def _difference(found: dict[str, Any], name: str, base: str) -> Difference | None:
    return paired_difference(runs_of(found, name), runs_of(found, base), CONFIDENCE)


def _of(results: Results, question: Question) -> dict[str, Any]:
    return results.questions.get(question.name, {"settings": {}})


def _quoted(prediction: str) -> str:
    return "> Predicted: " + prediction.replace("\n", "\n> ")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    ruler = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))


def _sections(path: Path) -> dict[str, str]:
    """Texts by their ``## `` heading."""
    parts = re.split(r"^## (.+)$", path.read_text(), flags=re.MULTILINE)[1:]
    return {name.strip(): text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}
