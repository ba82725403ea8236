"""What a run reads, opened, and its identity by content."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.client.connection import Client, connect, read_token
from feature_store.errors import InputError
from feature_store.inputs.options import TarOptions
from feature_store.inputs.tar import Tar, open_tars
from feature_store.store import Store, open_store
from student_trainer.config import TrainConfig
from student_trainer.data.batch import match_tars, read_keys, require_views, training_positions
from student_trainer.data.materialised import UnitTar, require_view_tars, stored_units

TarOpener = Callable[[Sequence[str], TarOptions], list[Tar]]


@dataclass(frozen=True)
class Inputs:
    """A run's data.

    Attributes:
        store: The store whose views are replayed; None if views are drawn.
        service: The service that brings it, if one does.
        tars: One per unit.
        units: Positions to train on, per unit.
        num_views: Views used in turn; None for a new one every epoch.
        keys: The samples chosen by ``keys_file``; None for all.
    """

    store: Store | None
    service: Client | None
    tars: Sequence[UnitTar]
    units: Sequence[np.ndarray]
    num_views: int | None
    keys: frozenset[str] | None

    def identity(
        self, config: TrainConfig, val_tars: Sequence[Tar], live_teacher: str | None, processes: int = 1
    ) -> dict[str, Any]:
        """Names and hashes of everything a run reads: equal for equal content, wherever it lies.

        Of training tars whose contents a store's labels and CRCs check, only the headers count.

        Args:
            config: The run.
            val_tars: Its validation tars.
            live_teacher: Hash of the live teacher's weights; None without one.
            processes: The run's processes.
        """
        return {
            "features": _kind_of_features(config),
            "views": self.num_views,
            "samples": _digest(self.units),
            "store": None if self.store is None else self.store.manifest.identity(),  # it may have grown since
            "live_teacher": live_teacher,
            "initial_weights": _initial_weights(config),
            "keys": None if self.keys is None else hashlib.sha256("\n".join(sorted(self.keys)).encode()).hexdigest(),
            "tars": _by_name(
                (tar.name, tar.content_sha256() if isinstance(tar, Tar) and self.store is None else tar.header_sha256)
                for tar in self.tars
            ),
            "val_tars": _by_name((tar.name, tar.content_sha256()) for tar in val_tars),
            "processes": processes,
        }


def open_inputs(config: TrainConfig, open_tars: TarOpener = open_tars) -> Inputs:
    """Open what a run trains on, apart from a live teacher.

    Args:
        config: The run.
        open_tars: Opens tars by patterns.

    Raises:
        UserError: Something is missing, or does not fit together.
    """
    service = None if config.service_url is None else connect(config.service_url, _token(config))
    store = service.store if service is not None else None if config.store is None else open_store(config.store)
    keys = None if config.keys_file is None else read_keys(config.keys_file)
    num_views = config.views.count if store is None else config.num_views or store.manifest.num_views
    if store is not None and num_views is not None:
        require_views(store, num_views)
    tars = _unit_tars(config, store, open_tars)
    return Inputs(store, service, tars, training_positions(tars, store=store, keys=keys), num_views, keys)


def _unit_tars(config: TrainConfig, store: Store | None, open_tars: TarOpener) -> Sequence[UnitTar]:
    """What views are made of, unit by unit; of a store with materialised views only what it says of its source."""
    if config.views_from is not None and store is not None:
        require_view_tars(store, config.views_from, config.num_views or store.manifest.num_views)
        return stored_units(store, config.views_from)
    tars = open_tars(config.tars, config)
    return tars if store is None else match_tars(store, tars)


def _token(config: TrainConfig) -> str | None:
    return None if config.token_file is None else read_token(config.token_file)


def _kind_of_features(config: TrainConfig) -> str:
    """Cached rows are the same wherever they come from; what is computed anew is so on one machine at best."""
    if config.method == "none":
        return "none"
    return "cached" if not config.is_live else "live" if config.service_url is None else "live, by a service"


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
