"""What torchrun's environment variables say, in whole or in part."""

import socket
from datetime import timedelta

import pytest

from feature_store.errors import InputError, ResourceError
from student_trainer.engine.distributed import Group, is_main_process, joined, started_group

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


def test_process_is_one_of_a_group_when_all_variables_are_set(environment):
    environment(**WHOLE)
    assert started_group() == Group(1, 2, 0)
    assert not is_main_process()


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
        ("MASTER_PORT", "http", "from 1 to 65535"),
        ("MASTER_PORT", "99999", "from 1 to 65535"),
    ],
)
def test_group_is_refused_when_a_variable_is_no_fitting_number(environment, name, value, expected):
    environment(**{**WHOLE, name: value})
    with pytest.raises(InputError, match=rf"variable {name} is '{value}', expected a whole number {expected}; .*unset"):
        started_group()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_group_is_given_up_when_the_others_do_not_come(environment, rank):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment(**{**WHOLE, "RANK": rank, "MASTER_PORT": port})
    with (
        pytest.raises(
            ResourceError,
            match=rf"process {rank} of 2 .WORLD_SIZE. did not meet the others at localhost:{port} \(MASTER",
        ),
        joined("cpu", timedelta(seconds=1)),
    ):
        pass
