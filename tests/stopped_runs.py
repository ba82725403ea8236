"""Stops training runs of this process at a given moment, by what torch offers, whatever the loop is made of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the trainer may handle it."""


@contextmanager
def before_updates(act: Callable[[int, Optimizer], None]) -> Iterator[None]:
    """Within: ``act(number, optimizer)`` is called before every update, counted from 1."""
    numbers = count(1)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: act(next(numbers), optimizer))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def at_update(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Within: ``act()`` is called once, before this update, counted from 1."""
    with before_updates(lambda reached, _: act() if reached == number else None):
        yield


@contextmanager
def killed_at_update(number: int) -> Iterator[None]:
    """Within: a run is killed instead of making this update; that is expected."""

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed), at_update(number, kill):
        yield


@contextmanager
def killed_at_save(due: Callable[[], bool]) -> Iterator[None]:
    """Within: a run is killed instead of writing its first checkpoint for which ``due()``; that is expected."""
    save = torch.save

    def dying(*arguments, **options) -> None:
        if due():
            raise Killed
        save(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", dying)
        with pytest.raises(Killed):
            yield
