"""TeacherSide: the interface of a run to its teacher.

Shape legend: B batch, H W pixels of a view.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from feature_store.errors import MismatchError
from feature_store.format.manifest import Manifest, SplitInfo, TeacherInfo
from feature_store.source import FeatureSource
from feature_store.store import Store
from feature_store.teacher import LaterBlocks
from feature_store.teacher.torch_codecs import TorchDecoder
from feature_store.views import ViewPolicy, view_policy
from student_trainer.data.batch import Batch, RawFeatures
from student_trainer.methods.base import Needs, TeacherOutput, TeacherShape
from student_trainer.teachers.config import Replay, ViewsConfig

_REPLAY, _VIEWS = Replay(), ViewsConfig()


class TeacherSide(ABC):
    """The teacher of a run, opened.

    Attributes:
        device: Where features are used.
        store: The store whose views are replayed; None if views are drawn.
        replay: Use of the store's views.
        views: Policy and seed of views, without a store.
        info: The teacher; None without one.
        split: Where it is cut; None without one.
        computes: Whether features are computed while training, here or by a service.
    """

    computes = False

    def __init__(
        self,
        device: torch.device,
        *,
        store: Store | None = None,
        replay: Replay = _REPLAY,
        views: ViewsConfig = _VIEWS,
        info: TeacherInfo | None = None,
        split: SplitInfo | None = None,
    ) -> None:
        self.device, self.store, self.replay, self.views, self._seconds = device, store, replay, views, 0.0
        manifest = None if store is None else store.manifest
        self.info = info or (manifest and manifest.teacher)
        self.split = split or (manifest and manifest.split)

    @property
    def seconds(self) -> float:
        """Time spent in a teacher of this process so far."""
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds = value

    @property
    def policy(self) -> ViewPolicy:
        """The policy that the run's views are drawn from."""
        return view_policy(self.views.policy, self.views.size) if self.store is None else self.store.manifest.policy

    @property
    def num_views(self) -> int | None:
        """Views used in turn; None for a new one every epoch."""
        return self.views.count if self.store is None else self.replay.num_views or self.store.manifest.num_views

    @property
    def num_classes(self) -> int:
        """Classes of the teacher's logits; 0 without."""
        return 0 if self.info is None else self.info.num_classes

    @abstractmethod
    def shapes(self) -> tuple[TeacherShape, ...]:
        """Sizes of every teacher; empty without one."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Factor on each teacher's terms."""
        return (1.0,) * len(self.shapes())

    def sources(self, needs: Sequence[Needs]) -> tuple[FeatureSource, ...]:
        """Feature sources for workers, one for each teacher; empty if they read none."""
        return ()

    @abstractmethod
    def outputs(self, batch: Batch, pixels_BHWC: Tensor, needs: Sequence[Needs]) -> tuple[TeacherOutput, ...]:
        """Each teacher's output for a batch, on the device in float32.

        Args:
            batch: A batch whose features come from ``sources``.
            pixels_BHWC: Its views on the device, uint8.
            needs: The method's needs of each teacher.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Hashes of what the features are: equal for equal content, wherever it lies."""


def tail_of(store: Store, device: torch.device) -> Callable[[], LaterBlocks]:
    """Loads a store's later blocks; leaves the random state, which the first weights are drawn from, as it is."""

    def load() -> LaterBlocks:
        with torch.random.fork_rng():
            return store.later_blocks(device)

    return load


def decoded(raw: RawFeatures, decoders: dict[str, TorchDecoder], device: torch.device, needs: Needs) -> TeacherOutput:
    """Features of one teacher on the device, in float32.

    Args:
        raw: As a source gave them.
        decoders: By tap name, for taps that are encoded.
        device: Where to.
        needs: Logits are left out where it asks for none.
    """
    taps = {
        name: decoders[name](parts, device) if name in decoders else parts[""].to(device, non_blocking=True).float()
        for name, parts in raw.taps.items()
    }
    logits = raw.logits.to(device, non_blocking=True).float() if needs.logits and raw.logits is not None else None
    return TeacherOutput(taps, logits)


def teacher_identity(info: TeacherInfo, split: SplitInfo) -> dict[str, Any]:
    """Everything that a teacher's outputs depend on: not where its weights lie, as their hash is part of it."""
    kwargs = {name: value for name, value in info.model_kwargs.items() if name != "checkpoint_path"}
    return {**asdict(info), "model_kwargs": kwargs, "split": asdict(split)}


def require_same_teacher(manifest: Manifest, info: TeacherInfo, split: SplitInfo) -> None:
    """Refuse a live teacher that is not the one a store was written with, cut at the same place.

    Raises:
        MismatchError: Names the first field that differs, both values and the remedy.
    """
    expected, got = teacher_identity(manifest.teacher, manifest.split), teacher_identity(info, split)
    for field in ("name", "weights_sha256", "input_size", "mean", "std", "num_classes", "split", "model_kwargs"):
        if expected[field] != got[field]:
            raise MismatchError(
                field if field == "split" else f"teacher.{field}",
                expected=expected[field],
                got=got[field],
                remedy="use the --teacher options the store was written with, or write a store with this teacher",
            )
