"""Contenders measured in turn, so that what else the machine does hurts all alike; ratios are within a round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Measured = TypeVar("Measured")
Seconds = Mapping[str, Sequence[float]]


def take_turns(
    turns: Mapping[str, Callable[[int], Measured]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[Measured]]:
    """Results of each contender's turns, by round; each round starts with another contender.

    Args:
        turns: Functions of the number of the round, which counts the rounds of the warm-up too.
        rounds: Rounds whose results are kept.
        warm_up: Rounds before them.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = turns[name](number)
            if number >= warm_up:
                measured[name].append(result)
    return measured


def timed(run: Callable[[int], object], synchronise: Callable[[], object] = lambda: None) -> Callable[[int], float]:
    """A turn that returns the seconds of a call, from the end of what a GPU still had to do to the end of the call."""

    def turn(number: int) -> float:
        synchronise()
        begun = time.perf_counter()
        run(number)
        synchronise()
        return time.perf_counter() - begun

    return turn


def medians(seconds: Seconds) -> dict[str, float]:
    """Median seconds by contender."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Seconds, name: str, other: str) -> float:
    """Median over rounds of one's time over the other's in the same round: what slows a round slows both."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))
