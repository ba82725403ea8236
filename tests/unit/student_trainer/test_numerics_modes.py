"""Numerics of a run: what is switched within it, and back after it."""

import os

import pytest
import torch

from student_trainer.engine.numerics import numerics


def modes() -> tuple[bool, bool, str]:
    """Repeatable algorithms alone, cuDNN's search for the fastest, precision of float32 matrix products."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
    )


@pytest.fixture(autouse=True)
def _given_modes(monkeypatch):
    """This process's own modes, back after the test; cuBLAS's setting as in a process that has none."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    deterministic, benchmark, precision = modes()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("asked", "within"),
    [
        ({"deterministic": True, "tf32": False}, (True, False, "highest")),
        ({"deterministic": True, "tf32": True}, (True, False, "high")),
        ({"deterministic": False, "tf32": False}, (False, True, "highest")),
        ({"deterministic": False, "tf32": True}, (False, True, "high")),
    ],
)
@pytest.mark.parametrize("before", [(False, False, "highest"), (True, True, "medium")])
def test_modes_are_those_asked_for_within_and_the_earlier_ones_after(asked, within, before):
    deterministic, benchmark, precision = before
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(precision)
    kept = within if not deterministic or asked["deterministic"] else (True, *within[1:])  # never switched off
    with numerics(**asked):
        assert modes() == kept
    assert modes() == before
    with pytest.raises(KeyError), numerics(**asked):
        raise KeyError
    assert modes() == before


@pytest.mark.parametrize(
    ("deterministic", "given", "within"),
    [(True, None, ":4096:8"), (True, ":16:8", ":16:8"), (False, None, None)],
)
def test_cublas_is_given_the_workspace_that_determinism_needs(monkeypatch, deterministic, given, within):
    if given is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    with numerics(deterministic=deterministic, tf32=False):
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == within
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
