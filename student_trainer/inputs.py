"""Images of a run, opened, with their identity by content."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.errors import ImageError, InputError
from feature_store.format.manifest import InputInfo
from feature_store.inputs.base import NO_LABEL, SampleSource
from feature_store.inputs.labels import read_classes, require_same_indexes
from feature_store.inputs.open import PLAIN_TARS, OpenedSources, open_sources, recognised
from feature_store.inputs.options import InputFormat, SourceOptions
from feature_store.store import Store
from student_trainer.config import TrainConfig
from student_trainer.data.batch import match_tars, read_keys, require_views, training_positions
from student_trainer.data.materialised import StoredUnit, UnitSource, require_view_tars, stored_units

SourceOpener = Callable[[tuple[str, ...], SourceOptions, InputInfo | None], OpenedSources]
"""Opens patterns by options, or as the sources of a store were opened."""


@dataclass(frozen=True)
class Inputs:
    """A run's images.

    Attributes:
        tars: Sources of the views, one per unit.
        units: Positions to train on, per unit.
        quarantined: Samples left out because the teacher's pass could not read them.
        labelled: Samples to train on that have a label.
        checked: Whether a store's labels and CRCs check what is read.
        keys: The samples chosen by ``keys_file``; None for all.
        classes: Class names in order of their indexes; empty if they are unknown.
        validation: Sources of the validation samples, all of which need labels.
        validation_classes: Class folders of a validation tree whose indexes nothing else tells; otherwise empty.
    """

    tars: Sequence[UnitSource]
    units: Sequence[np.ndarray]
    quarantined: int
    labelled: int
    checked: bool
    keys: frozenset[str] | None
    classes: tuple[str, ...] = ()
    validation: Sequence[SampleSource] = ()
    validation_classes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Samples to train on."""
        return sum(map(len, self.units))

    def identity(self, config: TrainConfig) -> dict[str, Any]:
        """Names and hashes of everything that is read: equal for equal content, wherever it lies.

        Of training images whose contents a store's labels and CRCs check, only the headers count.

        Args:
            config: The run.
        """
        return {
            "samples": _digest(self.units),
            "initial_weights": _initial_weights(config),
            "classes": hashlib.sha256("\n".join(self.classes).encode()).hexdigest() if self.classes else None,
            "keys": None if self.keys is None else hashlib.sha256("\n".join(sorted(self.keys)).encode()).hexdigest(),
            "tars": _by_name(
                (tar.name, tar.header_sha256 if self.checked or isinstance(tar, StoredUnit) else tar.content_sha256())
                for tar in self.tars
            ),
            "val_tars": _by_name((tar.name, tar.content_sha256()) for tar in self.validation),
        }


def open_given(patterns: tuple[str, ...], options: SourceOptions, written: InputInfo | None) -> OpenedSources:
    """The SourceOpener of a single run."""
    return open_sources(patterns, options, written=written)


def open_inputs(
    config: TrainConfig, store: Store | None, num_views: int | None, opener: SourceOpener = open_given
) -> Inputs:
    """Open the images a run reads.

    Args:
        config: The run.
        store: The store whose views are replayed; None if views are drawn.
        num_views: Views used in turn; None for a new one every epoch.
        opener: Opens sources.

    Raises:
        UserError: Something is missing, or does not fit together.
    """
    keys, options = None if config.keys_file is None else read_keys(config.keys_file), source_options(config)
    if store is not None and num_views is not None:
        require_views(store, num_views)
    tars, info = _training(config, options, store, num_views, opener)
    units = training_positions(tars, store=store, keys=keys)
    known = () if info is None else info.classes
    classes = class_names(options, known, "the training images")
    validation, unknown = _validation(config, options, info, classes, opener)
    return Inputs(
        tars=tars,
        units=units,
        quarantined=sum(len(store.quarantined(unit)) for unit in range(len(tars))) if store else 0,
        labelled=_labelled(tars, units, store, info),
        checked=store is not None,
        keys=keys,
        classes=known or classes,
        validation=validation,
        validation_classes=unknown,
    )


def class_names(options: SourceOptions, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Class names of the options, else the known ones; empty without either.

    Args:
        options: Options for opening sources.
        known: Class names that are fixed.
        where: Their source, for the message.

    Raises:
        InputError: The list cannot be read, or contradicts the known names.
    """
    given = () if options.classes is None else read_classes(options.classes)
    require_same_indexes(given, known, where)
    return given or known


def open_labelled(
    patterns: tuple[str, ...], options: SourceOptions, classes: tuple[str, ...], opener: SourceOpener = open_given
) -> tuple[Sequence[SampleSource], tuple[str, ...]]:
    """Sources to measure accuracy on, and their class folders if nothing else names the classes.

    Args:
        patterns: Names of tars, a folder or parquet files.
        options: Options for opening them.
        classes: Class names in order of their indexes, see class_names; empty if they are unknown.
        opener: Opens sources.

    Raises:
        UserError: They cannot be opened.
    """
    kind = _kind(patterns, options)
    options = replace(options, labels="required", label_field=None if kind == "folder" else options.label_field)
    if classes:
        field, units, seed = options.label_field or "", options.unit_samples, options.shuffle_seed
        return opener(patterns, options, InputInfo(kind, "required", field, classes, units, seed)).sources, ()
    sources, info = opener(patterns, options, None)
    return sources, info.classes if info is not None and kind == "folder" else ()


def source_options(config: SourceOptions) -> SourceOptions:
    """The options of a config that say how images are found."""
    return SourceOptions(**{field.name: getattr(config, field.name) for field in fields(SourceOptions)})


def require_all_classes(found: Sequence[str], num_classes: int, option: str) -> None:
    """Refuse a class-per-folder tree without a folder for each of the student's classes.

    Args:
        found: Its class folders; empty where something else tells the indexes of classes.
        num_classes: K.
        option: The option that names the tree.

    Raises:
        InputError: Another number of classes, so that indexes of folders are not those of the student's classes.
    """
    if found and len(found) != num_classes:
        raise InputError(
            f"{option}: the tree has {len(found)} class folders, expected the student's {num_classes}: the index of a "
            "class is its folder's place among them; name all classes, one a line in order, with --classes FILE"
        )


def _training(
    config: TrainConfig, options: SourceOptions, store: Store | None, num_views: int | None, opener: SourceOpener
) -> tuple[Sequence[UnitSource], InputInfo | None]:
    """Sources of a run's views by unit, and how they were opened.

    Of a store with materialised views only what it says of its source; sources of a store as they were for its job.
    """
    info = None if store is None else store.manifest.inputs
    if config.views_from is not None:
        if store is None or num_views is None:
            raise InputError(
                "--views-from reads views that belong to a store; give that --store or --source http://..."
            )
        _require_as_written(options, info)
        require_view_tars(store, config.views_from, num_views)
        return stored_units(store, config.views_from), info
    if store is None:
        sources, info = opener(config.tars, options, None)
        return sources, info
    _require_as_written(options, info)
    return match_tars(store, _as_written(config.tars, options, info or PLAIN_TARS, opener)), info


def _as_written(
    patterns: tuple[str, ...], options: SourceOptions, info: InputInfo, opener: SourceOpener
) -> Sequence[SampleSource]:
    try:
        return opener(patterns, options, info).sources
    except InputError as error:
        if recognised(patterns) == info.format:
            raise
        what = {"tar": "tars", "folder": "a folder of class folders", "parquet": "parquet files"}[info.format]
        raise InputError(
            f"--tars {' '.join(patterns)} is not what the store was written from, {what}: {error}"
        ) from error


def _require_as_written(options: SourceOptions, info: InputInfo | None) -> None:
    """Refuse options that contradict what a store says of its sources.

    Raises:
        InputError: Names the option, its value and the store's.
    """
    stored, default = info or PLAIN_TARS, SourceOptions()
    for name in ("labels", "unit_samples", "shuffle_seed"):
        given, expected = getattr(options, name), getattr(stored, name)
        if given not in (expected, getattr(default, name)):
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{option} is {given}, but the store was written with {expected}; leave it out, or write another store"
            )


def _validation(
    config: TrainConfig,
    options: SourceOptions,
    trained: InputInfo | None,
    classes: tuple[str, ...],
    opener: SourceOpener,
) -> tuple[Sequence[SampleSource], tuple[str, ...]]:
    """Sources of the validation samples, with the training classes' indexes; class folders that nothing else names."""
    if not config.val_tars:
        return (), ()
    if options.label_field is None and trained is not None and trained.format == _kind(config.val_tars, options):
        options = replace(options, label_field=trained.label_field or None)
    return open_labelled(config.val_tars, options, classes, opener)


def _kind(patterns: tuple[str, ...], options: SourceOptions) -> InputFormat:
    return recognised(patterns) if options.input_format == "auto" else options.input_format


def _labelled(
    tars: Sequence[UnitSource], units: Sequence[np.ndarray], store: Store | None, info: InputInfo | None
) -> int:
    """Labelled samples to train on; labels are only read where they are optional."""
    policy = "required" if info is None else info.labels
    if policy != "optional":
        return sum(map(len, units)) if policy == "required" else 0
    if store is not None:
        return sum(int((store.labels(unit)[chosen] != NO_LABEL).sum()) for unit, chosen in enumerate(units))
    return sum(_has_label(tar, at) for tar, chosen in zip(tars, units, strict=True) for at in chosen.tolist())


def _has_label(tar: UnitSource, position: int) -> bool:
    assert not isinstance(tar, StoredUnit)  # which comes with a store
    try:
        return tar.label(position) != NO_LABEL
    except ImageError:  # left out when it is read
        return False


def _by_name(hashes: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Hashes by tar name; those of tars of equal names one after the other, in unit order."""
    grouped: dict[str, str] = {}
    for name, digest in hashes:
        grouped[name] = f"{grouped[name]} {digest}" if name in grouped else digest
    return grouped


def _digest(units: Sequence[np.ndarray]) -> str:
    """Of which samples are trained on; quarantined ones may be readable since."""
    digest = hashlib.sha256()
    for positions in units:
        digest.update(len(positions).to_bytes(8, "little") + positions.tobytes())
    return digest.hexdigest()


def _initial_weights(config: TrainConfig) -> str | None:
    """Hash of the file the student starts from; None if timm makes its first weights."""
    path = config.student_kwargs.get("checkpoint_path")
    if not path:
        return None
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"checkpoint_path of --student-kwargs cannot be read: {error}; give a file") from error
