"""The teacher's forward pass on a GPU: as the official code runs it, in bfloat16, compiled, and as part of peak."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from feature_store.teacher.model import load_teacher, prepare_for_gpu

REPEATS = 20
DENSE_BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
"""FLOP/s the makers state for dense bfloat16, by what the device's name contains."""


def forward_variants(name: str, kwargs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Images per second of each way to run a model, and the best one's share of the GPU's bfloat16 peak."""
    rates = {
        "float32_eager": _rate(name, kwargs, "float32", batch, plain=True),
        "bfloat16": _rate(name, kwargs, "bfloat16", batch),
        "bfloat16_compiled": _rate(name, kwargs, "bfloat16", batch, compiled=True),
    }
    device = torch.cuda.get_device_name()
    peak = next((peak for part, peak in DENSE_BF16_PEAK.items() if part in device), None)
    flops = _flops_per_image(name, kwargs)
    share = None if peak is None else max(rates.values()) * flops / peak
    return {
        "device": device,
        "model": name,
        "batch": batch,
        "images_per_second": rates,
        "over_float32_eager": {way: rate / rates["float32_eager"] for way, rate in rates.items()},
        "gflops_per_image": flops / 1e9,
        "share_of_bfloat16_peak": share,
    }


def _rate(
    name: str, kwargs: Mapping[str, Any], dtype: str, batch: int, *, plain: bool = False, compiled: bool = False
) -> float:
    teacher = load_teacher(name, pretrained=False, model_kwargs=kwargs, compute_dtype=dtype, device="cuda")
    if not plain:
        prepare_for_gpu(teacher)
    run = torch.compile(teacher, dynamic=False) if compiled else teacher
    pixels = torch.randint(0, 256, (batch, *teacher.info.input_size, 3), dtype=torch.uint8, device="cuda")
    seconds = []
    for repeat in range(REPEATS + 5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(pixels)
        end.record()
        end.synchronize()
        if repeat >= 5:
            seconds.append(begin.elapsed_time(end) / 1000)
    return batch / statistics.median(seconds)


def _flops_per_image(name: str, kwargs: Mapping[str, Any]) -> float:
    teacher = load_teacher(name, pretrained=False, model_kwargs=kwargs)
    with FlopCounterMode(display=False) as counter:
        teacher(torch.zeros(1, *teacher.info.input_size, 3, dtype=torch.uint8))
    return float(counter.get_total_flops())
