"""Signals that stop a run: when they raise, what they say, which handlers are left after it."""

import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest

from student_trainer.engine.stopping import SIGNALS, Stop, Stopped, stop_on_signals


class Exited(BaseException):
    """Stands in for the end of this process."""


@pytest.fixture
def exits(monkeypatch) -> list[int]:
    """Exit codes given to os._exit, which does not end this process."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    return codes


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in seconds: its last value."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    return times


def test_signal_raises_with_the_shells_code_and_the_note_of_the_moment():
    stop = Stop()
    assert stop.signal is None
    stop.check()
    stop.note = "stopped at step 3, saved"
    with pytest.raises(Stopped) as raised:
        stop.handle(signal.SIGTERM, None)
    assert stop.signal == signal.SIGTERM
    assert (raised.value.code, raised.value.signal) == (143, signal.SIGTERM)
    assert str(raised.value) == "SIGTERM: stopped at step 3, saved"
    assert isinstance(raised.value, SystemExit)


def test_first_note_says_how_to_start_again():
    with pytest.raises(Stopped, match=r"^SIGINT: stopped while starting; start again with --resume$"):
        Stop().handle(signal.SIGINT, None)


def test_signal_is_kept_until_the_outermost_context_that_holds_it_ends():
    stop, outer = Stop(), ExitStack()
    outer.enter_context(stop.held())
    with stop.held():
        stop.handle(signal.SIGHUP, None)
    assert stop.signal == signal.SIGHUP
    with pytest.raises(Stopped, match="SIGHUP"):
        outer.close()


def test_signal_of_one_of_several_processes_does_not_raise_but_where_it_is_asked_for():
    stop = Stop()
    stop.raises = False
    with stop.held():
        stop.handle(signal.SIGTERM, None)
    with pytest.raises(Stopped, match="SIGTERM"):
        stop.check()
    with pytest.raises(Stopped), stop.at_once():
        pytest.fail("the signal came before")
    assert not stop.raises
    assert stop.now().code == 143


def test_signal_raises_at_once_where_a_group_asks_for_it():
    stop = Stop()
    stop.raises = False
    with stop.at_once(), pytest.raises(Stopped):
        stop.handle(signal.SIGUSR1, None)
    assert not stop.raises


def test_process_that_got_no_signal_stops_with_the_code_of_sigterm():
    stop = Stop()
    assert (stop.now().code, stop.now().signal) == (143, signal.SIGTERM)
    stop.signal = signal.SIGUSR1
    assert stop.now().code == 128 + signal.SIGUSR1


@pytest.mark.parametrize(("seconds", "ends"), [(0.0, False), (2.0, False), (2.1, True)])
def test_second_signal_ends_the_process_unless_it_repeats_the_first(exits, clock, seconds, ends):
    stop = Stop()
    stop.raises = False
    stop.handle(signal.SIGTERM, None)
    clock.append(clock[-1] + seconds)
    if ends:
        with pytest.raises(Exited):
            stop.handle(signal.SIGINT, None)
    else:
        stop.handle(signal.SIGINT, None)
    assert exits == ([130] if ends else [])
    assert stop.signal == signal.SIGTERM


def test_handlers_are_set_within_and_the_earlier_ones_are_back_after_it():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        with stop_on_signals() as stop, pytest.raises(Stopped) as raised:
            signal.raise_signal(number)
        assert (stop.signal, raised.value.code) == (number, 128 + number)
        assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
            assert signal.getsignal(signal.SIGTERM) == stop.handle
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_handled_outside_the_main_thread():
    before, found = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with stop_on_signals() as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(None, before)]
