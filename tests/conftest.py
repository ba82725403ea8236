"""Fixtures shared by tests that go from image tars through a teacher."""

from pathlib import Path

import pytest
from tiny_jobs import TINY_SWIN, TINY_VIT, TinyTeacher, make_teacher


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
