"""Failures of the machine and of the numbers, as the errors a user meets."""

import signal
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from feature_store.errors import ResourceError, UserError
from feature_store.format.addressing import RowId
from student_trainer.engine.distributed import ALONE, Group, OtherProcessError
from student_trainer.engine.failures import machine_failures_told, not_finite_loss, require_finite_weights
from student_trainer.engine.stopping import Stop, Stopped

ROWS = [RowId(1, position, 2) for position in range(5)]


@dataclass(frozen=True)
class FakeGroup(Group):
    """One process of two; the other one gives what is given here."""

    other: Any = None

    def gather(self, item: Any) -> list[Any]:
        return [item, self.other] if self.is_main else [self.other, item]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("tried to allocate\n2 GiB"), r"^the GPU's memory is full: .*2 GiB; .*--accumulate"),
        (RuntimeError("[gloo/transport/tcp] closed"), r"^another process of the run ended; its own message says why$"),
    ],
)
def test_machine_failure_is_a_resource_error_with_its_remedy_when_it_is_one(error, message):
    with pytest.raises(ResourceError, match=message) as caught, machine_failures_told(Stop()):
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_pass_as_they_are_when_no_machine_failed():
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError) as caught, machine_failures_told(Stop()):
        raise error
    assert caught.value is error


def test_lost_connection_is_the_signal_itself_when_this_process_got_one_too():
    stop = Stop()
    stop.signal = signal.SIGTERM
    with pytest.raises(Stopped), machine_failures_told(stop):
        raise RuntimeError("[gloo/transport/tcp] closed")


def test_loss_that_is_not_finite_is_told_with_its_terms_and_first_rows():
    error = not_finite_loss(7, 2, {"task": 0.25, "kd": torch.inf}, ROWS, ALONE)
    rows = ", ".join(f"unit 1 position {position} view 2" for position in range(4))
    expected = f"the loss is not finite at step 7 (epoch 2): task 0.25, kd inf; first rows of the batch: {rows}; lower "
    assert str(error).startswith(expected)
    assert type(error) is UserError


@pytest.mark.parametrize(
    ("own", "others", "shown"),
    [
        (1.0, torch.nan, r"task nan; first rows of the batch: unit 9 position 0 view 0;"),
        (torch.inf, torch.nan, r"task inf; first rows of the batch: unit 1 position 0 view 2,"),
        (1.0, 2.0, r"task 1; first rows of the batch: unit 1 position 0 view 2,"),
    ],
)
def test_loss_is_told_of_the_first_process_where_it_is_not_finite(own, others, shown):
    group = FakeGroup(0, 2, other=({"task": others}, [RowId(9, 0, 0)]))
    error = not_finite_loss(7, 2, {"task": own}, ROWS, group)
    assert shown in str(error)
    assert not isinstance(error, OtherProcessError)


def test_loss_is_told_by_the_main_process_alone():
    group = FakeGroup(1, 2, other=({"task": torch.nan}, [RowId(9, 0, 0)]))
    error = not_finite_loss(7, 2, {"task": 1.0}, ROWS, group)
    assert isinstance(error, OtherProcessError)
    assert "unit 9 position 0 view 0;" in str(error)


@pytest.mark.parametrize(("rank", "kind"), [(0, UserError), (1, OtherProcessError)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_are_refused_when_a_single_one_is_not_finite(rank, kind, value):
    last = nn.Linear(2, 2)
    module = nn.Sequential(nn.Linear(2, 2), last)
    require_finite_weights(module, 4, Group(rank, 2))
    with torch.no_grad():
        last.bias[1] = value
    with pytest.raises(
        kind, match=r"weights are not finite after step 4: not saved, .* --optim.lr.* in a new run"
    ) as e:
        require_finite_weights(module, 4, Group(rank, 2))
    assert type(e.value) is kind
