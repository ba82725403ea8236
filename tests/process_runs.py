"""Training runs in processes of their own: several as one group, or one that is killed."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from feature_store.errors import UserError
from student_trainer.config import TrainConfig
from student_trainer.train import train

_CONTEXT = multiprocessing.get_context("forkserver")


def run_alone(config: TrainConfig) -> dict[str, Any]:
    """A run in one process of its own; see run_group."""
    return run_group(config, 1)[0]


def run_group(config: TrainConfig, size: int, prepare: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    """A run in a group of processes, started as torchrun does; what each of them came to, by rank.

    Args:
        config: The run; its folder's parent takes the processes' notes.
        size: Number of processes.
        prepare: Called in each of them first.
    """
    outcomes = start_group(config, size, prepare)
    for process, _ in outcomes:
        process.join(120)
        assert process.exitcode == 0
    return [json.loads(note.read_text()) for _, note in outcomes]


def start_group(config: TrainConfig, size: int, prepare: Callable[[], None] | None = None):
    """Start the processes; gives them with the paths of their notes."""
    port = _free_port()
    started = []
    for rank in range(size):
        note = config.run.parent / f"{config.run.name}-{rank}.json"
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost",
                     "MASTER_PORT": port}  # fmt: skip
        process = _CONTEXT.Process(target=_train, args=(config, variables, note, prepare))
        process.start()
        started.append((process, note))
    return started


def kill(processes) -> None:
    """SIGKILL, and wait until they are gone."""
    for process, _ in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process, _ in processes:
        process.join()


def wait_for_lines(config: TrainConfig, count: int, processes) -> bool:
    """Wait until metrics.jsonl has so many lines; False if the processes ended before."""
    metrics = config.run / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < count:
        if not any(process.is_alive() for process, _ in processes):
            return False
        time.sleep(0.002)
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _train(config: TrainConfig, variables: dict[str, Any], note: Path, prepare: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in variables.items()})
    outcome: dict[str, Any] = {}
    try:
        if prepare is not None:
            prepare()
        outcome["steps"] = train(config).steps
    except UserError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    except SystemExit as stop:
        outcome["exit"] = stop.code
    note.write_text(json.dumps(outcome))


def poison_second_process() -> None:
    """Make the second process's weights NaN after its second step, and so its next loss."""
    steps = count(1)

    def poison(optimizer: Optimizer, *_: Any) -> None:
        if os.environ["RANK"] == "1" and next(steps) == 2:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(float("nan"))

    register_optimizer_step_post_hook(poison)
