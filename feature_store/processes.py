"""Things that belong to one process: threads, locks and connections do not survive a fork or a pickle."""

import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A value made on first use in each process.

    After a fork the child makes its own and leaves the parent's alone: what it inherited may be locked by, or wait
    for, a thread that exists in the parent only.

    Args:
        make: Makes it; must be picklable if the owner is.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[int, T] | None = None

    def __reduce__(self):
        return PerProcess, (self._make,)

    def __call__(self) -> T:
        """This process's value."""
        made = self._made
        if made is None or made[0] != os.getpid():
            made = self._made = (os.getpid(), self._make())
        return made[1]
