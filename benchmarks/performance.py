"""docs/performance.md, made from the recorded results of all benchmarks."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"
Row = tuple[str, ...]
_PROGRAMS = ("Program", "Images/s", "Ratio", "Peak memory", "Stored per view")
_RATES = ("Work", "This project", "Floor", "Rate", "Ratio to the floor")


@dataclass(frozen=True)
class Section:
    """A table of the page.

    Attributes:
        title: Its heading.
        file: The recorded result, a JSON file of RESULTS.
        command: Command that measures it again.
        text: The comparison and its limits.
        header: The table's columns.
        rows: Its rows, from the file's content.
        machine: Where it was measured, from the file's content.
    """

    title: str
    file: str
    command: str
    text: str
    header: Row
    rows: Callable[[Any], Iterable[Row]]
    machine: Callable[[Any], str]


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write performance.md; a section without its file says so.

    Args:
        results: Folder of the recorded results.
        docs: Folder that gets the page.
    """
    parts = [_OPENING, *(_section(section, results / section.file) for section in SECTIONS)]
    (docs / "performance.md").write_text("\n\n".join(parts) + "\n")


def _section(section: Section, path: Path) -> str:
    parts = [f"## {section.title}", f"`{section.command}`. {section.text}"]
    if not path.exists():
        return "\n\n".join([*parts, "Not recorded."])
    found = json.loads(path.read_text())
    ruler = ["---"] + ["---:"] * (len(section.header) - 1)
    rows = [section.header, tuple(ruler), *section.rows(found)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    if len(rows) == 2:
        return "\n\n".join([*parts, "Not measured."])
    return "\n\n".join([*parts, table, f"{section.machine(found)} Recorded in `benchmarks/results/{section.file}`."])


def _store_rows(found: dict[str, Any]) -> Iterator[Row]:
    for work, sides in found["reading"].items():
        yield _rate_row(f"read, {work}", sides)
    yield _rate_row("write, with fsync", found["writing"])


def _rate_row(work: str, sides: dict[str, dict[str, float]]) -> Row:
    """A row of work whose sides are this store and floors; the floor is the side with ratio 1."""
    floor = next(name for name, side in sides.items() if side["ratio"] == 1.0)
    rate, bound = sides["store"], sides[floor]
    return work, f"{rate['GB_per_s']:.2f} GB/s", floor, f"{bound['GB_per_s']:.2f} GB/s", f"{rate['ratio']:.2f}"


def _peer_rows(found: dict[str, Any]) -> Iterator[Row]:
    for key, label in (("peers", ""), ("peers, an earlier run", " (an earlier run)")):
        for name, works in found.get(key, {}).items():
            for work, sides in works.items():
                peer, store = sides["peer"]["GB_per_s"], sides["store"]["GB_per_s"]
                yield name + label, work, f"{peer:.2f} GB/s", f"{store:.2f} GB/s", f"{store / peer:.1f}"


def _http_rows(found: dict[str, Any]) -> Iterator[Row]:
    for work, sides in found["rows"].items():
        rate, floor = sides["service"], sides["raw socket"]
        yield (
            f"rows, {work}", f"{rate['GB_per_s']:.2f} GB/s", "raw socket", f"{floor['GB_per_s']:.2f} GB/s",
            f"{rate['ratio']:.2f}",
        )  # fmt: skip
    for name, sides in found.get("peers", {}).items():
        if "times_faster" not in sides:
            continue  # the same peers over nginx
        rate, peer = sides["service"]["GB_per_s"], sides[name]["GB_per_s"]
        yield "rows, against a peer", f"{rate:.2f} GB/s", name, f"{peer:.2f} GB/s", f"{sides['times_faster']:.1f}"
    training = found["training"]["seconds"]
    ratio = training["store"] / training["service"]
    yield (
        "a training step",
        f"{training['service']:.2f} s",
        "fed by the store",
        f"{training['store']:.2f} s",
        _two(ratio),
    )
    live = found["live"]["views_per_s"]
    bare = live["bare forward"]
    yield (
        "live teacher, 32 clients", f"{live['service']:.1f} views/s", "bare forward pass", f"{bare:.1f} views/s",
        _two(live["service"] / bare),
    )  # fmt: skip


def _step_rows(found: dict[str, Any]) -> Iterator[Row]:
    seconds, loss = found["seconds"], found["loss"]
    pairs = {
        "store-fed over in-memory features": ("store", "memory", found["store_over_memory"], None),
        "live teacher over store-fed": ("live", "store", found["live_over_store"], found["live_over_store_from_flops"]),
    }
    for name, (over, under, ratio, predicted) in pairs.items():
        yield (
            name,
            f"{seconds[over]:.3f} s",
            f"{seconds[under]:.3f} s",
            _two(ratio),
            "" if predicted is None else _two(predicted),
        )
    for key, name in (("official_style", "frozen weights skipped"), ("official_style_unfrozen", "nothing skipped")):
        yield (
            f"loss written out plainly, {name}, over ours", f"{loss['seconds'][key]:.3f} s",
            f"{loss['seconds']['ours']:.3f} s", _two(loss[f"{key}_over_ours"]),
            _two(loss[f"{key}_over_ours_from_flops"]),
        )  # fmt: skip


def _teacher_rows(found: dict[str, Any]) -> Iterator[Row]:
    for name, one in found.items():
        yield (
            name, one["setting"]["student"], f"{one['seconds']['store']:.2f} s", f"{one['seconds']['live']:.2f} s",
            _two(one["live_over_store"]), _two(one["live_over_store_from_flops"]),
        )  # fmt: skip


def _contender_rows(found: dict[str, Any]) -> Iterator[Row]:
    for name, one in found["contenders"].items():
        yield (
            name, f"{one['images_per_second']:.1f}", _two(one["seconds_over_store"]),
            f"{one['peak_memory_bytes'] / 1e9:.2f} GB", f"{one['store_bytes_per_view'] / 1e3:.0f} kB",
        )  # fmt: skip


def _contender_machine(found: dict[str, Any]) -> str:
    said = found["setting"]
    left_out = "".join(f" Left out: {name} ({why})." for name, why in found["left_out"].items())
    return (
        f"{said['teacher']} to {said['student']}, batch {said['batch']}, float32, {said['device']}, "
        f"{said['repeats']} repeats, torch {said['torch']}, timm {found['timm']}.{left_out}"
    )


def _preset_rows(found: dict[str, Any]) -> Iterator[Row]:
    for name, one in found.items():
        yield (
            name, f"{one['student_alone']:.0f}", f"{one['step']:.0f}", f"{one['teacher']:.0f}",
            _two(one["live_over_store"]), f"{one['step_separable']:.0f}",
        )  # fmt: skip


def _cache_rows(found: dict[str, Any]) -> Iterator[Row]:
    one, two = found["run_1"], found["run_2"]
    resident = one["resident"]
    yield (
        "pixels in memory", f"{resident['pipeline']:.2f} images/s", "bare forward pass",
        f"{resident['bare']:.2f} images/s", _two(resident["ratio"]),
    )  # fmt: skip
    for name, sides in two["jpeg"].items():
        if not isinstance(sides, dict):
            continue
        slower = min(("bare", "decode"), key=lambda side: sides[side])
        label = {"bare": "bare forward pass", "decode": "decoding alone"}[slower]
        yield (
            f"from JPEG files, {name}", f"{sides['pipeline']:.0f} images/s", label, f"{sides[slower]:.0f} images/s",
            _two(sides["ratio"]),
        )  # fmt: skip
    views = two["views"]
    yield (
        "eight views of one decode", f"{views['at_once']:.0f} views/s", "eight passes",
        f"{views['one_by_one']:.0f} views/s", _two(views["ratio"]),
    )  # fmt: skip
    plan = one["plan"]
    yield (
        "the plan's seconds",
        f"{plan['seconds_predicted']:.0f} s",
        "the job's",
        f"{plan['seconds']:.0f} s",
        _two(plan["time_ratio"]),
    )


def _tar_rows(found: dict[str, Any]) -> Iterator[Row]:
    headers = f"{found['headers_seconds']:.1f} s"
    yield "first start", f"{found['first_seconds']:.1f} s", "headers alone", headers, _two(found["first_over_headers"])
    later = found["second_seconds"]
    yield "later starts", f"{later:.2f} s", "headers alone", headers, f"{later / found['headers_seconds']:.3f}"


def _codec_rows(found: dict[str, Any]) -> Iterator[Row]:
    for one in found["swin"]["features"]["taps"]["stage4"]["codecs"]:
        late = one["terms"]["late"]
        worst = max(term["loss"] for term in late.values())
        gradient = max(term["gradient"] for term in late.values())
        yield (
            one["codec"], f"{one['bytes_per_view']:,.0f}", f"{one['relative_error']:.2g}", f"{worst:.1e}",
            f"{gradient:.1e}", f"{one['encode_mb_per_s']:,.0f}", f"{one['decode_mb_per_s']:,.0f}",
        )  # fmt: skip


def _two(value: float) -> str:
    return f"{value:.2f}"


def _settings(found: dict[str, Any]) -> str:
    said, software = found["settings"], found["settings"]["software"]
    size = f"{said['rows']:,} rows, {said['bytes'] / 1e9:.1f} GB, batches of {said['batch']}"
    versions = ", ".join(f"{name} {software[name]}" for name in ("python", "numpy", "torch") if name in software)
    return f"{said['cores']} cores ({said['machine']}), load {said['load_before']:.1f} before; {size}; {versions}."


def _step_machine(found: dict[str, Any]) -> str:
    said = found["setting"]
    return (
        f"{said['teacher']} to {said['student']}, batch {said['batch']}, {said['device']}, {said['threads']} threads, "
        f"{said['repeats']} repeats. Peak memory {found['peak_memory_bytes']['store'] / 1e9:.1f} GB store-fed, "
        f"{found['peak_memory_bytes']['live'] / 1e9:.1f} GB live."
    )


def _cache_machine(found: dict[str, Any]) -> str:
    said = found["run_1"]["machine"]
    return f"{said['cpus']} cores, torch {said['torch']}; no GPU yet."


def _codec_machine(found: dict[str, Any]) -> str:
    teacher, said = found["swin"]["teacher"], found["swin"]["machine"]
    return (
        f"Features [16, 256] of a small Swin trained on CIFAR-100 (top-1 {teacher['top1']} %); {said['cpus']} cores, "
        f"torch {said['torch']}."
    )


_OPENING = """# Performance

<!-- made by: python -m benchmarks.performance, from benchmarks/results -->

Every recorded benchmark beside its floor: what the hardware, a raw socket or the bare teacher does with the same bytes
in the same run. Rates alone say little about another machine; ratios carry over better. `make bench` measures again
what needs neither other software nor images; `make bench-report` makes this page. What was predicted, and where a
target was missed: [benchmarks](../benchmarks/README.md). What distilled students reach: [results](results.md)."""

_STORE = "2.1 GB of rows of 49 x 1536 float16"
SECTIONS = (
    Section(
        "Reading and writing a store", "store.json", "python -m benchmarks.store",
        f"{_STORE}; the floor moves the same bytes with the fewest system calls and checks nothing, this store "
        "compares the crc32c of every row.",
        _RATES, _store_rows, _settings,
    ),
    Section(
        "Other stores", "store.json", "python -m benchmarks.store --peers",
        f"{_STORE}, each peer with its own format; the store's rate is from the same run as the peer's.",
        ("Peer", "Order", "Peer's rate", "This store", "This store over peer"), _peer_rows, _settings,
    ),
    Section(
        "Over HTTP", "http.json", "python -m benchmarks.http",
        "Client and server share one machine, over loopback. More runs of rows are in "
        "`benchmarks/results/http_rows.json` and `http_sides.json`.",
        _RATES, _http_rows, _settings,
    ),
    Section(
        "A training step", "step.json", "python -m benchmarks.step",
        "One step of ScaleKD from a store, from memory and with a live teacher; and its loss against the same formulas "
        "written out plainly.",
        ("Comparison", "Numerator", "Denominator", "Ratio", "Ratio by FLOPs"), _step_rows, _step_machine,
    ),
    Section(
        "A training step beside other programs", "peers.json", "python -m benchmarks.peers --released CHECKOUT",
        "Whole steps, images decoded from JPEG by the same code: ScaleKD's released code, timm's distillation and "
        "torchdistill, all of which run the teacher, beside this project with the teacher's features from a store and "
        "live. Ratio: seconds of a step over those of this project's store-fed step of the same method.",
        _PROGRAMS, _contender_rows, _contender_machine,
    ),
    Section(
        "The same with a DINOv2 teacher", "peers_dino.json",
        "python -m benchmarks.peers --teacher vit_small_patch14_dinov2 --teacher-kwargs ...",
        "With LightlyTrain, whose teachers are DINO models: its dense distillation of two blocks, of mixed images.",
        _PROGRAMS, _contender_rows, _contender_machine,
    ),
    Section(
        "Steps with larger teachers", "step_teachers.json", "python -m benchmarks.step --teacher NAME",
        "Store-fed against live.",
        ("Teacher", "Student", "Store-fed", "Live", "Ratio", "Ratio by FLOPs"), _teacher_rows,
        lambda found: "CPU, batch 4, two threads, five repeats.",
    ),
    Section(
        "FLOPs of the presets", "preset_flops.json", "python -m benchmarks.preset_flops",
        "GFLOPs of one image's training step, counted, not timed.",
        ("Preset", "Student alone", "Store-fed", "Live teacher adds", "Live over store-fed", "Store-fed, separable"),
        _preset_rows, lambda found: "Counted on CPU.",
    ),
    Section(
        "Caching", "cache.json", "python -m benchmarks.cache --tars ...",
        "The cache job against its slower half; one decode worker and one thread for the teacher.",
        ("Work", "This project", "Compared with", "Rate", "Ratio"), _cache_rows,
        _cache_machine,
    ),
    Section(
        "Opening many tars", "tar_index.json", "python -m benchmarks.tar_index", "Tars of 1,000 members.",
        ("Work", "This project", "Floor", "Seconds", "Ratio to the floor"), _tar_rows,
        lambda found: f"{found['cores']} cores, {found['tars']:,} tars, {found['samples']:,} samples.",
    ),
    Section(
        "Codecs", "codecs.json", "python -m benchmarks.codecs --tars ...",
        "Bytes and error of each codec on the features, and what the error does to a loss term and its gradient after "
        "some training (the worse of both view paths, relative).",
        ("Codec", "Bytes a view", "Relative error", "Loss term", "Gradient", "Encode MB/s", "Decode MB/s"), _codec_rows,
        _codec_machine,
    ),
)  # fmt: skip


if __name__ == "__main__":
    tyro.cli(write_page)
