"""Indexing of many tars: kept indexes first, all cores for the rest."""

import json
import logging
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from subprocess import DEVNULL, Popen

from feature_store.commits.locks import locked, machine_folder
from feature_store.errors import UserError
from feature_store.inputs.index_cache import VARIABLE, IndexCache, TarVersion
from feature_store.inputs.tar_index import CLASS_INDEX, LabelRule, TarIndex, index_tar
from feature_store.processes import become_worker, usable_cpus

HEAD_START_SECONDS = 1.0  # of indexing in this process before others are started, which takes each about as long
MOST_PROCESSES = 32  # each takes about 60 MB; more of them wait for the disk
_logger = logging.getLogger(__name__)
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from feature_store.inputs.indexing import serve_requests; serve_requests(int(sys.argv[2]))"
)


class Indexer:
    """Indexes tars, a few in this process, many with a process per core.

    Of several jobs that begin on one machine, one indexes with all cores; the others wait and use what it kept.

    Args:
        rule: Where labels are.
    """

    def __init__(self, rule: LabelRule = CLASS_INDEX) -> None:
        self._rule, self._cache = rule, IndexCache(rule)
        self._spent, self._indexed, self._shared = 0.0, False, False
        self._threads: ThreadPoolExecutor | None = None
        self._workers: list[_Worker] = []
        self._of_thread = threading.local()
        self._held = ExitStack()

    def __enter__(self) -> "Indexer":
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
            if self._threads is not None:
                self._threads.shutdown(cancel_futures=True)
            for worker in self._workers:
                worker.close()
        if self._indexed:
            self._cache.delete_oldest()

    def kept(self, path: Path) -> "Future[TarIndex] | None":
        """The index of an uncompressed tar, if one is kept; the tar is not opened."""
        index = self._cache.load(TarVersion.of(path))
        return None if index is None else _done(index)

    def submit(self, url: str, path: Path) -> "Future[TarIndex]":
        """Index an uncompressed tar; its errors are those of index_tar."""
        if self._spent >= HEAD_START_SECONDS and not self._shared:
            self._share_work()
        version = TarVersion.of(path)
        if (index := self._cache.load(version)) is None and self._threads is not None:
            return self._threads.submit(self._index, url, path, version)
        try:
            return _done(index or self._index(url, path, version))
        except UserError as error:
            return _done(error)

    def _share_work(self) -> None:
        self._shared, processes = True, min(usable_cpus(), MOST_PROCESSES)
        if self._cache.folder is None:
            _logger.warning(
                "the indexes of these tars cannot be kept, so that every start reads all their headers: there is no "
                "cache folder that only this user can enter; set %s to a folder that you can write", VARIABLE
            )  # fmt: skip
            processes //= _local_jobs()  # which all index everything
        else:
            # The lock is on this machine's own disk: home folders are often on NFS, which may lack locks.
            with suppress(OSError, UserError):
                self._held.enter_context(locked(machine_folder(str(self._cache.folder)) / "indexing"))
        if processes > 1:
            self._threads = ThreadPoolExecutor(processes, "index-tars")

    def _index(self, url: str, path: Path, version: TarVersion | None) -> TarIndex:
        started = time.perf_counter()
        index = index_tar(url, path, self._rule) if self._threads is None else self._index_apart(url, path)
        if TarVersion.of(path) == version:  # it did not change while it was read
            self._cache.save(version, index)
        self._spent += time.perf_counter() - started
        self._indexed = True
        return index

    def _index_apart(self, url: str, path: Path) -> TarIndex:
        """As index_tar, by the worker process of this thread."""
        try:
            if not hasattr(self._of_thread, "worker"):
                self._of_thread.worker = _Worker()
                self._workers.append(self._of_thread.worker)
            return self._of_thread.worker.index(url, path, self._rule)
        except (OSError, EOFError):  # it could not be started, or was killed
            return index_tar(url, path, self._rule)


def _local_jobs() -> int:
    """Processes of this job on this machine, as torchrun says."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(value)) if value.isdecimal() else 1


def _done(outcome: TarIndex | UserError) -> "Future[TarIndex]":
    future = Future[TarIndex]()
    if isinstance(outcome, UserError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return future


class _Worker:
    """A process that indexes one tar at a time.

    Not one of multiprocessing: that imports the main module, and with it runs a script without a __main__ guard again.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())]
            self._process = Popen(command, stdin=DEVNULL, stdout=DEVNULL, pass_fds=[theirs.fileno()])

    def index(self, url: str, path: Path, rule: LabelRule) -> TarIndex:
        """As index_tar.

        Raises:
            OSError, EOFError: The process died.
        """
        self._connection.send((url, path, rule))
        answer = self._connection.recv()
        if isinstance(answer, UserError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait()


def serve_requests(descriptor: int) -> None:
    """Index tars named on a connection until its other end is closed: what a worker process does."""
    become_worker()
    connection = Connection(descriptor)
    with connection, suppress(EOFError):
        while True:
            url, path, rule = connection.recv()
            try:
                answer = index_tar(url, path, rule)
            except UserError as error:
                answer = error
            connection.send(answer)
