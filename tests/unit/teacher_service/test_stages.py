import threading

import pytest

from teacher_service.cache.stage import Stage


def test_stage_runs_calls_in_order_when_it_has_one_thread() -> None:
    done: list[int] = []
    with Stage("s", threads=1, waiting=2) as stage:
        for number in range(9):
            stage.submit(done.append, number)

    assert done == list(range(9))


@pytest.mark.parametrize(("threads", "waiting"), [(1, 0), (1, 1), (2, 3)])
def test_stage_holds_the_caller_back_when_its_queue_is_full(threads: int, waiting: int) -> None:
    release, submitted = threading.Event(), threading.Semaphore(0)

    def fill() -> None:
        for _ in range(threads + waiting + 1):
            stage.submit(release.wait, 20)
            submitted.release()

    with Stage("s", threads=threads, waiting=waiting) as stage:
        caller = threading.Thread(target=fill)
        caller.start()
        for _ in range(threads + waiting):
            assert submitted.acquire(timeout=20)
        assert not submitted.acquire(timeout=0.1)
        release.set()
        assert submitted.acquire(timeout=20)
        caller.join()


def test_stage_raises_what_a_call_raised_and_runs_no_more() -> None:
    done: list[int] = []

    def submit_for_ever() -> None:
        with Stage("s", threads=1, waiting=0) as stage:
            stage.submit(_fail, "first")
            while True:
                stage.submit(done.append, 1)

    with pytest.raises(ValueError, match="first"):
        submit_for_ever()
    assert not done


def test_stage_raises_at_the_end_when_the_last_call_fails() -> None:
    stage = Stage("s", threads=1, waiting=4)
    stage.submit(_fail, "last")

    with pytest.raises(ValueError, match="last"), stage:
        pass


def _fail(words: str) -> None:
    raise ValueError(words)


def test_stage_finishes_what_it_began_and_drops_the_rest_when_interrupted() -> None:
    begun, release, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert release.wait(20)
        done.append(1)

    stage = Stage("s", threads=1, waiting=1)
    stage.submit(first)
    stage.submit(done.append, 2)
    assert begun.wait(20)
    threading.Timer(0.1, release.set).start()
    with pytest.raises(KeyboardInterrupt), stage:
        raise KeyboardInterrupt

    assert done == [1]


def test_stage_lets_a_blocked_caller_go_when_it_ends_after_an_error() -> None:
    """An encode thread that waits for the writer must not wait for ever when the job is interrupted."""
    release, outcome = threading.Event(), []

    def submit_blocked() -> None:
        try:
            stage.submit(release.wait, 20)
        except KeyboardInterrupt:
            outcome.append("let go")

    stage = Stage("s", threads=1, waiting=0)
    stage.submit(release.wait, 20)
    blocked = threading.Thread(target=submit_blocked)
    blocked.start()
    threading.Timer(0.1, release.set).start()
    with pytest.raises(KeyboardInterrupt), stage:
        raise KeyboardInterrupt
    blocked.join(20)

    assert outcome == ["let go"]
