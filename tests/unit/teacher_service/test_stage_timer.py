import pytest

from teacher_service.cache import stage_timer
from teacher_service.cache.stage_timer import StageTimer, StageTimes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the stages take for the time; starts at 100."""
    now = [100.0]
    monkeypatch.setattr(stage_timer.time, "perf_counter", lambda: now[0])
    return now


def test_timer_shares_the_time_since_the_first_batch_among_a_stages_workers(clock: list[float]) -> None:
    measured = StageTimer({"decode": 4})
    clock[0] += 50  # start-up
    measured.start()
    with measured.busy("forward"):
        clock[0] += 6
    measured.add("decode", 30)
    clock[0] += 4

    times = measured.times()

    assert times.available["decode"] == 40
    assert (times.share("decode"), times.share("forward"), times.share("write")) == (0.75, 0.6, 0)
    assert times.waited("forward") == pytest.approx(0.4)
    assert times.bottleneck == "decode"
    assert str(times) == "teacher waited 40% of the time, bottleneck: decode"


def test_timer_knows_nothing_before_the_first_batch(clock: list[float]) -> None:
    clock[0] += 5

    assert StageTimer().times().share("forward") == 0


def test_stage_times_weigh_pipelines_by_their_time_when_joined() -> None:
    short = StageTimes({"forward": 1.0}, {"forward": 1.0, "encode": 2.0})
    long = StageTimes({"forward": 3.0, "encode": 4.0}, {"forward": 9.0, "encode": 18.0})

    together = StageTimes.together([short, long])

    assert together.share("forward") == pytest.approx(0.4)
    assert together.share("encode") == pytest.approx(0.2)
