"""Fixtures shared by tests that go from image tars through a teacher."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from tiny_jobs import TINY_SWIN, TINY_VIT, TinyTeacher, make_teacher

# Processes of all tests are forks of one server that has imported torch, student_trainer and teacher_service once,
# whichever test starts it: shielded_forkserver names the modules of one kind of worker only.
_PRELOADED, _set_preload = ["student_trainer.train", "teacher_service.cache.job"], BaseContext.set_forkserver_preload
BaseContext.set_forkserver_preload = lambda context, names: _set_preload(context, [*names, *_PRELOADED])
multiprocessing.get_context("forkserver").set_forkserver_preload([])
# Signals that nohup, or a shell that starts the tests in the background, has ignored would stay so in all they start.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# Mutation testing needs to know that a test fails, not the smallest input for which it does.
settings.register_profile("mutants", derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])


@pytest.fixture(scope="session", autouse=True)
def _tar_indexes_of_tests_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALEKD_TAR_INDEX", str(tmp_path_factory.mktemp("tar-index")))
        yield


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="session")
def tiny_swin(teacher_folder: Path) -> TinyTeacher:
    """A Swin with 32-pixel input, no prefix tokens, four classes."""
    return make_teacher(teacher_folder, "swin_tiny_patch4_window7_224", TINY_SWIN)


@pytest.fixture(scope="session")
def other_swin(teacher_folder: Path) -> TinyTeacher:
    """The same architecture as tiny_swin with other weights."""
    return make_teacher(teacher_folder, "swin_tiny_patch4_window7_224", TINY_SWIN, seed=1)


@pytest.fixture(scope="session")
def tiny_vit(teacher_folder: Path) -> TinyTeacher:
    """A plain ViT with 32-pixel input, a class token, four classes."""
    return make_teacher(teacher_folder, "test_vit", TINY_VIT)


@pytest.fixture
def serve() -> Iterator[Callable]:
    """``served_store.in_process`` that is closed when the test ends."""
    from served_store import in_process

    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(closing(in_process(*args, **kwargs)))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write a module of the user's own that this process and its children import, by name and code."""
    names = []

    def write(name: str, code: str) -> None:
        assert name not in sys.modules
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)
