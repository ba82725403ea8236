import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from feature_store.errors import ResourceError
from feature_store.store import Store
from feature_store.writer import UnitData
from teacher_service import writing
from teacher_service.decoding import Task
from teacher_service.writing import UnitWriter, disk_error


def _store(write: Callable[[int, int, UnitData], None]) -> Store:
    """As much of a store as the writer touches."""
    return cast(
        Store,
        SimpleNamespace(
            write_unit=write, path=Path("store"), manifest=None, committed=SimpleNamespace(missing_views=dict)
        ),
    )


UNIT: Any = object()


def _task(unit: int) -> Task:
    return Task(unit, range(2))


def test_unit_writer_commits_in_order_and_tells_when_done() -> None:
    written, told = [], []
    with UnitWriter(
        _store(lambda unit, view, data: written.append(unit)), lambda task, data: told.append(task.unit)
    ) as writer:
        for unit in range(6):
            writer.submit(_task(unit), UNIT)

    assert written == told == list(range(6))


def test_unit_writer_holds_the_caller_back_when_the_disk_is_slow() -> None:
    release, begun = threading.Event(), threading.Semaphore(0)

    def write(unit: int, view: int, data: UnitData) -> None:
        begun.release()
        assert release.wait(20)

    with UnitWriter(_store(write), lambda task, data: None) as writer:
        writer.submit(_task(0), UNIT)
        assert begun.acquire(timeout=20)
        writer.submit(_task(1), UNIT)  # waits in the queue
        third = threading.Thread(target=writer.submit, args=(_task(2), UNIT))
        third.start()
        third.join(0.2)
        held_back = third.is_alive()
        release.set()
        third.join()
    assert held_back


def test_unit_writer_finishes_what_it_began_and_drops_the_rest_when_the_job_fails() -> None:
    written: list[int] = []
    started, release = threading.Event(), threading.Event()

    def write(unit: int, view: int, data: UnitData) -> None:
        started.set()
        assert release.wait(20)
        written.append(unit)

    with pytest.raises(KeyboardInterrupt), UnitWriter(_store(write), lambda task, data: None) as writer:  # noqa: PT012
        writer.submit(_task(0), UNIT)
        writer.submit(_task(1), UNIT)
        assert started.wait(20)
        threading.Timer(0.1, release.set).start()
        raise KeyboardInterrupt

    assert written == [0]


def test_unit_writer_raises_the_users_error_when_the_last_write_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(unit: int, view: int, data: UnitData) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "remaining_bytes", lambda manifest, done: 10**18)

    with (
        pytest.raises(ResourceError, match=r"unit 3 does not fit .*are missing"),
        UnitWriter(_store(full), lambda task, data: None) as writer,
    ):
        writer.submit(_task(3), UNIT)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_disk_error_says_how_much_is_missing_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    error = str(disk_error(OSError(code, "full"), tmp_path, "unit 7", needed=3_500_000))

    assert "needs 3.5 MB more, 1.0 MB are free, 2.5 MB are missing" in error
    assert "run the same command again" in error


def test_disk_error_keeps_the_systems_words_when_it_is_something_else(tmp_path: Path) -> None:
    error = disk_error(OSError(errno.EROFS, "Read-only file system"), tmp_path, "unit 7")

    assert "Read-only file system" in str(error)
    assert error.exit_code == 3
