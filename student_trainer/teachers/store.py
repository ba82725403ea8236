"""Cached features of one store, or of several with the same views."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_store.errors import InputError, MismatchError
from feature_store.source import FeatureSource
from feature_store.store import Store, open_store
from feature_store.teacher.torch_codecs import TorchDecoder
from student_trainer.data.batch import Batch, require_views
from student_trainer.methods.base import Needs, TeacherOutput, TeacherShape
from student_trainer.teachers.base import TeacherSide, decoded, tail_of
from student_trainer.teachers.config import StoreTeacher


class StoreSide(TeacherSide):
    """Teachers whose features are cached; the first store's views are replayed."""

    def __init__(self, config: Sequence[StoreTeacher], device: torch.device) -> None:
        """Open the stores.

        Raises:
            InputError: A store is given twice.
            MismatchError: Stores of other views or samples than the first.
            UncommittedError: A store lacks views.
        """
        self._stores = [open_store(teacher.store) for teacher in config]
        super().__init__(device, store=self._stores[0], replay=config[0].replay)
        self._weights = tuple(teacher.weight for teacher in config)
        for number, (teacher, store) in enumerate(zip(config[1:], self._stores[1:], strict=True), 1):
            if any(store.manifest.identity() == other.manifest.identity() for other in self._stores[:number]):
                raise InputError(f"--store {teacher.store} holds the same features as one before it; give each once")
            _require_same_views(self._stores[0], store, str(teacher.store), self.num_views or 1)
            require_views(store, self.num_views or 1)
        self._decoders = [
            {tap: TorchDecoder(codec) for tap, codec in store.layout.codecs.items()} for store in self._stores
        ]

    def shapes(self) -> tuple[TeacherShape, ...]:
        """One for each store; its later blocks are built without the rest of the teacher."""
        return tuple(
            TeacherShape(store.manifest.split, store.manifest.teacher.num_classes, tail_of(store, self.device))
            for store in self._stores
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """Factor on each teacher's terms."""
        return self._weights

    def sources(self, needs: Sequence[Needs]) -> tuple[FeatureSource, ...]:
        """The stores' rows; none where the method reads neither taps nor logits."""
        if not any(own.taps or own.logits for own in needs):
            return ()
        return tuple(store.source(own.taps) for store, own in zip(self._stores, needs, strict=True))

    def outputs(self, batch: Batch, pixels_BHWC: Tensor, needs: Sequence[Needs]) -> tuple[TeacherOutput, ...]:
        """Codes travel to the device, values are made there."""
        each = zip(batch.features, self._decoders, needs, strict=False)  # no features where none are read
        return tuple(decoded(raw, decoders, self.device, own) for raw, decoders, own in each)

    def identity(self) -> dict[str, Any]:
        """Identities of the stores' manifests; growth does not change them."""
        return {
            "features": "cached",
            "store": _alone([store.manifest.identity() for store in self._stores]),
            "weights": _alone([1.0] if len(self._stores) == 1 else list(self._weights)),
            "live_teacher": None,
        }


def _alone(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _quarantined(store: Store) -> list[list[int]]:
    return [sorted(store.quarantined(unit)) for unit in range(len(store.manifest.tars))]


def _require_same_views(first: Store, other: Store, name: str, num_views: int) -> None:
    """Refuse a second teacher that saw other views, or other samples, than the first.

    Raises:
        MismatchError: Names the first field that differs.
    """
    ours, theirs = first.manifest, other.manifest
    policies = ours.policy.to_dict(), theirs.policy.to_dict()
    fields: dict[str, tuple[Any, Any]] = {
        **{
            f"policy.{field}": (policies[0].get(field), policies[1].get(field))
            for field in sorted(policies[0].keys() | policies[1].keys())
            if field != "name"
        },
        "seed": (ours.seed, theirs.seed),
        "view_encoding": (ours.view_encoding, theirs.view_encoding),
        "tars": ([tar.header_sha256 for tar in ours.tars], [tar.header_sha256 for tar in theirs.tars]),
        "quarantined samples": (_quarantined(first), _quarantined(other)),
    }
    where = f"--store {first.objects.url}"
    remedy = (
        f"that is of --store {name}; teachers learn from the same views: cache both with the same tars, policy and seed"
    )
    for field, (expected, got) in fields.items():
        if expected != got:
            raise MismatchError(field, where=where, expected=expected, got=got, remedy=remedy)
    for unit in range(len(ours.tars)):
        for view in sorted(set(range(num_views)) & other.committed_views(unit) & first.committed_views(unit)):
            crcs = first.pixel_crcs(unit, view), other.pixel_crcs(unit, view)
            differ = np.flatnonzero(crcs[0] != crcs[1])
            if len(differ):
                key = first.keys(unit)[differ[0]]
                raise MismatchError(
                    f"pixels of sample {key!r} (unit {unit}, view {view})",
                    where=where,
                    expected=f"CRC {crcs[0][differ[0]]:08x}",
                    got=f"{crcs[1][differ[0]]:08x}",
                    remedy=remedy,
                )
