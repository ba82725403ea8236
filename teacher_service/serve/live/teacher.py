"""The live teacher: loaded in the background, fed by the batcher."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from feature_store.errors import ResourceError, UserError
from feature_store.teacher.model import Teacher
from teacher_service.serve.live.batcher import Batcher, BatchRecord, DeviceFaultError, Outputs

LOGITS = "logits"


@dataclass(frozen=True)
class Batching:
    """Limits of a batch of requests, see Batcher.

    Attributes:
        max_rows: Most views of a forward pass.
        max_wait: Seconds the first views of a batch wait for more.
        queue_rows: Most views that wait; more are refused.
    """

    max_rows: int = 64
    max_wait: float = 0.005
    queue_rows: int = 1024


class TeacherModel:
    """A teacher as a batcher's model: uint8 pixels [n, H, W, 3] in, float32 taps [n, N, C] and logits [n, K] out.

    Args:
        teacher: The frozen teacher, on its device.
        taps: Taps to give; None for those that losses need.

    Raises:
        InputError: The teacher has no such tap.
    """

    def __init__(self, teacher: Teacher, taps: Sequence[str] | None = None) -> None:
        needed = ("stage4", "stage3_prefix") if teacher.split.prefix == "cached" else ("stage4",)
        self.teacher, self.taps = teacher, tuple(needed if taps is None else taps)
        for name in self.taps:
            if name not in teacher.tap_shapes:
                teacher.taps.of(name)  # refuses an unknown one
        self._device = next(teacher.parameters()).device

    def __call__(self, pixels: np.ndarray) -> Outputs:
        """One forward pass.

        Raises:
            ResourceError: The device has too little memory for the batch.
            DeviceFaultError: The device is lost.
        """
        try:
            output = self.teacher(torch.from_numpy(pixels), self.taps)
            found = {name: output.taps[name].cpu().numpy() for name in self.taps}
            return found if output.logits is None else {**found, LOGITS: output.logits.cpu().numpy()}
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{self._device} ran out of memory for {len(pixels)} views; start the service with a smaller "
                "--max-batch, or send fewer"
            ) from error
        except RuntimeError as error:
            self._require_device(error)
            raise

    def _require_device(self, cause: RuntimeError) -> None:
        """A lost device (an illegal access, a fallen bus) fails at the next operation."""
        try:
            torch.zeros(1, device=self._device).item()
        except RuntimeError as error:
            reason = str(cause).partition("\n")[0]
            raise DeviceFaultError(f"{self._device} is lost ({reason}); restart the service") from error


class LiveTeacher:
    """A teacher that is loading, ready or lost.

    Args:
        load: Builds the teacher; called once, by ``start``, in a thread of its own.
        batching: Limits of a batch.
        taps: Taps to give; None for those that losses need.
        observe: Told about every batch.

    Attributes:
        error: Why it could not be loaded, if that is one of this project's errors.
    """

    error: UserError | None

    def __init__(
        self,
        load: Callable[[], Teacher],
        batching: Batching = Batching(),
        *,
        taps: Sequence[str] | None = None,
        observe: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        self._load, self.batching, self._taps, self._observe = load, batching, taps, observe
        self._ready: tuple[TeacherModel, Batcher] | None = None
        self._failure, self.error = "", None
        self._thread = threading.Thread(target=self._start, name="load-teacher", daemon=True)

    def start(self, *, wait: bool = False) -> "LiveTeacher":
        """Begin to load; with wait, return when it is done."""
        self._thread.start()
        if wait:
            self._thread.join()
        return self

    @property
    def loading(self) -> bool:
        """Whether start was called and is not done."""
        return self._thread.is_alive()

    @property
    def not_ready(self) -> str:
        """Why it cannot compute now; empty if it can."""
        if self._ready is not None:
            return self._ready[1].fault
        return self._failure or "the teacher is loading"

    @property
    def teacher(self) -> Teacher:
        """The loaded teacher.

        Raises:
            ResourceError: It is not there (yet).
        """
        return self._model.teacher

    @property
    def taps(self) -> tuple[str, ...]:
        """Taps it gives.

        Raises:
            ResourceError: It is not there (yet).
        """
        return self._model.taps

    @property
    def batcher(self) -> Batcher:
        """The batcher that takes requests.

        Raises:
            ResourceError: The teacher is not there (yet).
        """
        self._require_ready()
        assert self._ready is not None
        return self._ready[1]

    @property
    def waiting(self) -> int:
        """Views in the queue."""
        return self._ready[1].waiting if self._ready is not None else 0

    def close(self, timeout: float | None = None) -> bool:
        """Answer what waits and take no more; whether that was done in time."""
        return self._ready is None or self._ready[1].close(timeout)

    @property
    def _model(self) -> TeacherModel:
        self._require_ready()
        assert self._ready is not None
        return self._ready[0]

    def _require_ready(self) -> None:
        if self._ready is None:
            raise ResourceError(f"{self.not_ready}; try again later")

    def _start(self) -> None:
        try:
            model = TeacherModel(self._load(), self._taps)
            size = (*model.teacher.info.input_size, 3)
            model(np.zeros((1, *size), np.uint8))  # the first pass is slow, and shows whether there can be any
            options = self.batching
            self._ready = (
                model,
                Batcher(
                    model,
                    size,
                    max_rows=options.max_rows,
                    max_wait=options.max_wait,
                    queue_rows=options.queue_rows,
                    observe=self._observe,
                ),
            )
        except UserError as error:
            self.error = error
            self._failure = f"the teacher cannot be loaded: {error}"
        except Exception as error:  # noqa: BLE001 - a thread's traceback is not shown; readiness reports it
            self._failure = f"the teacher cannot be loaded: {type(error).__name__}: {error}"
