"""Store card: a README that describes a store, for publishing it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.filesize import decimal

from feature_store.backends.files import write_text
from feature_store.errors import InputError
from feature_store.tools.info import summarise
from feature_store.tools.label_check import teacher_accuracy
from feature_store.tools.options import make_folder
from feature_store.tools.row_subset import pick, sampled_shards
from feature_store.tools.terminal import printable

if TYPE_CHECKING:
    from feature_store.store import Store

README, PAGE = "README.md", "index.html"
SERVICE = "http://127.0.0.1:8000"
_ROWS = 64  # rows that the codecs' errors are stated for
_CLASSES = 20  # class names listed
_NAMES = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#"})


class Code(NamedTuple):
    """A block of code: its language (``python`` or ``sh``) and text."""

    language: str
    text: str


class Way(NamedTuple):
    """One way to open the store: its heading and what to run, in order."""

    title: str
    blocks: tuple[Code, ...]


def write_card(store: "Store", out: Path, *, url: str | None = None) -> list[Path]:
    """Write a store's README.md and its page; gives their paths.

    Args:
        store: The store, with at least one committed unit.
        out: Folder for both; made if needed.
        url: Where readers will find the store; default where it is now.

    Raises:
        InputError: No unit is committed, jinja2 is missing, or out is a file.
    """
    summary = summarise(store)
    if not summary["committed_rows"]:
        raise InputError(f"{store.objects.url} has no committed row, so there is nothing to publish; finish the store")
    where = url or store.objects.url
    facts, errors, ways = _facts(summary, store), codec_errors(store), ways_to_open(store, where)
    text = {"title": f"Features of {summary['teacher']['name']}", "facts": facts, "errors": errors, "ways": ways}
    make_folder(out, "--out")
    write_text(out / README, _markdown(**text))
    write_text(out / PAGE, _template().render(text))
    return [out / README, out / PAGE]


def codec_errors(store: "Store") -> dict[str, str]:
    """Stated error of each tap and of the logits, relative to the values' root mean square, over some random rows."""
    rng = np.random.default_rng(0)
    batch = store.source().read(pick(np.concatenate(sampled_shards(store, rng)), _ROWS, rng))
    found = {}
    for name, codec in store.layout.codecs.items():
        values = np.asarray(batch.taps.get(name, batch.logits), np.float32)
        bound = np.broadcast_to(codec.max_error(values), values.shape)
        bound = bound[np.isfinite(bound)]
        rms = float(np.sqrt(np.mean(np.square(values[np.isfinite(values)]))))
        worst = float(bound.max()) if bound.size else 0.0
        mean = float(bound.mean()) if bound.size else 0.0
        found[name] = f"at most {worst:.2g} a value, {mean:.2g} on average; the values' root mean square is {rms:.2g}"
    return found


def ways_to_open(store: "Store", url: str) -> list[Way]:
    """Code that opens the store, each way by itself."""
    record = store.committed.records[0]
    key, view = store.keys(record.unit)[int(record.readable[0])], record.first_view
    tap = next(iter(store.manifest.taps))
    array = store.layout.codecs[tap].array_path("")
    row = record.unit * store.manifest.capacity + int(record.readable[0])
    quoted = shlex.quote(url)
    python = (
        "from feature_store import open_store\n\n"
        f"store = open_store({url!r})\n"
        f"rows = store.rows([{key!r}], view={view})  # by sample key\n"
        f"features = store.source([{tap!r}]).read(rows).taps[{tap!r}]"
    )
    client = (
        "import zarr\n\n"
        f"array = zarr.open_array({f'{url}/{array}'!r}, mode='r')\n"
        f"values = array[{view}, {row}]  # as stored; the codec is described in FORMAT.md"
    )
    service = (
        "from feature_store import connect\n\n"
        f"client = connect({SERVICE!r})\n"
        f"features = client.rows([{key!r}], view={view})[{tap!r}]"
    )
    return [
        Way("In Python", (Code("python", python),)),
        Way("With a zarr client", (Code("python", client),)),
        Way(
            "On the command line", (Code("sh", f"feature-store info {quoted}\nfeature-store verify {quoted} --quick"),)
        ),
        Way(
            "As a copy of your own", (Code("sh", f"feature-store copy {quoted} my-copy\nfeature-store verify my-copy"),)
        ),
        Way(
            "As a service, for notebooks and trainers on other machines",
            (Code("sh", f"teacher-service serve --store {quoted} --port 8000"), Code("python", service)),
        ),
    ]


def _facts(summary: dict[str, Any], store: "Store") -> dict[str, str]:
    teacher, split, policy = summary["teacher"], summary["split"], summary["policy"]
    inputs, units = store.manifest.inputs, store.manifest.tars
    classes = () if inputs is None else inputs.classes
    unlabelled = sum(int((store.labels(unit) < 0).sum()) for unit in store.committed.units)
    facts = {
        "teacher": f"{teacher['name']} {teacher['model_kwargs'] or ''}".strip(),
        "weights (sha256)": teacher["weights_sha256"],
        "input": f"{_hw(teacher['input_size'])} pixels, mean {teacher['mean']}, std {teacher['std']}",
        "computed in": teacher["compute_dtype"],
        **{f"tap {name}": _tap(name, tap, split) for name, tap in summary["taps"].items()},
        "logits": f"{teacher['num_classes']} classes, codec {codec}" if (codec := summary["logits_codec"]) else "none",
        "views": f"{summary['views']} a sample, policy {policy['name']}, {_hw(policy['size'])} pixels, "
        f"seed {summary['seed']}",
        "images": f"{summary['samples']:,} in {summary['units']:,} units ({units[0].name}...)",
        "found in": "webdataset tars" if inputs is None else inputs.format,
        "rows": f"{summary['committed_rows']:,} of {summary['samples'] * summary['views']:,} committed",
        "samples without a label": f"{unlabelled:,} (quarantined ones included)",
        "teacher's top-1 on the labels": str(teacher_accuracy(store) or "unknown: no logits or no labels"),
        "quarantined": f"{len(summary['quarantined']):,} samples that could not be used",
        "size": f"{decimal(summary['bytes'])} in {summary['objects']:,} objects",
        "licence": summary["licence"] or "not stated: ask the store's author before you use it",
        "manifest (sha256)": summary["fingerprint"],
    }
    if classes:
        more = f" and {len(classes) - _CLASSES} more" if len(classes) > _CLASSES else ""
        facts["classes"] = f"{len(classes)}: {', '.join(classes[:_CLASSES])}{more}"
    return {name: printable(str(value)) for name, value in facts.items()}


def _tap(name: str, tap: dict[str, Any], split: dict[str, Any]) -> str:
    grid = {"stage4": split["output_grid"], "stage3": split["input_grid"]}.get(name)
    shape = "" if grid is None else f" ({_hw(grid)} grid)"
    return f"{tap['tokens']} tokens{shape} of {tap['channels']} channels, codec {tap['codec']}"


def _hw(size: list[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _markdown(title: str, facts: dict[str, str], errors: dict[str, str], ways: list[Way]) -> str:
    lines = [f"# {title.translate(_NAMES)}", "", _INTRODUCTION, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value.translate(_NAMES)} |" for name, value in facts.items()]
    lines += ["", "## Error of the codecs", "", _ERRORS, "", "| value | stated error |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in errors.items()]
    lines += ["", "## How to open it", "", _INSTALL, ""]
    for way in ways:
        lines += [f"### {way.title}", ""]
        for language, code in way.blocks:
            lines += [f"```{language}", code, "```", ""]
    return "\n".join(lines)


_INTRODUCTION = (
    "Features of a frozen teacher over augmented views, written by scalekd-cache (store format v1). Every row that a "
    "commit record covers is proven by checksums; the teacher's later blocks, if it has any, are in the store."
)
_ERRORS = f"Error bounds of the codecs, from {_ROWS} random rows:"
_INSTALL = (
    "`pip install scalekd-cache`, and `'scalekd-cache[s3]'` for buckets. Each example is independent of the others."
)


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise InputError("the card's page needs jinja2; pip install 'scalekd-cache[plot]'") from error
    environment = Environment(autoescape=True, loader=PackageLoader("feature_store.tools", ""))
    environment.globals.update(introduction=_INTRODUCTION, about_errors=_ERRORS, install=_INSTALL.replace("`", ""))
    return environment.get_template("card.html")
