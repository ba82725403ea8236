import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_jobs import noise_samples, write_tar

from feature_store.errors import ResourceError, UserError
from feature_store.inputs.tar import Tar
from feature_store.views import apply_view, decode_image, draw_view, pixel_crc, view_policy
from teacher_service.cache import decode as decoding
from teacher_service.cache.decode import Span, Task, ViewBatch, ViewDataset, batch_spans, read_batches


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., ViewDataset]:
    def make(*extra: dict) -> ViewDataset:
        tar = write_tar(tmp_path / "images.tar", [*noise_samples("s", 4), *extra])
        return ViewDataset([Tar.open(tar)], view_policy("a2", (24, 32)), seed=9)

    return make


def _batch(dataset: ViewDataset, start: int, stop: int, views: range = range(3)) -> ViewBatch:
    batch = dataset[Span(Task(0, views), start, stop)]
    assert isinstance(batch, ViewBatch)
    return batch


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), images=st.integers(1, 30), data=st.data())
def test_batch_spans_of_a_unit_do_not_depend_on_the_others(sizes: list[int], images: int, data: st.DataObject) -> None:
    units = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    tasks = [Task(unit, range(unit % 2, 4)) for unit in units]

    spans = list(batch_spans(tasks, sizes, images))

    assert [span for task in tasks for span in batch_spans([task], sizes, images)] == spans
    assert [(s.task, i) for s in spans for i in range(s.start, s.stop)] == [
        (task, i) for task in tasks for i in range(sizes[task.unit])
    ]
    assert all(0 < span.stop - span.start <= max(1, images // len(span.task.views)) for span in spans)


def test_dataset_gives_every_view_of_the_contract(make_dataset: Callable[..., ViewDataset]) -> None:
    dataset = make_dataset()

    batch = _batch(dataset, 1, 4)

    assert batch.pixels.shape == (3, 3, 24, 32, 3)
    assert batch.pixels.dtype == torch.uint8
    for i, position in enumerate(range(1, 4)):
        sample = dataset.tars[0].read(position)
        image = decode_image(sample.image)
        assert batch.labels[i] == sample.label
        for view in range(3):
            params = draw_view(dataset.policy, 9, sample.key, view, image.size)
            pixels = apply_view(image, params, (24, 32))
            assert batch.params[view][i] == params
            assert batch.pixel_crc[view, i] == pixel_crc(pixels)
            np.testing.assert_array_equal(batch.pixels[i, view], pixels)


def test_dataset_cuts_later_views_as_if_all_were_cut(make_dataset: Callable[..., ViewDataset]) -> None:
    everything, later = _batch(make_dataset(), 0, 4), _batch(make_dataset(), 0, 4, range(1, 3))

    assert later.params == everything.params[1:]
    np.testing.assert_array_equal(later.pixel_crc, everything.pixel_crc[1:])


def test_dataset_decodes_each_image_once_when_many_views_are_cut(
    make_dataset: Callable[..., ViewDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(decoding, "decode_image", lambda data: decoded.append(data) or decode_image(data))

    _batch(make_dataset(), 0, 4, range(5))

    assert len(decoded) == 4


def test_dataset_keeps_place_and_label_when_an_image_is_broken(make_dataset: Callable[..., ViewDataset]) -> None:
    broken = {"__key__": "t0", "png": b"?", "cls": b"3"}
    nameless = {"__key__": "t1", "png": b"?"}
    batch = _batch(make_dataset(broken, nameless), 3, 6)

    assert sorted(batch.quarantined) == [4, 5]
    assert batch.labels.tolist() == [3, 3, -1]
    assert [params is None for params in batch.params[2]] == [False, True, True]
    assert batch.pixel_crc[:, 1:].tolist() == [[0, 0]] * 3
    assert batch.pixels[0].any()
    assert not batch.pixels[1:].any()


def test_read_batches_raises_the_users_error_when_a_tar_changes(
    make_dataset: Callable[..., ViewDataset], tmp_path: Path
) -> None:
    dataset = make_dataset()
    (tmp_path / "images.tar").write_bytes(b"short")

    with pytest.raises(UserError, match=r"images\.tar changed while in use"):
        list(read_batches(dataset, [Span(Task(0, range(3)), 0, 2)], most_images=4, workers=0, pin_memory=False))


def test_read_batches_says_what_to_do_when_memory_runs_out_and_quarantines_nothing(
    make_dataset: Callable[..., ViewDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(data: bytes) -> None:
        raise MemoryError

    dataset = make_dataset()
    monkeypatch.setattr(decoding, "decode_image", too_large)

    with pytest.raises(ResourceError, match="memory ran out while images of .* use fewer --workers"):
        list(read_batches(dataset, [Span(Task(0, range(3)), 0, 2)], most_images=6, workers=0, pin_memory=False))


def test_read_batches_says_what_to_do_when_a_worker_dies(
    make_dataset: Callable[..., ViewDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        def __iter__(self):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. \nmore")

    monkeypatch.setattr(decoding, "DataLoader", lambda *args, **kwargs: Dying())

    with pytest.raises(ResourceError, match=r"decode worker died .*Bus error.*--workers"):
        list(read_batches(make_dataset(), [Span(Task(0, range(3)), 0, 1)], most_images=4, workers=0, pin_memory=False))


def test_read_batches_says_what_to_do_when_shared_memory_is_too_small(make_dataset: Callable[..., ViewDataset]) -> None:
    spans = [Span(Task(0, range(1)), 0, 1)]

    with pytest.raises(ResourceError, match=r"need 6\.9 EB of shared memory: .*--workers or a smaller --batch-size"):
        next(read_batches(make_dataset(), spans, most_images=10**15, workers=1, pin_memory=False))


@pytest.mark.parametrize(("workers", "ahead"), [(0, 1), (1, 3), (2, 5)])
def test_read_batches_pulls_few_tasks_ahead_when_tasks_never_end(
    make_dataset: Callable[..., ViewDataset], workers: int, ahead: int
) -> None:
    pulled: list[Task] = []

    def endless():
        while True:
            pulled.append(Task(0, range(1)))
            yield pulled[-1]

    dataset = make_dataset()
    batches = read_batches(dataset, batch_spans(endless(), [4], 4), most_images=4, workers=workers, pin_memory=False)
    for number in range(1, 5):
        batch = next(batches)
        assert batch.seconds > 0
        assert len(pulled) <= number + ahead - 1
    batches.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_read_batches_gives_the_datasets_pixels_when_their_memory_is_used_again(
    make_dataset: Callable[..., ViewDataset], workers: int
) -> None:
    dataset = make_dataset({"__key__": "t0", "png": b"?", "cls": b"3"})
    spans = list(batch_spans([Task(0, range(view, view + 2)) for view in range(8)], [5], 6))
    storages = set()

    batches = read_batches(dataset, spans, most_images=6, workers=workers, pin_memory=False)
    for span, batch in zip(spans, batches, strict=True):
        time.sleep(0.02)  # so that workers get as far ahead as they may
        assert torch.equal(batch.pixels, _batch(dataset, span.start, span.stop, span.task.views).pixels)
        storages.add(batch.pixels.untyped_storage().data_ptr())

    assert len(spans) > workers * decoding.PREFETCH + 1
    assert len(storages) == 1


_READ_FOR_EVER = """
import sys, time
from multiprocessing import active_children
from itertools import repeat
from feature_store.inputs.tar import Tar
from feature_store.views import view_policy
from teacher_service.cache.decode import Task, ViewDataset, batch_spans, read_batches

if __name__ == "__main__":
    dataset = ViewDataset([Tar.open(sys.argv[1])], view_policy("rrc_flip", (8, 8)), 0)
    spans = batch_spans(repeat(Task(0, range(1))), [1], 1)
    batches = read_batches(dataset, spans, most_images=1, workers=1, pin_memory=False)
    next(batches)
    print(*[child.pid for child in active_children()], flush=True)
    time.sleep(600)
"""


def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "one.tar", noise_samples("s", 1))
    script = tmp_path / "read.py"
    script.write_text(_READ_FOR_EVER)
    with subprocess.Popen([sys.executable, script, tar], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        (worker,) = map(int, main.stdout.readline().split())
        assert _is_running(worker)
        main.kill()

    deadline = time.monotonic() + 30
    while _is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(process: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
