"""Reads the numbers recorded from the released code, and compares ours with them."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from student_trainer.official import load_swin

FOLDER = Path(os.environ.get("SCALEKD_GOLDEN", Path(__file__).parents[2] / "golden" / "official"))
DTYPES = (torch.float64, torch.float32)
# Zero in exact arithmetic, rounding noise in the recording: softmax ignores a shift common to all keys, BatchNorm
# one common to a channel, and the alternative view path one common to all positions.
NOISE = ("pos_attention.k.bias", "proj_student.0.bias", "s4/projector_1/ffn.layers.1.bias")


@cache
def index() -> dict[str, Any]:
    return json.loads((FOLDER / "index.json").read_text())["files"]


def names(prefix: str) -> list[str]:
    """Fixture files of one family, without their ending."""
    return sorted(Path(name).stem for name in index() if name.startswith(prefix))


def arguments(name: str) -> dict[str, Any]:
    """Constructor arguments a fixture was recorded with."""
    return index()[f"{name}.npz"]["constructor_args"]


@cache
def golden(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All arrays of a fixture, floats in a dtype; for weights and inputs, not for results."""
    return {key: leaf.to(dtype, copy=True) if leaf.is_floating_point() else leaf for key, leaf in golden(name).items()}


def under(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays below a prefix, the prefix cut off."""
    return {key.removeprefix(prefix): leaf for key, leaf in arrays.items() if key.startswith(prefix)}


def assert_matches(
    got: Tensor | None,
    expected: Tensor,
    what: str,
    *,
    scale: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Equal relative to the largest entry of the array, or of scale if that is larger.

    Without a tolerance it is 1e-5 for our float32, and for our float64 1e-9, or 1e-7 if the recording is rounded.
    """
    assert got is not None, f"{what} is missing"
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}"
    if tolerance is None:
        tolerance = 1e-5 if got.dtype == torch.float32 else 1e-9 if expected.dtype == torch.float64 else 1e-7
    largest = max(expected.abs().max(), scale.abs().max() if scale is not None else 0.0)
    error = (got.detach().double() - expected.double()).abs().max()
    assert error <= tolerance * largest, f"{what}: off by {error:.2e}, {error / largest:.2e} of the largest entry"


def assert_gradients_match(
    got: dict[str, Tensor | None], expected: dict[str, Tensor], *, tolerance: float | None = None
) -> None:
    """Gradients by released name; exactly the recorded ones exist."""
    assert {name for name, leaf in got.items() if leaf is not None} == set(expected)
    for name, leaf in expected.items():
        scale = expected[name.replace(".bias", ".weight")] if name.endswith(NOISE) else None
        assert_matches(got[name], leaf, name, scale=scale, tolerance=tolerance)


def swin(name: str, dtype: torch.dtype) -> SwinTransformer:
    """The recorded Swin teacher in timm, loaded through load_swin."""
    case, arch = arguments(name), arguments(name)["arch"]
    model = SwinTransformer(
        img_size=case["img_size"],
        window_size=case["window_size"],
        embed_dim=arch["embed_dims"],
        depths=tuple(arch["depths"]),
        num_heads=tuple(arch["num_heads"]),
        num_classes=case.get("num_classes", 0),
    )
    load_swin(model, under(golden(name), "param/"))
    return model.to(dtype).eval()


def images(name: str, dtype: torch.dtype) -> Tensor:
    """The recorded network input: int8 / 32, exact in any float dtype."""
    return golden(name)["img_int8"].to(dtype) / 32
