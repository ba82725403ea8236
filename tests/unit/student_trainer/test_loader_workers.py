"""Workers that cannot make or hand over a batch: an error in bounded time, never a wait without end."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Sampler

from feature_store.errors import InputError, ResourceError, UserError
from feature_store.format.addressing import RowId
from student_trainer.data.batch import Batch, RawFeatures, ViewDataset
from student_trainer.data.loader import BatchLoader, worker_failures_told

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


class Rows(ViewDataset):
    """A data set that does something else than to make its third batch."""

    def __init__(self, instead=lambda: None) -> None:  # nothing of a real one
        self.instead = instead

    def __getitem__(self, rows):
        if rows[0].position == 2:
            self.instead()
        logits = torch.zeros(1, 4) if rows[0].position else None
        raw = RawFeatures({"stage4": {"": torch.ones(1, 0), "scale": torch.ones(1)}}, logits)
        pixels = torch.ones(1, 8, 8, 3, dtype=torch.uint8)
        return Batch(torch.tensor(rows), pixels, torch.tensor([rows[0].position]), (raw,), [])


class InOrder(Sampler[list[RowId]]):
    """Four batches of one row."""

    def __iter__(self):
        return iter([[RowId(0, position, 0)] for position in range(4)])


def load(instead=lambda: None, workers=1, **options) -> list[int]:
    loader = BatchLoader(Rows(instead), InOrder(), workers=workers, start_method="fork", **options)
    try:
        with worker_failures_told():
            return [int(batch.labels) for batch in loader]
    finally:
        loader.close()


def full(*_) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


def refuse() -> None:
    raise InputError("the third batch cannot be made")


def run_out() -> None:
    raise MemoryError


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_when_made_by_workers(workers):
    assert load(workers=workers) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("instead", "kind", "message"),
    [
        (refuse, InputError, "^the third batch cannot be made$"),
        (
            run_out,
            ResourceError,
            "memory ran out while a batch was made; use fewer --workers or a smaller --batch-size",
        ),
        (
            lambda: os._exit(1),
            ResourceError,
            r"a process that makes batches died: .*use fewer --workers \(0 for none\)",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), ResourceError, "a process that makes batches died"),
    ],
)
def test_loading_ends_with_the_reason_when_a_worker_cannot_make_a_batch(instead, kind, message):
    with pytest.raises(UserError, match=message) as raised:
        load(instead)
    assert type(raised.value) is kind


def test_loading_names_shared_memory_and_the_remedy_when_it_is_full(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000, total=64_000_000))
    with pytest.raises(
        ResourceError,
        match=r"handed over, /dev/shm \(shared memory\) has 2.0 MB of 64.0 MB free: unable to allocate .*"
        r"--shm-size=8g, .* fewer --workers \(0 needs none\)",
    ):
        load()
    assert load(workers=0) == [0, 1, 2, 3]


def test_loading_names_shared_memory_when_it_has_no_room_to_start_workers(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000, total=64_000_000))
    with pytest.raises(ResourceError, match=r"workers cannot be started, /dev/shm .*shm-size"):
        load()


def test_loading_ends_when_a_worker_hangs():
    with pytest.raises(ResourceError, match=r"no batch came for 1 seconds: a process that makes batches hangs"):
        load(lambda: time.sleep(600), stalled_seconds=1.0)
