"""Reads the numbers recorded from the released code, and compares ours with them."""

import json
import os
from collections.abc import Callable, Mapping
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
FACTOR, FLOOR = 4, 1e-6  # float32 rounds at 6e-8
CEILING = 1e-3  # of float32; bfloat16 rounds at 4e-3
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


def assert_recorded(
    compute: Callable[[torch.dtype], Mapping[str, Tensor | None]],
    dtype: torch.dtype,
    expected: Mapping[str, Tensor],
    *,
    recorded: float | None = None,
) -> None:
    """Our results in a dtype are the recorded ones, relative to the largest entry of each array.

    Float64 agrees to 1e-9, or to 1e-7 if the recording is stored in float32. Float32 rounds differently on every
    processor, so its limit is measured: FACTOR times its distance from our own float64, within FLOOR and CEILING.

    Args:
        compute: Gives our results by name, None where there is none; exactly the recorded ones must be there.
        dtype: What to compute in.
        expected: The recorded results.
        recorded: Relative precision of the recording, if not told by its dtype.
    """
    got = {name: leaf for name, leaf in compute(dtype).items() if leaf is not None}
    exact = compute(torch.float64)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        assert got[name].shape == leaf.shape, f"{name}: {tuple(got[name].shape)} for {tuple(leaf.shape)}"
        if not leaf.is_floating_point():
            assert torch.equal(got[name], leaf), name
            continue
        largest = leaf.abs().max().item()
        if name.endswith(NOISE):
            largest = max(largest, expected[name.replace(".bias", ".weight")].abs().max().item())
        limit = (recorded or (1e-9 if leaf.dtype == torch.float64 else 1e-7)) * largest
        if dtype != torch.float64:
            rounding = FACTOR * distance(got[name], exact[name])
            limit += min(max(rounding, FLOOR * largest), CEILING * largest)
        error = distance(got[name], leaf)
        assert error <= limit, f"{name}: off by {error:.2e}, limit {limit:.2e}, largest entry {largest:.2e}"


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two entries."""
    return (a.detach().double() - b.detach().double()).abs().max().item()


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
