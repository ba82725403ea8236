"""Manifest: the store's claims about itself."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter

from feature_store.errors import InputError, MismatchError, Remedy
from feature_store.parsing import (
    STRICT,
    Count,
    Json,
    Natural,
    Number,
    Positive,
    Text,
    Unsigned64,
    parse,
    require_name,
)
from feature_store.views import ViewPolicy
from feature_store.views.files import ENCODINGS, JPEG

FORMAT_VERSION = 1
MOST_PLACES = 2**26
"""Units times views: a reader keeps four bytes for each."""

_TapName = Annotated[Text, AfterValidator(require_name)]
_Size = tuple[Count, Count]
_Mean = tuple[Number, Number, Number]
_Std = tuple[Positive, Positive, Positive]


@dataclass(frozen=True)
class TeacherInfo:
    """The frozen model that wrote the features, with its preprocessing.

    Attributes:
        name: timm model name, or ``package.module:build`` of a user's own teacher.
        model_kwargs: Extra arguments of ``timm.create_model`` (image size, depth...), or of that function.
        weights_sha256: Hash of the full state dict, see ``feature_store.teacher.model.weights_sha256``.
        input_size: Height and width the teacher takes, in pixels.
        mean: Normalisation mean per RGB channel on the 0..1 scale (timm data config).
        std: Normalisation standard deviation per RGB channel on the 0..1 scale.
        num_classes: Width of the logits; 0 if the teacher has no classifier.
        compute_dtype: dtype of the forward pass, e.g. ``float32`` or ``bfloat16`` (autocast).
    """

    __pydantic_config__ = STRICT

    name: Text
    model_kwargs: dict[Text, Json]
    weights_sha256: Text
    input_size: _Size
    mean: _Mean
    std: _Std
    num_classes: Natural
    compute_dtype: Text


@dataclass(frozen=True)
class SplitInfo:
    """Split of the teacher, with the inputs of its later blocks.

    Attributes:
        family: ``swin``, ``vit``, ``beit``, ``eva``, ``convnext`` or ``hiera``: timm's class of models; for a teacher
            without later blocks the name of its class.
        depth: Number of blocks in the later part (Swin, ConvNeXt, Hiera: those of the last stage); 0 for a teacher
            without later blocks.
        input_dim: Channels of the stage-3 output; without later blocks, ``output_dim``.
        input_grid: (H, W) of the stage-3 output; without later blocks, ``output_grid``.
        output_dim: Channels of the final feature map.
        output_grid: (H, W) of the final feature map.
        prefix_tokens: Number of class and register tokens beside the grid in the teacher's own pass.
        prefix: Prefix tokens of students' passes: ``none`` (the teacher has none, or no later blocks), ``cached`` (its
            own, from tap ``stage3_prefix``) or ``dropped`` (grid tokens alone, although the teacher has some).
    """

    __pydantic_config__ = STRICT

    family: Text
    depth: Natural
    input_dim: Count
    input_grid: _Size
    output_dim: Count
    output_grid: _Size
    prefix_tokens: Natural
    prefix: Text

    @property
    def has_later_blocks(self) -> bool:
        """Whether students can run the later blocks of this teacher, which TPP does."""
        return self.depth > 0

    @property
    def drops_prefix(self) -> bool:
        """Whether students run the later blocks on grid tokens alone, although the teacher has prefix tokens."""
        return self.prefix == "dropped"


@dataclass(frozen=True)
class TapInfo:
    """Shape and storage of one tap: N tokens of C channels per row.

    Attributes:
        tokens: N.
        channels: C.
        codec: Name of its codec.
        statistics: Numbers [C] the codec learnt from a first sample, by name; None if it needs none.
    """

    tokens: Count
    channels: Count
    codec: Text
    statistics: dict[Text, list[Number]] | None = None


@dataclass(frozen=True)
class TarInfo:
    """One input tar = one unit. ``header_sha256`` covers member names and sizes, not contents."""

    name: Text
    samples: Count
    header_sha256: Text


@dataclass(frozen=True)
class InputInfo:
    """Options by which a store's samples were found, so that later commands find the same.

    Attributes:
        format: ``tar``, ``folder`` or ``parquet``.
        labels: ``required``, ``optional`` or ``none``.
        label_field: Member or column of the labels; "" for the format's default.
        classes: Class names in order of their indexes; may be empty.
        unit_samples: Samples of each unit but the last; 0 for tars.
        shuffle_seed: Seed of the order in which samples are divided into units; 0 for tars.
    """

    format: Literal["tar", "folder", "parquet"]
    labels: Literal["required", "optional", "none"]
    label_field: Text = ""
    classes: tuple[Text, ...] = ()
    unit_samples: Natural = 0
    shuffle_seed: Unsigned64 = 0


@dataclass(frozen=True)
class Manifest:
    """Everything that must agree between the store, the teacher, the tars and the trainer.

    A store may grow: more views, and more tars after those it has. Nothing else of it ever changes.

    Attributes:
        teacher: The frozen model.
        split: Where it is cut.
        blocks_sha256: Hash of the later blocks' weights kept in the store.
        taps: Stored taps by name.
        logits_codec: Codec of the logits; None for a teacher without a classifier.
        policy: Policy the views were drawn from.
        seed: Seed of the views.
        num_views: Views per sample, V.
        tars: Input tars; a tar's index is its unit.
        capacity: Rows per unit, S: at least the largest number of samples in a tar; more leaves room to grow.
        key_width: Bytes per stored sample key; more than needed leaves room to grow.
        software: Versions that created the store; informative.
        licence: Note of the data set's licence; informative.
        view_encoding: Encoding of materialised views: ``jpeg95``, and then the teacher saw them decoded; None without
            them. Left out of the JSON form when None, so that stores from earlier releases keep their identity.
        inputs: Options by which samples were found; None, and left out of the JSON form, for tars with class indexes in
            members cls.
        format_version: Of FORMAT.md.
    """

    __pydantic_config__ = STRICT

    teacher: TeacherInfo
    split: SplitInfo
    blocks_sha256: Text
    taps: dict[_TapName, TapInfo]
    logits_codec: Text | None
    policy: ViewPolicy
    seed: Unsigned64
    num_views: Count
    tars: tuple[TarInfo, ...]
    capacity: Annotated[Count, Field(le=2**24)]
    key_width: Annotated[Count, Field(le=2**20)]
    software: dict[Text, Text]
    licence: Text = ""
    view_encoding: Text | None = None
    inputs: InputInfo | None = None
    format_version: Natural = field(default=FORMAT_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, inverse of from_dict."""
        data = json.loads(json.dumps(asdict(replace(self, tars=()))))
        data["tars"] = [dict(vars(tar)) for tar in self.tars]  # asdict takes seconds for many
        if self.view_encoding is None:
            del data["view_encoding"]
        if self.inputs is None:
            del data["inputs"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Manifest":
        """Read the JSON form.

        Raises:
            InputError: Written by an unknown format version, or a field is missing or unknown to this build.
        """
        require_version(data)
        encoding = data.get("view_encoding")
        if encoding not in ENCODINGS:
            raise InputError(
                f"store has view_encoding {encoding!r}, this build knows {JPEG}; use the release that wrote it"
            )
        manifest = parse(_MANIFEST, data, "the store's manifest")
        manifest.require_room()
        if (places := len(manifest.tars) * manifest.num_views) > MOST_PLACES:
            raise InputError(
                f"the store's manifest is not valid: num_views {manifest.num_views} of {len(manifest.tars)} tars are "
                f"{places:,} units of a view, expected at most {MOST_PLACES:,}; it was not written by this format"
            )
        return manifest

    def fingerprint(self) -> str:
        """sha256 of the manifest's canonical JSON: checks the root group's attributes."""
        return fingerprint_of(self.to_dict())

    def identity(self) -> str:
        """sha256 of all that growth leaves as it is: names this store in logs and in its commit records."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        kept = replace(self, tars=()).to_dict()
        return fingerprint_of({name: value for name, value in kept.items() if name not in _GROWING})

    def with_statistics_of(self, stored: "Manifest") -> "Manifest":
        """This manifest with the codec statistics a store already has: a continued job learns none of its own."""
        taps = {
            name: replace(tap, statistics=stored.taps[name].statistics) if name in stored.taps else tap
            for name, tap in self.taps.items()
        }
        return replace(self, taps=taps)

    def require_unit(self, unit: int) -> None:
        """Refuse a unit the store does not have.

        Raises:
            InputError: Out of range.
        """
        if not 0 <= unit < len(self.tars):
            raise InputError(f"unit {unit} does not exist: the store has units 0..{len(self.tars) - 1}")

    def require_room(self) -> None:
        """Refuse tars that do not fit the capacity.

        Raises:
            InputError: One has more samples.
        """
        for tar in self.tars:
            if tar.samples > self.capacity:
                raise InputError(
                    f"{tar.name} has {tar.samples} samples, the capacity is {self.capacity}; give the manifest the "
                    "capacity of its largest tar, or more to leave room to grow"
                )

    def require_equal(self, other: "Manifest", remedy: str) -> None:
        """Refuse another manifest by the first field that differs, the teacher's first (software versions may differ).

        Raises:
            MismatchError: Names the dotted field, both values and the remedy.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        for side in (mine, theirs):
            side.pop("software")
        for name in ("name", "model_kwargs"):  # another teacher differs in everything
            _require_equal(f"teacher.{name}", mine["teacher"][name], theirs["teacher"][name], remedy)
        if self.teacher.weights_sha256 != other.teacher.weights_sha256:
            raise self._other_weights(other)
        _require_equal("manifest", mine, theirs, remedy)

    def _other_weights(self, other: "Manifest") -> MismatchError:
        remedy = "the teacher's weights differ; give the checkpoint that the store was written with"
        mine, theirs = self.teacher.weights_sha256, other.teacher.weights_sha256
        error = _mismatch("teacher.weights_sha256", mine, theirs, remedy)
        error.remedy = Remedy.LOCAL_CHECKPOINT
        return error

    def growth_from(self, old: "Manifest") -> "Growth":
        """Views and tars a store of an old manifest lacks; may be empty.

        Capacity and key width stay the old ones, which must be large enough; so does software.

        Raises:
            MismatchError: Something else differs, a tar is missing or changed, or a new one does not fit.
        """
        fixed = {name: getattr(old, name) for name in ("num_views", "tars", "capacity", "key_width")}
        old.require_equal(replace(self, **fixed), _KEEP)
        for name in ("capacity", "key_width"):
            if getattr(self, name) > getattr(old, name):
                raise _mismatch(name, f"at most {getattr(old, name)}", getattr(self, name), _NO_ROOM)
        if self.num_views < old.num_views:
            raise _mismatch("num_views", f"at least {old.num_views}", self.num_views, _ONLY_GROWS)
        if len(self.tars) < len(old.tars):
            raise _mismatch("tars", f"at least {len(old.tars)}", len(self.tars), _ONLY_GROWS)
        for unit, (had, has) in enumerate(zip(old.tars, self.tars, strict=False)):
            _require_equal(f"tars[{unit}]", asdict(had), asdict(has), _ONLY_GROWS)
        for tar in self.tars[len(old.tars) :]:
            if tar.samples > old.capacity:
                raise _mismatch(f"samples of {tar.name}", f"at most {old.capacity}", tar.samples, _NO_ROOM)
        merged = replace(old, num_views=self.num_views, tars=self.tars)
        return Growth(merged, self.num_views - old.num_views, self.tars[len(old.tars) :])


@dataclass(frozen=True)
class Growth:
    """Views and tars a store lacks; false if there are none.

    Attributes:
        manifest: Of the grown store.
        views: Number of views to add.
        tars: Tars that come after those it has.
    """

    manifest: Manifest
    views: int
    tars: tuple[TarInfo, ...]

    def __bool__(self) -> bool:
        return bool(self.views or self.tars)


_GROWING = ("num_views", "tars", "software", "licence")
_KEEP = "use the settings the store was created with, or another store"
_ONLY_GROWS = "a store only grows: give its own tars first, in the same order, and at least its views"
_NO_ROOM = "the new tars do not fit the room this store was made with; split them, or write another store"
_MANIFEST = TypeAdapter(Manifest)


def require_version(data: Any) -> None:
    """Refuse the JSON form of another format's manifest, whose other fields may mean anything.

    Raises:
        InputError: Written by an unknown format version.
    """
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise InputError(
            f"store has format_version {version!r}, this build reads {FORMAT_VERSION}; "
            "use the release that wrote it or write the store again"
        )


def fingerprint_of(data: Any) -> str:
    """sha256 of the canonical JSON of a manifest's JSON form."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _mismatch(name: str, expected: Any, got: Any, remedy: str) -> MismatchError:
    return MismatchError(name, expected=expected, got=got, remedy=remedy)


def _require_equal(path: str, mine: Any, theirs: Any, remedy: str) -> None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in sorted(mine.keys() | theirs.keys()):
            _require_equal(f"{path}.{name}", mine.get(name), theirs.get(name), remedy)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
            _require_equal(f"{path}[{index}]", left, right, remedy)
    elif mine != theirs:
        raise MismatchError(path.removeprefix("manifest."), expected=mine, got=theirs, remedy=remedy)
