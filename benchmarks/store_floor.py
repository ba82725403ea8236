"""The floor under every reader and writer: the same bytes with the fewest system calls, nothing checked."""

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.store_data import ROW_BYTES, STRIDE
from feature_store import RowId

_PAGE = 4096
_pool = ThreadPoolExecutor(16)


class RawFiles:
    """Shards of a store read row by row with ``preadv``, some rows in flight."""

    def __init__(self, store: Path, places: Iterable[tuple[int, int]], *, direct: bool = False) -> None:
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        self._files = {
            (unit, view): os.open(store / f"taps/stage4/c/{view}/{unit}/0/0", flags) for unit, view in places
        }
        self._direct = direct
        self._scratch = threading.local()

    def read(self, rows: Sequence[RowId], out: np.ndarray, threads: int) -> None:
        """Rows into uint8 [n, ROW_BYTES]; O_DIRECT reads whole pages into scratch instead."""
        flat = memoryview(out).cast("B")
        jobs = iter(
            [
                (self._files[row.unit, row.view], row.position * STRIDE, flat[at * ROW_BYTES : (at + 1) * ROW_BYTES])
                for at, row in enumerate(rows)
            ]
        )
        in_threads(threads, lambda: self._work(jobs))

    def _work(self, jobs) -> None:
        for descriptor, offset, target in jobs:
            if self._direct:
                first = offset // _PAGE * _PAGE
                length = -(-(offset + ROW_BYTES) // _PAGE) * _PAGE - first
                done = os.preadv(descriptor, [self._pages()[:length]], first) >= ROW_BYTES
            else:
                done = os.preadv(descriptor, [target], offset) == ROW_BYTES
            if not done:
                raise OSError("short read")

    def _pages(self) -> memoryview:
        if not hasattr(self._scratch, "pages"):
            self._scratch.pages = memoryview(mmap.mmap(-1, ROW_BYTES + 2 * _PAGE))
        return self._scratch.pages

    def drop_cache(self) -> None:
        """Take the files out of the page cache."""
        for descriptor in self._files.values():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_raw(folder: Path, payloads: Sequence[np.ndarray], threads: int) -> None:
    """Each payload into a file of its own, synced; then the folder."""
    folder.mkdir()
    jobs = iter(list(enumerate(payloads)))

    def work() -> None:
        for at, payload in jobs:
            with (folder / str(at)).open("wb", buffering=0) as file:
                view = memoryview(payload).cast("B")
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())

    in_threads(threads, work)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def in_threads(threads: int, work: Callable[[], None]) -> None:
    """Run work in a number of threads, this one among them; the others wait from one call to the next."""
    others = [_pool.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()
