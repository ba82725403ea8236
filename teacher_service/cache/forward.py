"""The teacher's forward pass: pixels in, features out.

On a GPU the host never waits for it: copies in, passes and copies out are queued on streams.

Shape legend: B images of a batch, N tokens, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_store.errors import ResourceError
from feature_store.teacher.model import Teacher, TeacherOutput, prepare_for_gpu
from teacher_service.cache.stage_timer import StageTimer

Arrays = dict[str, np.ndarray]
"""Taps [B, N, C] by name and ``logits`` [B, classes] of a teacher that has any; float32."""


@dataclass(frozen=True)
class PendingBatch:
    """One forward pass; its outputs in host memory are complete once the last of its events has happened.

    Attributes:
        outputs: Tensors by name, as in Arrays.
        images: Rows of them that count; the rest is padding.
        events: Begin and end of the GPU's stages, by stage; the last event is the last to happen. Empty on a CPU.
    """

    outputs: dict[str, Tensor]
    images: int
    events: dict[str, tuple[Any, Any]]


class Features:
    """The teacher's outputs for one batch; on a GPU perhaps still being computed."""

    def __init__(self, parts: Sequence[PendingBatch], timer: StageTimer) -> None:
        self._parts, self._timer = parts, timer

    def arrays(self) -> Arrays:
        """Wait for them, and note the GPU's busy time."""
        for part in self._parts:
            self._note(part.events)
        names = self._parts[0].outputs
        pieces = {name: [part.outputs[name][: part.images].numpy() for part in self._parts] for name in names}
        return {name: some[0] if len(some) == 1 else np.concatenate(some) for name, some in pieces.items()}

    def _note(self, events: dict[str, tuple[Any, Any]]) -> None:
        for _, end in events.values():
            end.synchronize()
        for stage, (begin, end) in events.items():
            self._timer.add(stage, begin.elapsed_time(end) / 1000)


class Forward:
    """The teacher as a stage of the pipeline.

    A batch that does not fit in memory is halved, and so are all later ones: rounding aside, features do not depend
    on the batch they are computed in.

    Attributes:
        batch_size: Most images of one pass; halved when the device runs out of memory.

    Args:
        teacher: The frozen model, on its device.
        taps: Which of its taps are wanted.
        batch_size: View images per pass.
        compile: Run it through ``torch.compile``; batches are padded, so that one shape is compiled.
        timer: Notes how long it takes.
    """

    def __init__(
        self, teacher: Teacher, taps: Sequence[str], batch_size: int, timer: StageTimer, *, compile: bool = False
    ) -> None:
        self.batch_size = batch_size
        self.device = next(teacher.parameters()).device
        self._taps, self._timer, self._pad = tuple(taps), timer, compile
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            prepare_for_gpu(teacher)
        self._model: Callable[[Tensor, Sequence[str]], TeacherOutput] = (
            torch.compile(teacher, dynamic=False) if compile else teacher
        )
        self._run = _GpuRunner(self.device).run if on_gpu else self._run_on_cpu

    def __call__(self, pixels_BHWC: Tensor) -> Features:
        """Begin to run the teacher on uint8 pixels in host memory, pinned if it runs on a GPU.

        Raises:
            ResourceError: The device has too little memory for a single image, or a failure of the compiler.
        """
        parts: list[PendingBatch] = []
        done = 0
        while done < len(pixels_BHWC):
            piece = pixels_BHWC[done : done + self.batch_size]
            try:
                parts.append(self._run(self._compute, self._padded(piece), len(piece)))
            except torch.OutOfMemoryError as error:
                self._halve(error)
                continue
            except RuntimeError as error:
                if not (self._pad and _of_compiler(error)):
                    raise
                raise self._compile_error(error) from error
            done += len(piece)
        return Features(parts, self._timer)

    def _compile_error(self, error: RuntimeError) -> ResourceError:
        reason = str(error).strip().splitlines()[0]
        return ResourceError(f"torch.compile failed on {self.device}: {reason}; run without --compile")

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self.batch_size == 1:
            raise ResourceError(
                f"{self.device} ran out of memory with a single image: {str(error).splitlines()[0]}; "
                "use a GPU with more memory or a lower --compute-dtype, or end what else uses it"
            ) from error
        self.batch_size = max(1, self.batch_size // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what larger batches left cannot be cut up for smaller ones

    def _padded(self, pixels_BHWC: Tensor) -> Tensor:
        missing = self.batch_size - len(pixels_BHWC)
        if not self._pad or missing <= 0:
            return pixels_BHWC
        padded = torch.zeros((self.batch_size, *pixels_BHWC.shape[1:]), dtype=torch.uint8)
        padded[: len(pixels_BHWC)] = pixels_BHWC
        return padded.pin_memory() if pixels_BHWC.is_pinned() else padded

    def _compute(self, pixels_BHWC: Tensor) -> dict[str, Tensor]:
        output = self._model(pixels_BHWC, self._taps)
        wanted = {name: output.taps[name] for name in self._taps}
        return wanted if output.logits is None else wanted | {"logits": output.logits}

    def _run_on_cpu(
        self, compute: Callable[[Tensor], dict[str, Tensor]], pixels_BHWC: Tensor, images: int
    ) -> PendingBatch:
        with self._timer.busy("forward"):
            return PendingBatch(compute(pixels_BHWC), images, {})


class _GpuRunner:
    """Runs passes on a GPU with copies in and out on streams of their own, so that they overlap with computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def run(self, compute: Callable[[Tensor], dict[str, Tensor]], pixels_BHWC: Tensor, images: int) -> PendingBatch:
        """Queue one pass; returns at once."""
        with torch.cuda.device(self._device):
            now = torch.cuda.current_stream()
            with torch.cuda.stream(self._in):
                copying = _event()
                pixels = pixels_BHWC.to(self._device, non_blocking=True)
                copied = _event()
            now.wait_event(copied)
            pixels.record_stream(now)  # its memory is not reused before the pass has read it
            computing = _event()
            results = compute(pixels)
            computed = _event()
            self._out.wait_event(computed)
            with torch.cuda.stream(self._out):
                leaving = _event()
                outputs = {name: self._to_host(values) for name, values in results.items()}
                left = _event()
        events = {"transfer": (copying, copied), "forward": (computing, computed), "copy out": (leaving, left)}
        return PendingBatch(outputs, images, events)

    def _to_host(self, values: Tensor) -> Tensor:
        # torch keeps pinned blocks and hands them out again once the copies into them are over
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        values.record_stream(self._out)
        return host


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _of_compiler(error: RuntimeError) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
