import gc

import numpy as np
import pytest

from teacher_service.serve.live.batcher import BusyError
from teacher_service.serve.memory import ResponseMemory

MIB = 1 << 20


def test_memory_counts_until_the_last_view_of_an_array_is_gone():
    memory = ResponseMemory(10 * MIB, keep=0)
    view = memoryview(memory.array(3 * MIB, memory.reserve(3 * MIB)).view(np.float16).reshape(-1, 2)[5:])
    piece = view.cast("B")[7:9]
    del view
    assert memory.used == 3 * MIB
    del piece
    assert memory.used == 0


def test_reservation_counts_as_long_as_arrays_bound_to_it():
    memory = ResponseMemory(10 * MIB, keep=0)
    reservation = memory.reserve(2 * MIB)
    made = reservation.bind(np.zeros(5))
    del reservation
    assert memory.used == 2 * MIB
    del made
    assert memory.used == 0


def test_reservation_given_back_early_is_given_back_once():
    memory = ResponseMemory(10 * MIB, keep=0)
    reservation = memory.reserve(2 * MIB)
    reservation.release()
    reservation.release()
    del reservation
    assert memory.used == 0


def test_reserve_refuses_what_exceeds_the_limit_and_changes_nothing():
    memory = ResponseMemory(10 * MIB, keep=0)
    taken = memory.reserve(6 * MIB)
    with pytest.raises(BusyError, match="try again later") as refused:
        memory.reserve(5 * MIB)
    assert refused.value.retry_after >= 1
    assert memory.used == 6 * MIB
    del taken
    memory.reserve(10 * MIB)


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    memory = ResponseMemory(100 * MIB, keep=100 * MIB)
    first = memory.array(MIB, memory.reserve(MIB))
    address = first.ctypes.data
    held = memoryview(first)[10:20]  # what a socket has not sent yet
    del first
    second = memory.array(MIB, memory.reserve(MIB))
    assert second.ctypes.data != address
    del held
    third = memory.array(MIB, memory.reserve(MIB))
    assert third.ctypes.data == address


def test_memory_keeps_no_more_than_told_for_the_next_answer():
    memory = ResponseMemory(100 * MIB, keep=2 * MIB)
    arrays = [memory.array(MIB, memory.reserve(MIB)) for _ in range(5)]
    del arrays
    assert memory.used == 0
    assert memory._kept == 2 * MIB


def test_memory_may_be_freed_while_its_lock_is_held():
    memory = ResponseMemory(100 * MIB, keep=100 * MIB)

    class Cycle:
        def __init__(self):
            self.me, self.array = self, memory.array(MIB, memory.reserve(MIB))

    Cycle()
    with memory._lock:
        gc.collect()  # the finalizers run here; with a lock of their own this would never end
    assert memory.used == 0
