"""The images that a run trains on, opened, with their identity by content."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.errors import InputError
from feature_store.inputs.options import TarOptions
from feature_store.inputs.tar import Tar, open_tars
from feature_store.store import Store
from student_trainer.config import TrainConfig
from student_trainer.data.batch import match_tars, read_keys, require_views, training_positions
from student_trainer.data.materialised import UnitTar, require_view_tars, stored_units

TarOpener = Callable[[Sequence[str], TarOptions], list[Tar]]


@dataclass(frozen=True)
class Inputs:
    """A run's images.

    Attributes:
        tars: One per unit.
        units: Positions to train on, per unit.
        quarantined: Samples left out because the teacher's pass could not read them.
        checked: Whether a store's labels and CRCs check what is read.
        keys: The samples chosen by ``keys_file``; None for all.
    """

    tars: Sequence[UnitTar]
    units: Sequence[np.ndarray]
    quarantined: int
    checked: bool
    keys: frozenset[str] | None

    def identity(self, config: TrainConfig, val_tars: Sequence[Tar]) -> dict[str, Any]:
        """Names and hashes of everything that is read: equal for equal content, wherever it lies.

        Of training tars whose contents a store's labels and CRCs check, only the headers count.

        Args:
            config: The run.
            val_tars: Its validation tars.
        """
        return {
            "samples": _digest(self.units),
            "initial_weights": _initial_weights(config),
            "keys": None if self.keys is None else hashlib.sha256("\n".join(sorted(self.keys)).encode()).hexdigest(),
            "tars": _by_name(
                (tar.name, tar.content_sha256() if isinstance(tar, Tar) and not self.checked else tar.header_sha256)
                for tar in self.tars
            ),
            "val_tars": _by_name((tar.name, tar.content_sha256()) for tar in val_tars),
        }


def open_inputs(
    config: TrainConfig, store: Store | None, num_views: int | None, open_tars: TarOpener = open_tars
) -> Inputs:
    """Open the images a run trains on.

    Args:
        config: The run.
        store: The store whose views are replayed; None if views are drawn.
        num_views: Views used in turn; None for a new one every epoch.
        open_tars: Opens tars by patterns.

    Raises:
        UserError: Something is missing, or does not fit together.
    """
    keys = None if config.keys_file is None else read_keys(config.keys_file)
    if store is not None and num_views is not None:
        require_views(store, num_views)
    tars = _unit_tars(config, store, num_views, open_tars)
    quarantined = sum(len(store.quarantined(unit)) for unit in range(len(tars))) if store else 0
    return Inputs(tars, training_positions(tars, store=store, keys=keys), quarantined, store is not None, keys)


def _unit_tars(
    config: TrainConfig, store: Store | None, num_views: int | None, open_tars: TarOpener
) -> Sequence[UnitTar]:
    """What views are made of, unit by unit; of a store with materialised views only what it says of its source."""
    if config.views_from is not None:
        if store is None or num_views is None:
            raise InputError(
                "--views-from reads views that belong to a store; give that --store or --source http://..."
            )
        require_view_tars(store, config.views_from, num_views)
        return stored_units(store, config.views_from)
    tars = open_tars(config.tars, config)
    return tars if store is None else match_tars(store, tars)


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
