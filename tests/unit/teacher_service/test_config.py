from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from tiny_jobs import make_config

from feature_store import processes
from feature_store.errors import InputError
from teacher_service import config
from teacher_service.config import CacheConfig, PlanConfig


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("views", 0, "--views is 0"),
        ("seed", -1, "--seed is -1"),
        ("seed", 2**64, "64-bit"),
        ("policy_options", {"size": [16, 16]}, "--policy-options is .*'size'.*, expected other fields"),
        ("capacity", 0, "--capacity is 0"),
        ("key_width", -1, "--key-width is -1"),
        ("taps", ("stage3",), "stage4"),
        ("batch_size", 0, "--batch-size is 0"),
        ("workers", -1, "--workers is -1"),
        ("lease_seconds", 0.0, "--lease-seconds is 0.0"),
        ("lease_seconds", float("inf"), "--lease-seconds is inf"),
        ("time_samples", 1, "--time-samples is 1"),
        ("metrics_port", 65536, "--metrics-port is 65536"),
        ("ray_address", "auto", "--ray-address is auto, expected --engine ray with it"),
        ("num_actors", 0, "--num-actors is 0"),
    ],
)
def test_cache_config_refuses_a_value_no_run_can_use(option: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_config(CacheConfig, tars=("a.tar",), teacher="test_vit", store=Path("s"), **{option: value})


@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (2, 2), (64, 4)])
def test_cache_takes_no_more_workers_by_default_than_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, workers: int
) -> None:
    monkeypatch.setattr(processes, "usable_cpus", lambda: cpus)
    assert run_path(config.__file__)["ComputeSpec"]().workers == workers


def test_cache_config_needs_a_store_when_plan_does_not() -> None:
    assert make_config(PlanConfig, tars=("a.tar",), teacher="test_vit").store == Path("store")
    with pytest.raises(TypeError, match="store"):
        make_config(CacheConfig, tars=("a.tar",), teacher="test_vit")
