"""The processes of a run: what torchrun tells each, and what they tell each other. Gloo, on CPUs."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from feature_store.errors import InputError, ResourceError, UserError
from student_trainer.engine.distributed import (
    ALONE,
    Group,
    OtherProcessError,
    data_parallel,
    gradients_shared,
    is_main_process,
    joined,
    started_group,
    synchronise_batchnorm,
)

# Python 3.12 and later warn of fork under threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


@pytest.fixture
def environment(monkeypatch):
    def give(**variables: str) -> None:
        for name in WHOLE:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": " "}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "x"}, {"RANK": "3"}],
    ids=str,
)
def test_process_is_alone_when_no_others_are_told_of(environment, variables):
    environment(**variables)
    assert started_group() == Group()
    assert is_main_process()


@pytest.mark.parametrize("port", ["1", "65535"])
def test_process_is_one_of_a_group_when_all_variables_are_set(environment, port):
    environment(**{**WHOLE, "MASTER_PORT": port})
    assert started_group() == Group(1, 2, 0)
    assert not is_main_process()
    environment(**{**WHOLE, "RANK": "0", "LOCAL_RANK": "1"})
    assert started_group() == Group(0, 2, 1)
    assert is_main_process()


@pytest.mark.parametrize("left_out", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("empty", [{}, None])
def test_group_is_refused_when_a_variable_is_missing_or_empty(environment, left_out, empty):
    environment(**{**WHOLE, left_out: ""} if empty is None else {k: v for k, v in WHOLE.items() if k != left_out})
    with pytest.raises(InputError, match=rf"WORLD_SIZE is 2, .* not set: {left_out}; start the run with torchrun, or"):
        started_group()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORLD_SIZE", "two", "from 1"),
        ("WORLD_SIZE", "0", "from 1"),
        ("WORLD_SIZE", "-1", "from 1"),
        ("RANK", "2", "from 0 to 1"),
        ("RANK", "-1", "from 0 to 1"),
        ("LOCAL_RANK", "1.5", "from 0 to 1"),
        ("LOCAL_RANK", "2", "from 0 to 1"),
        ("MASTER_PORT", "http", "from 1 to 65535"),
        ("MASTER_PORT", "0", "from 1 to 65535"),
        ("MASTER_PORT", "65536", "from 1 to 65535"),
    ],
)
def test_group_is_refused_when_a_variable_is_no_fitting_number(environment, name, value, expected):
    environment(**{**WHOLE, name: value})
    with pytest.raises(InputError, match=rf"variable {name} is '{value}', expected a whole number {expected}; .*unset"):
        started_group()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_group_is_given_up_when_the_others_do_not_come(environment, rank):
    port = free_port()
    environment(**{**WHOLE, "RANK": rank, "MASTER_PORT": port})
    told = rf"process {rank} of 2 .* did not meet the others at localhost:{port} .* within 1 seconds: "
    with pytest.raises(ResourceError, match=told), joined("cpu", timedelta(seconds=1)):
        pass


def in_group(work: Callable[[Group], Any]) -> list[Any]:
    """What the work gives on each of two processes that joined a group, by rank."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    workers = []
    for rank, (_, sender) in enumerate(pipes):
        variables = {**WHOLE, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        workers.append(context.Process(target=_joined, args=(work, variables, sender)))
        workers[-1].start()
        sender.close()
    results = [receiver.recv() for receiver, _ in pipes]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return results


def _joined(work: Callable[[Group], Any], variables: dict[str, str], sender: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    with joined("cpu") as group:
        sender.send(work(group))


def raised(call: Callable[[], Any]) -> tuple[str, str, int] | Any:
    """Kind, text and exit code of the user error that a call ends with; what it gives if it does not."""
    try:
        return call()
    except UserError as error:
        return type(error).__name__, str(error), error.exit_code


def refuse_on(ranks: tuple[int, ...], group: Group) -> str:
    if group.rank in ranks:
        raise InputError(f"of {group.rank}") if group.rank else ResourceError("of the main process")
    return f"made by {group.rank}"


def talk(group: Group) -> dict[str, Any]:
    own = torch.tensor([1.0, 10.0]) * (group.rank + 1)
    return {
        "group": group,
        "main": group.is_main,
        "mean": group.mean(own).tolist(),
        "own": own.tolist(),
        "gather": group.gather({"rank": group.rank}),
        "any": group.any(group.rank == 1, group.rank == 0, False, device=torch.device("cpu")),
        "each": group.all_or_raise(lambda: group.rank),
        "broadcast": group.broadcast_from_main(partial(refuse_on, (), group)),
        "others_do_not_make": group.broadcast_from_main(partial(refuse_on, (1,), group)),
        "second": raised(lambda: group.all_or_raise(partial(refuse_on, (1,), group))),
        "both": raised(lambda: group.all_or_raise(partial(refuse_on, (0, 1), group))),
        "main_fails": raised(lambda: group.broadcast_from_main(partial(refuse_on, (0,), group))),
    }


def test_processes_share_values_and_end_with_one_reason():
    first, second = in_group(talk)
    assert (first["group"], second["group"]) == (Group(0, 2, 0), Group(1, 2, 1))
    assert (first["main"], second["main"]) == (True, False)
    assert (first["own"], second["own"]) == ([1, 10], [2, 20])
    for process in (first, second):
        assert process["mean"] == [1.5, 15]
        assert process["gather"] == [{"rank": 0}, {"rank": 1}]
        assert process["any"] == (True, True, False)
        assert process["each"] == process["group"].rank
        assert process["broadcast"] == process["others_do_not_make"] == "made by 0"
    assert first["second"] == ("InputError", "of 1", InputError.exit_code)
    assert first["both"] == first["main_fails"] == ("ResourceError", "of the main process", ResourceError.exit_code)
    other = "OtherProcessError", "another process of the run failed: "
    assert second["second"] == (other[0], f"{other[1]}of 1", InputError.exit_code)
    assert second["both"] == (other[0], f"{other[1]}of the main process", ResourceError.exit_code)
    assert second["main_fails"] == second["both"]


def gradients(group: Group) -> list[float]:
    """Gradients of one weight, each process's own being 1 and 2: not shared, then shared with what was kept."""
    module = nn.Linear(1, 1, bias=False)
    parallel, found = data_parallel(module, group), []
    for now in (False, True):
        with gradients_shared(parallel, now=now):
            parallel(torch.full((1, 1), 1.0 + group.rank)).sum().backward()
        found.append(module.weight.grad.item())
    return found


def test_gradients_are_averaged_where_they_are_shared_and_each_process_own_before():
    assert in_group(gradients) == [[1, 3], [2, 3]]


def test_group_of_one_shares_nothing():
    module, flags, values = nn.Linear(1, 1), (True, False), torch.ones(2)
    assert ALONE.is_main
    assert ALONE.mean(values) is values
    assert ALONE.gather("a") == ["a"]
    assert ALONE.any(*flags, device=torch.device("cpu")) == flags
    assert ALONE.broadcast_from_main(lambda: 3) == ALONE.all_or_raise(lambda: 3) == 3
    with pytest.raises(InputError, match="^mine$"):
        ALONE.all_or_raise(lambda: (_ for _ in ()).throw(InputError("mine")))
    assert data_parallel(module, ALONE) is module
    with gradients_shared(module, now=False), gradients_shared(module, now=True):
        module(torch.ones(1, 1)).sum().backward()


def test_process_joins_nobody_when_it_is_alone(environment):
    environment()
    with joined("cuda:0") as group:
        assert group == Group()
        assert not dist.is_initialized()


def test_error_of_another_process_ends_with_its_exit_code():
    error = OtherProcessError(ResourceError("the disk is full"))
    assert (str(error), error.exit_code) == ("another process of the run failed: the disk is full", 3)


@pytest.mark.parametrize(
    ("device", "gpus", "backend"),
    [("cpu", 2, "gloo"), ("auto", 0, "gloo"), ("auto", 2, "nccl"), ("cuda", 2, "nccl")],
)
def test_processes_with_gpus_are_connected_by_nccl(environment, monkeypatch, device, gpus, backend):
    environment(**{**WHOLE, "LOCAL_RANK": "1", "MASTER_PORT": free_port()})
    called, store = {}, dist.HashStore()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: called.update(gpu=number))
    monkeypatch.setattr(dist, "rendezvous", lambda *given, **_: iter([(store, *given[1:])]))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **given: called.update(given, backend=name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.update(left=True))
    with joined(device) as group:
        assert group == Group(1, 2, 1)
        assert "left" not in called
    assert (called["backend"], called["rank"], called["world_size"], called["left"]) == (backend, 1, 2, True)
    assert called.get("gpu") == (1 if backend == "nccl" else None)
    assert called["timeout"] >= timedelta(hours=1)  # the others wait while the main process validates


@pytest.mark.parametrize(
    ("device", "gpus", "kind", "message"),
    [
        ("cuda:1", 2, InputError, "--device is cuda:1, but 2 processes were started; use --device cuda, one GPU"),
        ("cuda", 1, ResourceError, "process 1 of this machine has no GPU: torch sees 1; start torchrun with at most"),
        ("cuda", 0, ResourceError, "process 1 of this machine has no GPU: torch sees 0"),
        ("auto", 1, ResourceError, "process 1 of this machine has no GPU: torch sees 1"),
    ],
)
def test_group_is_refused_when_a_process_has_no_gpu_of_its_own(environment, monkeypatch, device, gpus, kind, message):
    environment(**{**WHOLE, "LOCAL_RANK": "1", "MASTER_PORT": free_port()})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(kind, match=message), joined(device, timedelta(seconds=1)):
        pass


def test_batchnorm_is_synchronised_when_processes_have_gpus():
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    names = list(student.state_dict())
    with pytest.raises(InputError, match="--sync-bn with several processes needs GPUs"):
        synchronise_batchnorm(student, Group(0, 2, 0), torch.device("cpu"))
    synchronised = synchronise_batchnorm(student, Group(0, 2, 0), torch.device("cuda"))
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    assert list(synchronised.state_dict()) == names
    plain = nn.BatchNorm2d(4)
    assert synchronise_batchnorm(plain, Group(), torch.device("cpu")) is plain
