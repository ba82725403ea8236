"""A teacher in the training process."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feature_store.errors import InputError
from feature_store.source import FeatureSource
from feature_store.store import Store, open_store
from feature_store.teacher.model import Teacher, load_teacher, prepare_for_gpu
from feature_store.teacher.own import require_named
from student_trainer.data.batch import Batch
from student_trainer.methods.base import Needs, TeacherOutput, TeacherShape
from student_trainer.teachers.base import TeacherSide, require_same_teacher, teacher_identity
from student_trainer.teachers.config import LiveTeacher


class LiveSide(TeacherSide):
    """A live teacher on the student's device: features never leave it, and pixels get there once for both.

    On a GPU it runs as in a cache job: channels-last convolutions, fused attention.
    """

    computes = True

    def __init__(self, config: LiveTeacher, device: torch.device) -> None:
        """Load the teacher, and open the store whose views are replayed, if there is one.

        Raises:
            UserError: The teacher cannot be loaded.
            MismatchError: It is not the store's.
            InputError: Its input size is not the views'.
        """
        store = None if config.store is None else open_store(config.store)
        self.teacher = _load(config, store, device)
        if device.type == "cuda":
            prepare_for_gpu(self.teacher)
        super().__init__(
            device,
            store=store,
            replay=config.replay,
            views=config.views,
            info=self.teacher.info,
            split=self.teacher.split,
        )
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self.policy.size != self.teacher.info.input_size:
            raise InputError(
                f"views are {self.policy.size[0]} x {self.policy.size[1]}, but teacher {self.teacher.info.name} takes "
                f"{self.teacher.info.input_size[0]} x {self.teacher.info.input_size[1]}; set --views.size"
            )

    def shapes(self) -> tuple[TeacherShape, ...]:
        """The teacher, whose own later blocks are the tail."""
        return (TeacherShape(self.teacher.split, self.teacher.info.num_classes, self.teacher.tail),)

    def sources(self, needs: Sequence[Needs]) -> tuple[FeatureSource, ...]:
        """None: workers read no features.

        Raises:
            InputError: The teacher has no such tap.
        """
        for tap in needs[0].taps if needs else ():
            self.teacher.taps.of(tap)
        return ()

    def outputs(self, batch: Batch, pixels_BHWC: Tensor, needs: Sequence[Needs]) -> tuple[TeacherOutput, ...]:
        """A forward pass of the teacher."""
        (own,) = needs
        begun, started = time.perf_counter(), _event(self.device)
        output = self.teacher(pixels_BHWC, own.taps)
        if started is None:
            self._seconds += time.perf_counter() - begun
        elif (ended := _event(self.device)) is not None:
            self._timed.append((started, ended))
        return (TeacherOutput(output.taps, output.logits if own.logits else None),)

    @property
    def seconds(self) -> float:
        """Time spent in the teacher so far; on a GPU, of passes that are over."""
        while self._timed and self._timed[0][1].query():
            begun, ended = self._timed.pop(0)
            self._seconds += begun.elapsed_time(ended) / 1000
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds = value

    def identity(self) -> dict[str, Any]:
        """The teacher, and the store whose views are replayed."""
        return {
            "features": "live",
            "store": None if self.store is None else self.store.manifest.identity(),
            "weights": 1.0,
            "live_teacher": teacher_identity(self.teacher.info, self.teacher.split),
        }


def _event(device: torch.device) -> torch.cuda.Event | None:
    """A moment in the GPU's work; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _load(asked: LiveTeacher, store: Store | None, device: torch.device) -> Teacher:
    """The teacher asked for; with a store, the store's own or none."""
    manifest = None if store is None else store.manifest
    if asked.name is None and manifest is not None:
        require_named(manifest.teacher.name)
    teacher = load_teacher(
        asked.name or (manifest.teacher.name if manifest else ""),
        checkpoint=asked.checkpoint,
        pretrained=asked.pretrained,
        model_kwargs=asked.model_kwargs or (manifest.teacher.model_kwargs if manifest else {}),
        depth=asked.depth or (manifest.split.depth or None if manifest else None),
        drop_prefix=(
            asked.drop_prefix if asked.drop_prefix is not None else bool(manifest and manifest.split.drops_prefix)
        ),
        compute_dtype=asked.compute_dtype or (manifest.teacher.compute_dtype if manifest else "float32"),
        device=device,
    )
    if manifest is not None:
        require_same_teacher(manifest, teacher.info, teacher.split)
    return teacher
