"""From tars to batches of views, in decode worker processes.

Shape legend: b samples of a batch, V views, H W pixels.
"""

import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from feature_store.errors import ImageError, ResourceError, UserError
from feature_store.inputs.base import SampleSource
from feature_store.processes import ShieldedContext, become_loader_worker, shielded_forkserver
from feature_store.views import (
    ViewParams,
    ViewPolicy,
    apply_view,
    decode_image,
    decode_view,
    draw_view,
    encode_view,
    pixel_crc,
)

PREFETCH = 2  # batches decoded ahead by each worker


class Task(NamedTuple):
    """Consecutive views of one unit: what is written and committed at once."""

    unit: int
    views: range


class Span(NamedTuple):
    """Consecutive positions start .. stop - 1 of a task: the samples of one batch."""

    task: Task
    start: int
    stop: int


@dataclass(frozen=True)
class Sample:
    """One source image and its views.

    Attributes:
        label: Its label; -1 where it has none.
        reason: Why it is quarantined; None if it has views.
        params: [V]; None where quarantined.
        crcs: CRC-32 of each view's pixels, [V].
        views: uint8 [V, H, W, 3].
        jpegs: [V], see ViewBatch.
    """

    label: int
    reason: str | None
    params: list[ViewParams | None]
    crcs: list[int]
    views: np.ndarray
    jpegs: list[bytes]


@dataclass(frozen=True)
class ViewBatch:
    """Consecutive samples of one unit; what the teacher sees in one go.

    Attributes:
        task: Unit and views they are of.
        start: Position of the first one.
        labels: int64 [b]; -1 where quarantined.
        quarantined: Reason by position in the unit.
        params: [V] lists of [b]; None where quarantined.
        pixel_crc: uint32 [V, b]; 0 where quarantined.
        pixels: uint8 [b, V, H, W, 3]; black where quarantined, so that a batch's shape never depends on it.
        jpegs: [V] lists of [b] JPEGs; no bytes where quarantined, or where views are not materialised.
        seconds: Decode time.
    """

    task: Task
    start: int
    labels: np.ndarray
    quarantined: dict[int, str]
    params: list[list[ViewParams | None]]
    pixel_crc: np.ndarray
    pixels: Tensor
    jpegs: list[list[bytes]] = field(default_factory=list)
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> int:
        """View images in it."""
        return len(self) * len(self.task.views)

    def pin_memory(self) -> "ViewBatch":
        """The same with page-locked pixels; DataLoader calls this for a GPU."""
        return replace(self, pixels=self.pixels.pin_memory())


class ViewDataset(Dataset):
    """Batches of views by span; errors are returned, because tracebacks do not cross processes well.

    Args:
        tars: One per unit.
        policy: The view policy.
        seed: Seed of the views.
        encoding: Encoding of materialised views, see ``Manifest.view_encoding``; pixels are then those of the JPEGs.
    """

    def __init__(
        self, tars: Sequence[SampleSource], policy: ViewPolicy, seed: int, encoding: str | None = None
    ) -> None:
        self.tars, self.policy, self.seed, self.encoding = tars, policy, seed, encoding

    def __getitem__(self, span: Span) -> ViewBatch | UserError:
        """One batch, or the error of reading it."""
        return self.read(span)

    def read(self, span: Span, memory: Tensor | None = None) -> ViewBatch | UserError:
        """The same with its pixels in given memory, uint8 [at least their bytes]; default new memory."""
        started = time.perf_counter()
        shape = (span.stop - span.start, len(span.task.views), *self.policy.size, 3)
        pixels = torch.empty(shape, dtype=torch.uint8) if memory is None else memory[: math.prod(shape)].view(shape)
        positions = zip(range(span.start, span.stop), pixels.numpy(), strict=True)
        try:
            samples = [self.sample(span.task, position, out) for position, out in positions]
        except UserError as error:
            return error
        except MemoryError:
            return ResourceError(
                f"memory ran out while images of {self.tars[span.task.unit].url} were decoded: use fewer --workers or "
                "a smaller --batch-size"
            )
        except OSError as error:
            return ResourceError(f"{self.tars[span.task.unit].url} cannot be read: {error}; check the disk or network")
        return replace(_batch(span, samples, pixels), seconds=time.perf_counter() - started)

    def sample(self, task: Task, position: int, out: np.ndarray | None = None) -> Sample:
        """A task's views of one sample, cut from one decode; into out, uint8 [V, H, W, 3], if given."""
        count, label = len(task.views), -1
        views = np.empty((count, *self.policy.size, 3), np.uint8) if out is None else out
        try:
            key, source, label = self.tars[task.unit].read(position)
            image = decode_image(source)
        except ImageError as error:
            views[:] = 0
            return Sample(label, str(error), [None] * count, [0] * count, views, [b""] * count)
        params = [draw_view(self.policy, self.seed, key, view, image.size) for view in task.views]
        jpegs = [self._cut(image, each, view) for each, view in zip(params, views, strict=True)]
        return Sample(label, None, list(params), [pixel_crc(view) for view in views], views, jpegs)

    def _cut(self, image: Image.Image, params: ViewParams, out: np.ndarray) -> bytes:
        """Cut one view into out; its JPEG, if views are materialised."""
        apply_view(image, params, self.policy.size, out=out)
        if self.encoding is None:
            return b""
        encoded = encode_view(out)
        out[:] = decode_view(encoded)
        return encoded


class _InSharedMemory(Dataset):
    """A dataset's batches with their pixels in memory that is shared with the workers and reused.

    New memory for each batch costs as much as cutting its views: the system clears and maps every page.

    Args:
        dataset: The dataset.
        memory: uint8 [slots, bytes of the largest batch].
    """

    def __init__(self, dataset: ViewDataset, memory: Tensor) -> None:
        self._dataset, self._memory = dataset, memory

    def __getitem__(self, item: tuple[Span, int]) -> ViewBatch | UserError:
        """A batch by its span and the slot of its pixels."""
        span, slot = item
        return self._dataset.read(span, self._memory[slot])


def _batch(span: Span, samples: Sequence[Sample], pixels: Tensor) -> ViewBatch:
    return ViewBatch(
        task=span.task,
        start=span.start,
        labels=np.array([sample.label for sample in samples], np.int64),
        quarantined={span.start + i: each.reason for i, each in enumerate(samples) if each.reason is not None},
        params=[list(view) for view in zip(*(sample.params for sample in samples), strict=True)],
        pixel_crc=np.array([sample.crcs for sample in samples], np.uint32).T,
        pixels=pixels,
        jpegs=[list(view) for view in zip(*(sample.jpegs for sample in samples), strict=True)],
    )


def batch_spans(tasks: Iterable[Task], sizes: Sequence[int], images_per_batch: int) -> Iterator[Span]:
    """Every batch of the given tasks: never across a task's border, independent of the other tasks.

    Args:
        tasks: Tasks to do, in order; one is pulled when all batches of the one before are given out.
        sizes: Samples per unit, of all units.
        images_per_batch: View images of a batch; at least one sample is in it.
    """
    return (
        Span(task, start, min(start + step, sizes[task.unit]))
        for task in tasks
        for step in [max(1, images_per_batch // len(task.views))]
        for start in range(0, sizes[task.unit], step)
    )


def warm_up(workers: int) -> None:
    """Begin to import what workers need, in the background, while the caller does something else."""
    if workers:
        _context()


def read_batches(
    dataset: ViewDataset, spans: Iterable[Span], *, most_images: int, workers: int, pin_memory: bool
) -> Generator[ViewBatch, None, None]:
    """Batches in order, decoded ahead by worker processes that live as long as the job.

    At most PREFETCH spans per worker are pulled, and as many batches kept, ahead of the one given out. Its pixels
    change when the next one is asked for, unless they are pinned.

    Args:
        dataset: The dataset.
        spans: Spans of the batches, in order.
        most_images: View images of the largest one.
        workers: Decode workers; 0 decodes in this process.
        pin_memory: Whether to copy pixels to page-locked memory.

    Raises:
        UserError: A tar cannot be read (any more), shared memory is too small, or a worker process died.
    """
    # one for each batch that is decoded ahead, and one for the batch that was given out
    memory = _shared(workers * PREFETCH + 1, most_images * math.prod(dataset.policy.size) * 3) if workers else None
    loader = DataLoader(
        dataset if memory is None else _InSharedMemory(dataset, memory),
        batch_size=None,
        sampler=spans if memory is None else zip(spans, cycle(range(len(memory)))),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=_context() if workers else None,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=_become_worker,
    )
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ResourceError(
            f"a decode worker died ({str(error).splitlines()[0]}); usually memory or /dev/shm ran out: "
            "use fewer --workers or a smaller --batch-size"
        ) from error


def _shared(slots: int, size: int) -> Tensor:
    """Shared memory, uint8 [slots, size]: workers receive a handle with their dataset, not a copy."""
    try:
        storage = torch.UntypedStorage._new_shared(slots * size)  # share_memory_() would copy as much into it
    except RuntimeError as error:
        raise ResourceError(
            f"decode workers need {decimal(slots * size)} of shared memory: {error}; "
            "make /dev/shm larger, or use fewer --workers or a smaller --batch-size"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(slots, size)


def _context() -> ShieldedContext:
    return shielded_forkserver([__name__])  # not the job, which imports timm: seconds, and memory in every worker


def _as_is(batch: Any) -> Any:
    return batch


def _become_worker(worker: int) -> None:
    become_loader_worker()
