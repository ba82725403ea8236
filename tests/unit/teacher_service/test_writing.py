import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from feature_store.backends.local import LocalObjects
from feature_store.errors import ResourceError
from feature_store.store import Store
from teacher_service.cache import write as writing
from teacher_service.cache.decode import Task
from teacher_service.cache.write import disk_error, write_unit


def test_write_unit_raises_the_users_error_when_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(unit: int, view: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "remaining_bytes", lambda layout, missing: 10**18)
    committed = SimpleNamespace(missing_views=dict)
    store = cast(
        Store, SimpleNamespace(write_unit=full, objects=LocalObjects("store"), layout=None, committed=committed)
    )

    with pytest.raises(ResourceError, match=r"unit 3 does not fit .*are missing"):
        write_unit(store, Task(3, range(2)), cast(Any, None))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_disk_error_says_how_much_is_missing_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    error = str(disk_error(OSError(code, "full"), LocalObjects(tmp_path), "unit 7", needed=3_500_000))

    assert "needs 3.5 MB more, 1.0 MB are free, 2.5 MB are missing" in error
    assert "run the same command again" in error


def test_disk_error_keeps_the_systems_words_when_it_is_something_else(tmp_path: Path) -> None:
    error = disk_error(OSError(errno.EROFS, "Read-only file system"), LocalObjects(tmp_path), "unit 7")

    assert "Read-only file system" in str(error)
    assert error.exit_code == 3
