"""Batches made ahead by worker processes."""

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from feature_store.errors import ResourceError, UserError, one_line
from feature_store.format.addressing import RowId
from feature_store.processes import become_loader_worker, shielded_forkserver, shorten_socket_paths
from student_trainer.data.batch import Batch, ViewDataset

STALLED_SECONDS = 1800.0  # a worker may fetch a tar of views from far away before its first batch
_POLL_SECONDS = 5.0
_QUEUES_BYTES = 1 << 20  # a page for each semaphore
_SHARED_MEMORY = Path("/dev/shm")  # nosec B108 # only its free space is read
_REMEDY = (
    "make it larger (containers: docker run --shm-size=8g, or --ipc=host), or use fewer --workers (0 needs none) or a "
    "smaller --batch-size"
)


class BatchLoader:
    """A DataLoader over batches of rows that passes on a worker's user errors unchanged.

    Its random generator is its own, so that iterating never advances the global one (exact resume).
    """

    def __init__(
        self,
        dataset: ViewDataset,
        batches: Sampler[list[RowId]],
        *,
        workers: int = 0,
        start_method: str = "forkserver",
        pin: bool = False,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        """Set up the workers; they start with the first iteration and stay.

        Args:
            dataset: Makes a batch from rows.
            batches: Which rows, batch by batch.
            workers: Processes that make batches; 0 makes them in this process.
            start_method: Start method of workers: ``fork``, ``forkserver`` or ``spawn``.
            pin: Put batches into pinned memory, for copies to a GPU.
            stalled_seconds: A worker that takes this long for a batch is taken for hung.
        """
        if workers:
            shorten_socket_paths()
        forks_cleanly = workers > 0 and start_method == "forkserver"
        context = shielded_forkserver(["student_trainer.data.loader"]) if forks_cleanly else start_method
        self._stalled_seconds = stalled_seconds
        self._loader = DataLoader(
            _Guarded(dataset),
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=context if workers else None,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_become_worker,
            timeout=min(_POLL_SECONDS, stalled_seconds) if workers else 0,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order.

        Raises:
            UserError: A batch could not be made.
            ResourceError: Memory or shared memory ran out, a worker died, or it hangs.
        """
        try:
            with worker_failures_told():
                if self._loader.num_workers:
                    _require_room()
                iterator = iter(self._loader)
                while (result := self._next(iterator)) is not None:
                    if isinstance(result, _Failure):
                        raise result.error()
                    yield result
        except UserError:
            self.close()  # torch's signal handler would raise for a dead worker again, wherever this process is
            raise

    def close(self) -> None:
        """End the workers; DataLoader does when nothing refers to its iterator, and a traceback may for long."""
        if (iterator := getattr(self._loader, "_iterator", None)) is not None:
            with suppress(RuntimeError):  # of the signal handler, for a worker that is dead already
                iterator._shutdown_workers()
            self._loader._iterator = None

    def _next(self, iterator: "Iterator[Batch | _Failure]") -> "Batch | _Failure | None":
        """The next result, None at the end; DataLoader looks after its workers whenever a wait times out."""
        begun = time.monotonic()
        while True:
            try:
                return next(iterator, None)
            except (ConnectionError, EOFError) as error:  # in the middle of handing a batch over
                raise _died(error) from error
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() - begun > self._stalled_seconds:
                    raise ResourceError(
                        f"no batch came for {self._stalled_seconds:.0f} seconds: a process that makes batches hangs; "
                        "check the file systems and services that it reads from"
                    ) from error


@contextmanager
def worker_failures_told() -> Iterator[None]:
    """Convert the death of a worker, and a machine without room for workers, to user errors within the context.

    torch's signal handler may raise the former anywhere, not only where a batch is waited for.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _died(error) from error
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        raise ResourceError(f"workers cannot be started, {_room()}: {error}; {_REMEDY}") from error


def _died(error: Exception) -> ResourceError:
    return ResourceError(
        f"a process that makes batches died: {one_line(error)}; see its own message above, if there is none the system "
        "ended it because memory ran out, or /dev/shm was full: use fewer --workers (0 for none), a run continues "
        "with --resume"
    )


@dataclass(frozen=True)
class _Failure:
    """A user error on its way out of a worker; DataLoader itself would bury its message in a traceback."""

    kind: type[UserError]
    message: str
    attributes: dict[str, Any]

    def error(self) -> UserError:
        error = self.kind.__new__(self.kind, self.message)
        error.__dict__.update(self.attributes)
        return error


class _Guarded(Dataset["Batch | _Failure"]):
    def __init__(self, dataset: ViewDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, rows: Sequence[RowId]) -> "Batch | _Failure":
        try:
            batch = self._dataset[rows]
            if get_worker_info() is not None:
                _share(batch)
        except UserError as error:
            return _Failure(type(error), str(error), vars(error))
        except MemoryError:
            error = ResourceError(
                "memory ran out while a batch was made; use fewer --workers or a smaller --batch-size"
            )
            return _Failure(type(error), str(error), vars(error))
        return batch


def _share(batch: Batch) -> None:
    """Move a batch to shared memory. DataLoader would do so in a thread, whose errors are printed and the batch lost.

    Raises:
        ResourceError: There is no room.
    """
    parts = [part for given in batch.features for tap in given.taps.values() for part in tap.values()]
    logits = [given.logits for given in batch.features if given.logits is not None]
    try:
        for tensor in (batch.rows, batch.pixels, batch.labels, *parts, *logits):
            tensor.share_memory_()
    except RuntimeError as error:
        raise ResourceError(f"a batch cannot be handed over, {_room()}: {one_line(error)}; {_REMEDY}") from error


def _become_worker(worker: int) -> None:
    become_loader_worker()


def _require_room() -> None:
    """Refuse to start workers where not even their queues have room; DataLoader cannot clean up half of them.

    Raises:
        OSError: As the operating system would put it.
    """
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free < _QUEUES_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _room() -> str:
    try:
        room = shutil.disk_usage(_SHARED_MEMORY)
    except OSError:
        return f"{_SHARED_MEMORY} cannot be used"
    return f"{_SHARED_MEMORY} (shared memory) has {decimal(room.free)} of {decimal(room.total)} free"
