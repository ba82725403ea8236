"""Size, error, speed of each codec on a store's features."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from feature_store.errors import InputError
from feature_store.format.arrays import decode_row, encode_row
from feature_store.format.codecs.base import ZSTD_SUFFIX
from feature_store.format.codecs.bound import LOGITS, BoundCodec
from feature_store.format.codecs.registry import CODECS, get_codec
from feature_store.tools.loss_terms import FEATURE_TERMS, Term, distillation, softmax, without_mean
from feature_store.tools.row_subset import pick, sampled_shards
from feature_store.tools.terminal import Console

if TYPE_CHECKING:
    from feature_store.store import Store

BATCH = 64
_CALIBRATION_ROWS = 256
_REPEATS = 3
_LOGITS_CODECS = ("f32", "f16", "bf16", "top100", "top20", "top10", "top5")


@dataclass(frozen=True)
class TermError:
    """Error of a loss term and of its gradient, relative to their values with the exact features.

    Attributes:
        loss: Of the term; the worst of the batches.
        gradient: Of the gradient with respect to the student's side, by L2 norm; the worst of the batches.
    """

    loss: float
    gradient: float


@dataclass(frozen=True)
class CodecReport:
    """One codec on one stored value.

    Attributes:
        codec: Its name.
        bytes_per_view: Mean bytes of an encoded row; index and checksums, 24 bytes per array, come on top.
        relative_error: L2 norm of the values' error, relative to theirs; of the probabilities for logits.
        relative_error_without_mean: The same after each channel's mean over tokens is taken away; taps of more than
            one token only, as is the alternative view path's term.
        of_stated: Largest error of a value as part of what the codec states for it; None for top-k.
        encode_mb_per_s: Megabytes of f16 values encoded per second, one thread, compression included.
        decode_mb_per_s: The same for decoding with numpy.
        terms: Errors by stand-in for a student and by loss term.
    """

    codec: str
    bytes_per_view: float
    relative_error: float
    relative_error_without_mean: float | None
    of_stated: float | None
    encode_mb_per_s: float
    decode_mb_per_s: float
    terms: dict[str, dict[str, TermError]]


def bench_codecs(store: "Store", names: Sequence[str] = (), rows: int = 512, seed: int = 0) -> dict[str, Any]:
    """Measure codecs on rows of a store whose values are stored as floats.

    Statistics are learnt from the first rows of the first unit, as a cache job would; errors are measured on others.
    There is no student here; two stand-ins take its place: ``early`` is noise, ``late`` the teacher's own feature
    plus noise of the same spread in every channel.

    Args:
        store: The store.
        names: Tap codecs; empty for all.
        rows: Rows to measure on.
        seed: Chooses them.

    Returns:
        ``{"store", "rows", "taps": {tap: {"shape", "codecs": [CodecReport]}}, "logits": ...}`` as JSON.

    Raises:
        InputError: The store holds too few rows, or quantised values.
    """
    first, others = _choose(store, rows, np.random.default_rng(seed))
    for name, tap in store.manifest.taps.items():
        if not get_codec(tap.codec).plain:
            raise InputError(
                f"tap {name} of {store.objects.url} is stored as {tap.codec}: errors would be measured against values "
                "that have some already; cache some units with --tap-codec f32 (or f16) and measure on those"
            )
    source = store.source()
    sample, batch = source.read(first), source.read(others)
    codecs = [get_codec(name) for name in names] or [get_codec(n + z) for n in CODECS for z in ("", ZSTD_SUFFIX)]
    report: dict[str, Any] = {
        "store": store.objects.url,
        "rows": len(others),
        "calibration_rows": len(first),
        "taps": {},
    }
    for tap, values in batch.taps.items():
        bound = [BoundCodec.learn(tap, codec, sample.taps[tap].astype(np.float32)) for codec in codecs]
        terms = {name: term for name, term in FEATURE_TERMS.items() if name != "alternative" or _has_mean(values)}
        report["taps"][tap] = _measure_all(bound, values.astype(np.float32), terms, seed)
    if batch.logits is not None:
        classes = batch.logits.shape[1:]
        fitting = [
            get_codec(name) for name in _LOGITS_CODECS if not name.startswith("top") or int(name[3:]) < classes[0]
        ]
        bound = [BoundCodec(LOGITS, codec, classes) for codec in fitting]
        report["logits"] = _measure_all(bound, batch.logits.astype(np.float32), {"kd": distillation}, seed)
    return report


def measure(
    codec: BoundCodec, values: np.ndarray, terms: Mapping[str, Callable[..., Term]], students: Mapping[str, np.ndarray]
) -> CodecReport:
    """One codec on rows [n, *shape] of float32 values; students [n, *shape] stand in for a student's side."""
    decoded, size, encode_seconds, decode_seconds = _round_trip(codec, values)
    error = np.abs(decoded - values)
    stated = np.concatenate([np.broadcast_to(codec.max_error(part), part.shape) for part in _batches(values)])
    megabytes = values.size * 2 / 1e6
    centred = _relative(without_mean(decoded), without_mean(values)) if _has_mean(values) else None
    states_all = codec.codec.plain or values.ndim == 3  # top-k states no error of the classes it drops
    return CodecReport(
        codec=codec.codec.name,
        bytes_per_view=size / len(values),
        relative_error=_relative(decoded, values) if values.ndim == 3 else _relative(softmax(decoded), softmax(values)),
        relative_error_without_mean=centred,
        of_stated=_part_of_stated(error, stated) if states_all else None,
        encode_mb_per_s=megabytes / encode_seconds,
        decode_mb_per_s=megabytes / decode_seconds,
        terms={
            kind: {name: _term_error(term, student, values, decoded) for name, term in terms.items()}
            for kind, student in students.items()
        },
    )


def _measure_all(
    codecs: Sequence[BoundCodec], values: np.ndarray, terms: Mapping[str, Callable[..., Term]], seed: int
) -> dict[str, Any]:
    students = stand_ins(values, np.random.default_rng(seed))
    reports = [measure(codec, values, terms, students) for codec in codecs]
    return {"shape": list(values.shape[1:]), "codecs": [asdict(report) for report in reports]}


def stand_ins(values: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Student outputs to compute losses with: ``early`` is noise, ``late`` is the teacher plus noise of its spread."""
    noise = rng.standard_normal(values.shape, np.float32)
    spread = values.std(axis=tuple(range(values.ndim - 1)))
    return {"early": noise, "late": values + spread * rng.standard_normal(values.shape, np.float32)}


def _choose(store: "Store", rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows to calibrate on, and others to measure on."""
    found = sampled_shards(store, rng)
    first = found[0][: min(_CALIBRATION_ROWS, sum(map(len, found)) // 2)]
    others = np.concatenate(found)[len(first) :]
    if not len(first) or not len(others):
        raise InputError(
            f"{store.objects.url} has too few committed rows to measure on; cache at least one unit of two samples"
        )
    return first, pick(others, rows, rng)


def _round_trip(codec: BoundCodec, values: np.ndarray) -> tuple[np.ndarray, int, float, float]:
    """Decoded values, stored bytes, and the best seconds to encode and to decode."""
    specs = codec.arrays
    runs = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        parts = codec.encode(values)
        packed = {s: [encode_row(specs[s], row) for row in part] for s, part in parts.items() if specs[s].zstd}
        encoded = time.perf_counter()
        for suffix, stored in packed.items():
            for row, target in zip(stored, parts[suffix], strict=True):
                decode_row(specs[suffix], row, target.reshape(-1).view(np.uint8), specs[suffix].path)
        decoded = codec.decode(parts)
        size = sum(sum(map(len, packed[s])) if s in packed else part.nbytes for s, part in parts.items())
        runs.append((decoded, size, encoded - begun, max(time.perf_counter() - encoded, 1e-9)))
    decoded, size, *_ = runs[0]
    return decoded, size, min(run[2] for run in runs), min(run[3] for run in runs)


def _term_error(term: Callable[..., Term], student: np.ndarray, exact: np.ndarray, decoded: np.ndarray) -> TermError:
    losses, gradients = [], []
    for p, t, q in zip(*map(_batches, (student, exact, decoded)), strict=True):
        (loss, gradient), (other, others) = term(p, t), term(p, q)
        losses.append(abs(other - loss) / abs(loss))
        gradients.append(_relative(others, gradient))
    return TermError(max(losses), max(gradients))


def _has_mean(values: np.ndarray) -> bool:
    return values.ndim == 3 and values.shape[1] > 1


def _batches(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[start : start + BATCH] for start in range(0, len(values), BATCH))


def _relative(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm((got - exact).ravel()) / np.linalg.norm(exact.ravel()))


def _part_of_stated(error: np.ndarray, stated: np.ndarray) -> float:
    return float(np.divide(error, stated, out=np.zeros_like(stated), where=error > 0).max())


def print_codecs(report: dict[str, Any], console: Console) -> None:
    """Human form of a report."""
    tables = {**{f"tap {name}": tap for name, tap in report["taps"].items()}, "logits": report.get("logits")}
    for title, measured in tables.items():
        if measured is not None:
            console.print(_table(f"{title} {measured['shape']}, {report['rows']} rows", measured))
    console.print(
        "Errors are relative; loss and gradient: the worst of all terms, batches and stand-ins for a student "
        "(--json has each). Speeds: MB of f16 values per second, one thread."
    )


def _table(title: str, measured: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("codec", "bytes/view", "of f16", "values", "loss", "gradient", "encode", "decode"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    f16 = 2 * int(np.prod(measured["shape"]))
    for codec in measured["codecs"]:
        errors = [error for terms in codec["terms"].values() for error in terms.values()]
        table.add_row(
            codec["codec"],
            f"{codec['bytes_per_view']:,.0f}",
            f"{codec['bytes_per_view'] / f16:.0%}",
            f"{codec['relative_error']:.1e}",
            f"{max(error['loss'] for error in errors):.1e}",
            f"{max(error['gradient'] for error in errors):.1e}",
            f"{codec['encode_mb_per_s']:,.0f}",
            f"{codec['decode_mb_per_s']:,.0f}",
        )
    return table
