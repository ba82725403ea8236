"""What a store claims about itself: the manifest, kept in the root group's attributes."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from feature_store.errors import InputError, MismatchError
from feature_store.views import ViewPolicy

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TeacherInfo:
    """Which frozen model wrote the features, and how pixels reach it.

    Attributes:
        name: timm model name.
        model_kwargs: Extra arguments of ``timm.create_model`` (image size, depth...).
        weights_sha256: Hash of the full state dict, see ``feature_store.teacher.model.weights_sha256``.
        input_size: Height and width the teacher takes, in pixels.
        mean: Normalisation mean per RGB channel on the 0..1 scale (timm data config).
        std: Normalisation standard deviation per RGB channel on the 0..1 scale.
        num_classes: Width of the logits; 0 if the teacher has no classifier.
        compute_dtype: dtype of the forward pass, e.g. ``float32`` or ``bfloat16`` (autocast).
    """

    name: str
    model_kwargs: dict[str, Any]
    weights_sha256: str
    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int
    compute_dtype: str


@dataclass(frozen=True)
class SplitInfo:
    """Where the teacher is cut, and what its later blocks need.

    Attributes:
        family: ``swin`` or ``vit``.
        depth: Number of blocks in the later part (Swin: those of stage 4).
        input_dim: Channels of the stage-3 output.
        input_grid: (H, W) of the stage-3 output.
        output_dim: Channels of the final feature map.
        output_grid: (H, W) of the final feature map.
        prefix_tokens: Number of class and register tokens the later blocks need beside the grid.
        prefix: Where those come from: ``none`` (there are none) or ``cached`` (tap ``stage3_prefix``).
    """

    family: str
    depth: int
    input_dim: int
    input_grid: tuple[int, int]
    output_dim: int
    output_grid: tuple[int, int]
    prefix_tokens: int
    prefix: str


@dataclass(frozen=True)
class TapInfo:
    """Shape and storage of one tap: N tokens of C channels per row, as ``codec``."""

    tokens: int
    channels: int
    codec: str


@dataclass(frozen=True)
class TarInfo:
    """One input tar = one unit. ``header_sha256`` covers member names and sizes, not contents."""

    name: str
    samples: int
    header_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that must agree between the store, the teacher, the tars and the trainer.

    Attributes:
        teacher: The frozen model.
        split: Where it is cut.
        blocks_sha256: Hash of the later blocks' weights kept in the store.
        taps: Stored taps by name.
        logits_codec: Codec of the logits; None for a teacher without a classifier.
        policy: What the views were drawn from.
        seed: Seed of the views.
        num_views: Views per sample, V.
        tars: Input tars; a tar's index is its unit.
        capacity: Rows per unit, S: the largest number of samples in a tar.
        key_width: Bytes per stored sample key.
        software: Versions that created the store; informative.
        licence: Note of the data set's licence; informative.
        format_version: Of FORMAT.md.
    """

    teacher: TeacherInfo
    split: SplitInfo
    blocks_sha256: str
    taps: dict[str, TapInfo]
    logits_codec: str | None
    policy: ViewPolicy
    seed: int
    num_views: int
    tars: tuple[TarInfo, ...]
    capacity: int
    key_width: int
    software: dict[str, str]
    licence: str = ""
    format_version: int = field(default=FORMAT_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, inverse of from_dict."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Manifest":
        """Read the JSON form.

        Raises:
            InputError: Written by an unknown format version, or a field is missing.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"store has format_version {version!r}, this build reads {FORMAT_VERSION}; "
                "use the release that wrote it or write the store again"
            )
        try:
            return cls(
                teacher=TeacherInfo(**_tuples(data["teacher"])),
                split=SplitInfo(**_tuples(data["split"])),
                taps={name: TapInfo(**tap) for name, tap in data["taps"].items()},
                policy=ViewPolicy.from_dict(data["policy"]),
                tars=tuple(TarInfo(**tar) for tar in data["tars"]),
                **{name: data[name] for name in _PLAIN},
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the store's manifest is incomplete: {error}; it was not written by this format"
            ) from error

    def fingerprint(self) -> str:
        """sha256 of the manifest's canonical JSON: names this store in logs and checks its attributes."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def require_unit(self, unit: int) -> None:
        """Refuse a unit the store does not have.

        Raises:
            InputError: Out of range.
        """
        if not 0 <= unit < len(self.tars):
            raise InputError(f"unit {unit} does not exist: the store has units 0..{len(self.tars) - 1}")

    def require_equal(self, other: "Manifest", remedy: str) -> None:
        """Refuse another manifest by the first field that differs (software versions may differ).

        Raises:
            MismatchError: Names the dotted field, both values and the remedy.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        for side in (mine, theirs):
            side.pop("software")
        _require_equal("manifest", mine, theirs, remedy)


_PLAIN = (
    "blocks_sha256", "logits_codec", "seed", "num_views", "capacity", "key_width", "software", "licence",
    "format_version",
)  # fmt: skip


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _require_equal(path: str, mine: Any, theirs: Any, remedy: str) -> None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in sorted(mine.keys() | theirs.keys()):
            _require_equal(f"{path}.{name}", mine.get(name), theirs.get(name), remedy)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
            _require_equal(f"{path}[{index}]", left, right, remedy)
    elif mine != theirs:
        raise MismatchError(path.removeprefix("manifest."), expected=mine, got=theirs, remedy=remedy)
