"""The batcher: everyone gets their own rows, whatever others do; what gives up costs nothing; the queue is bounded."""

import asyncio
import threading
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import InputError, ResourceError
from teacher_service.serve.live.batcher import Batcher, BatchRecord, BusyError, DeadlineError, DeviceFaultError

SHAPE = (2, 3)


def rows(*marks: int) -> np.ndarray:
    """One row per mark, filled with it."""
    return np.stack([np.full(SHAPE, mark, np.uint8) for mark in marks])


class Model:
    """Doubles rows; holds every batch back until released, and keeps the marks it saw."""

    def __init__(self, held: bool = False) -> None:
        self.seen: list[list[int]] = []
        self.entered, self.release = threading.Semaphore(0), threading.Semaphore(0)
        self.held, self.errors = held, {}

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        marks = batch[:, 0, 0].tolist()
        self.seen.append(marks)
        self.entered.release()
        if self.held:
            assert self.release.acquire(timeout=10)
        for mark, error in self.errors.items():
            if mark in marks:
                raise error
        return {"twice": batch.astype(np.int64) * 2, "mark": batch[:, 0, 0].copy()}


@pytest.fixture
def make():
    made = []

    def batcher(model, **options):
        made.append(Batcher(model, SHAPE, **{"max_wait": 0.0, **options}))
        return made[-1]

    yield batcher
    for each in made:
        assert each.close(10)


def answer_is_of(answer, marks) -> bool:
    return answer["mark"].tolist() == list(marks) and bool((answer["twice"] == 2 * rows(*marks).astype(int)).all())


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=24),
    max_rows=st.integers(1, 8),
    threads=st.integers(1, 4),
    cancelled=st.sets(st.integers(0, 23)),
)
def test_every_answer_is_of_its_own_rows_when_requests_of_any_size_come_from_many_threads(
    sizes, max_rows, threads, cancelled
):
    model = Model()
    batcher = Batcher(model, SHAPE, max_rows=max_rows, max_wait=0.001, queue_rows=1000)
    starts = np.cumsum([0, *sizes])
    marks = [[(start + i) % 251 for i in range(size)] for start, size in zip(starts, sizes, strict=False)]
    futures: dict[int, object] = {}

    def send(which: int) -> None:
        for at in range(which, len(sizes), threads):
            futures[at] = batcher.submit(rows(*marks[at]))
            if at in cancelled:
                futures[at].cancel()

    senders = [threading.Thread(target=send, args=(which,)) for which in range(threads)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert batcher.close(10)
    for at, future in futures.items():
        assert future.cancelled() or answer_is_of(future.result(0), marks[at])
    assert all(len(batch) <= max_rows for batch in model.seen)
    kept = sum(sizes[at] for at, future in futures.items() if not future.cancelled())
    assert sum(map(len, model.seen)) == kept
    assert batcher.waiting == 0


def test_batches_are_full_when_rows_wait(make):
    model = Model(held=True)
    batcher = make(model, max_rows=4)
    futures = [batcher.submit(rows(0))]
    assert model.entered.acquire(timeout=10)
    futures += [batcher.submit(rows(*marks)) for marks in ([1, 2, 3], [4, 5, 6], [7], [8, 9, 10, 11, 12])]
    assert batcher.waiting == 12
    for _ in range(4):
        model.release.release()
    assert answer_is_of(futures[-1].result(10), [8, 9, 10, 11, 12])
    assert model.seen == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def test_first_rows_wait_for_others_when_the_batch_is_not_full(make):
    model = Model()
    batcher = make(model, max_rows=3, max_wait=30)
    first = batcher.submit(rows(1))
    assert not wait([first], 0.05).done
    rest = batcher.submit(rows(2, 3))
    assert answer_is_of(first.result(10), [1])
    assert answer_is_of(rest.result(10), [2, 3])
    assert model.seen == [[1, 2, 3]]


def test_cancelled_rows_are_never_computed_when_they_still_wait(make):
    model = Model(held=True)
    batcher = make(model, max_rows=2, queue_rows=4)
    running = batcher.submit(rows(0))
    assert model.entered.acquire(timeout=10)
    given_up = [batcher.submit(rows(1, 2)), batcher.submit(rows(3, 4))]
    with pytest.raises(BusyError):
        running_full = batcher.submit(rows(5))  # noqa: F841
    assert all(future.cancel() for future in given_up)
    kept = batcher.submit(rows(5, 6, 7))  # their room is free again
    for _ in range(3):
        model.release.release()
    assert answer_is_of(kept.result(10), [5, 6, 7])
    assert answer_is_of(running.result(10), [0])
    assert model.seen == [[0], [5, 6], [7]]
    with pytest.raises(CancelledError):
        given_up[0].result(0)


def test_rest_of_a_request_is_dropped_when_its_caller_gives_up_between_batches(make):
    model = Model(held=True)
    batcher = make(model, max_rows=2)

    async def give_up() -> None:
        task = asyncio.create_task(batcher.compute(rows(1, 2, 3, 4, 5, 6)))
        await asyncio.to_thread(model.entered.acquire, timeout=10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.held = False
        model.release.release()
        other = await batcher.compute(rows(9))
        assert answer_is_of(other, [9])

    asyncio.run(give_up())
    assert model.seen == [[1, 2], [9]]


def test_requests_beyond_the_queue_are_refused_when_it_is_full(make):
    model = Model(held=True)
    batcher = make(model, max_rows=2, queue_rows=3)
    running = batcher.submit(rows(0))
    assert model.entered.acquire(timeout=10)
    waiting = batcher.submit(rows(1, 2))
    with pytest.raises(BusyError, match="2 rows wait already, and 2 more exceed the queue of 3") as refused:
        batcher.submit(rows(3, 4))
    assert refused.value.retry_after >= 1
    fits = batcher.submit(rows(5))
    for _ in range(3):
        model.release.release()
    assert [answer_is_of(f.result(10), m) for f, m in ((running, [0]), (waiting, [1, 2]), (fits, [5]))] == [True] * 3


def test_rows_are_given_up_when_their_deadline_passes_in_the_queue(make):
    model = Model(held=True)
    now = [0.0]
    batcher = make(model, max_rows=2, clock=lambda: now[0])
    running = batcher.submit(rows(0))
    assert model.entered.acquire(timeout=10)
    late, in_time = batcher.submit(rows(1), timeout=5), batcher.submit(rows(2), timeout=50)
    now[0] = 6.0
    model.held = False
    model.release.release()
    with pytest.raises(DeadlineError, match="no answer by the deadline"):
        late.result(10)
    assert answer_is_of(in_time.result(10), [2])
    assert answer_is_of(running.result(10), [0])
    assert model.seen == [[0], [2]]


def test_caller_is_told_in_time_when_the_model_is_slower_than_the_deadline(make):
    model = Model(held=True)
    batcher = make(model)

    async def ask() -> None:
        with pytest.raises(DeadlineError):
            await batcher.compute(rows(1), timeout=0.02)

    asyncio.run(ask())
    model.release.release()


def test_errors_reach_only_their_batch_when_the_model_raises(make):
    model = Model(held=True)
    model.errors[3] = ValueError("three")
    batcher = make(model, max_rows=2)
    futures = [batcher.submit(rows(*marks)) for marks in ([0, 1], [2], [3, 4, 5], [6])]
    for _ in range(4):
        model.release.release()
    assert answer_is_of(futures[0].result(10), [0, 1])
    for hit in futures[1:3]:
        with pytest.raises(ValueError, match="three"):
            hit.result(10)
    assert answer_is_of(futures[3].result(10), [6])
    assert model.seen == [[0, 1], [2, 3], [6]]  # rows 4 and 5 were not computed in vain
    assert batcher.fault == ""


def test_everything_is_refused_when_the_device_is_lost(make):
    model = Model(held=True)
    model.errors[1] = DeviceFaultError("cuda:0 fell off the bus; start the service again")
    batcher = make(model, max_rows=1)
    hit, waiting = batcher.submit(rows(1)), batcher.submit(rows(2))
    model.release.release()
    for future in (hit, waiting):
        with pytest.raises(DeviceFaultError, match="fell off the bus"):
            future.result(10)
    assert "fell off the bus" in batcher.fault
    with pytest.raises(DeviceFaultError, match="fell off the bus"):
        batcher.submit(rows(3))
    assert model.seen == [[1]]


def test_waiting_rows_are_answered_when_it_closes(make):
    model = Model(held=True)
    batcher = make(model, max_rows=2, max_wait=30)
    futures = [batcher.submit(rows(mark)) for mark in (1, 2, 3)]
    assert not batcher.close(0.01)
    with pytest.raises(ResourceError, match="shutting down"):
        batcher.submit(rows(4))
    for _ in range(2):
        model.release.release()
    assert batcher.close(10)
    assert all(answer_is_of(future.result(0), [mark]) for mark, future in enumerate(futures, 1))


@pytest.mark.parametrize(
    "bad", [rows(1)[:, :1], rows(1).astype(np.int64), rows(1)[:0], np.zeros((9, *SHAPE), np.uint8)]
)
def test_rows_are_refused_when_they_do_not_fit(make, bad):
    with pytest.raises(InputError, match="got"):
        make(Model(), max_rows=2, queue_rows=8).submit(bad)


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"max_wait": -1.0}, {"max_rows": 8, "queue_rows": 7}])
def test_batcher_is_refused_when_its_numbers_cannot_work(options):
    with pytest.raises(InputError, match="expected"):
        Batcher(Model(), SHAPE, **options)


def test_metrics_are_told_of_each_batch_when_it_was_computed(make):
    told: list[BatchRecord] = []
    batcher = make(Model(), max_rows=3, max_wait=30, observe=told.append)
    futures = [batcher.submit(rows(1)), batcher.submit(rows(2, 3))]
    wait(futures, 10)
    batcher.close(10)
    assert [(record.rows, record.requests) for record in told] == [(3, 2)]
    assert told[0].waited >= 0
    assert told[0].seconds >= 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_batcher_says_it_is_dead_when_its_thread_died_with_an_empty_queue(make):
    class ForgetfulModel(Model):
        def __call__(self, batch):
            return {"mark": None}  # cannot be cut into answers

    batcher = make(ForgetfulModel())
    future = batcher.submit(rows(1))
    with pytest.raises(DeviceFaultError, match="thread died"):
        future.result(10)
    assert "thread died" in batcher.fault
    with pytest.raises(DeviceFaultError, match="thread died"):
        batcher.submit(rows(2))


def test_rows_are_refused_when_they_could_not_be_answered_by_their_deadline(make):
    """A queue longer than the deadline would be computed for callers who have all left."""
    model, now = Model(held=True), [0.0]
    batcher = make(model, max_rows=2, queue_rows=100, clock=lambda: now[0])
    first = batcher.submit(rows(0, 1), timeout=5)
    assert model.entered.acquire(timeout=10)
    unknown = batcher.submit(rows(2, 3), timeout=5)  # nothing was computed yet: who knows
    now[0] = 2.0
    model.release.release()
    assert answer_is_of(first.result(10), [0, 1])  # a row a second
    assert model.entered.acquire(timeout=10)
    fits = batcher.submit(rows(4, 5, 6), timeout=6)
    for refuse in (lambda: batcher.submit(rows(7, 8), timeout=6), lambda: batcher.require_room(2, timeout=6)):
        with pytest.raises(
            BusyError, match="5 rows come first, and with 2 more would take 7 seconds where 6"
        ) as refused:
            refuse()
        assert refused.value.retry_after >= 1
    patient = batcher.submit(rows(9), timeout=60)
    for _ in range(4):
        model.release.release()
    assert answer_is_of(unknown.result(10), [2, 3])
    assert answer_is_of(fits.result(10), [4, 5, 6])
    assert answer_is_of(patient.result(10), [9])


def test_rows_are_taken_when_nothing_waits_though_they_may_be_late(make):
    model, now = Model(), [0.0]

    def slow(batch):
        now[0] += 10.0
        return model(batch)

    batcher = make(slow, max_rows=2, clock=lambda: now[0])
    assert answer_is_of(batcher.submit(rows(1)).result(10), [1])
    assert answer_is_of(batcher.submit(rows(1), timeout=5).result(10), [1])  # the speed learned may be wrong by now
