"""Training runs side by side, each in a process of its own."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch

from feature_store.errors import ResourceError, UserError, one_line
from feature_store.processes import become_worker, shielded_forkserver
from feature_store.tools.terminal import say
from student_trainer.config import TrainConfig
from student_trainer.train import train

_SAVE_SECONDS = 60.0  # for runs that are told to end; a checkpoint of a large student takes several


def attempt(config: TrainConfig) -> UserError | None:
    """Train; the error, if it fails."""
    try:
        train(config)
    except UserError as error:
        return error
    except Exception as error:  # noqa: BLE001 - too little memory, say; the other runs may have enough
        traceback.print_exc()
        return UserError(f"{type(error).__name__}: {one_line(error)}; the traceback is above")
    return None


def run_in_processes(
    configs: Sequence[TrainConfig], gpus: Sequence[str | None], threads: int
) -> Generator[tuple[int, UserError | None]]:
    """Train every config, as many at a time as there are GPUs.

    SIGTERM, SIGHUP, Ctrl-C and closing the generator end the runs under way, each of which saves first; if this
    process is killed, they end too.

    Args:
        configs: The runs.
        gpus: Name in CUDA_VISIBLE_DEVICES of the GPU of each concurrent run; None for the CPU or a shared GPU.
        threads: CPU threads of each run.

    Yields:
        Index of a run that ended, and why it failed, if it did. One that is killed fails alone.

    Raises:
        SystemExit: A signal asked to stop; with the exit code shells expect.
        KeyboardInterrupt: Ctrl-C did.
    """
    waiting, free, running = deque(enumerate(configs)), deque(gpus), dict[int, _Started]()
    with _signals_written() as signals:
        try:
            while waiting or running:
                while waiting and free:
                    started = _start(*waiting.popleft(), free.popleft(), threads)
                    running[started.process.sentinel] = started
                ready = wait([*running, signals])
                if signals in ready:
                    _raise(os.read(signals, 1)[0])
                for ended in [running.pop(sentinel) for sentinel in ready if isinstance(sentinel, int)]:
                    free.append(ended.gpu)
                    yield ended.index, _outcome(ended)
        finally:
            _end(running, signals)


@dataclass(frozen=True)
class _Started:
    """A run under way."""

    index: int
    gpu: str | None
    process: BaseProcess
    outcome: Connection


def _start(index: int, config: TrainConfig, gpu: str | None, threads: int) -> _Started:
    shielded_forkserver(["student_trainer.train"])  # a signal to a whole job ends it after the runs, not before
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(config, gpu, threads, sender), name=str(config.run))
    process.start()
    sender.close()  # so that the receiver meets the end of the pipe when the process ends
    return _Started(index, gpu, process, receiver)


def _run(config: TrainConfig, gpu: str | None, threads: int, sender: Connection) -> None:
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the main process only, which ends the runs
    become_worker()
    take_share(gpu, threads)
    sender.send(attempt(config))


def take_share(gpu: str | None, threads: int) -> None:
    """Give this process its GPU, before anything touches CUDA, and its share of the cores."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)


def _outcome(ended: _Started) -> UserError | None:
    ended.process.join()
    with ended.outcome:
        try:
            return ended.outcome.recv()
        except EOFError:
            return ResourceError(f"its process {_how_it_ended(ended.process.exitcode or 0)}")


def _how_it_ended(exit_code: int) -> str:
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number not in list(signal.Signals):
        return f"ended with exit code {exit_code}; see its messages above"
    why = ", as Linux does when memory runs out; lower --processes" if number == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(number).name}{why}"


@contextmanager
def _signals_written() -> Iterator[int]:
    """A descriptor that numbers of signals to stop can be read from while the context lasts.

    An exception out of a handler could come between the start of a run and the note that it was started. Nothing is
    written in other threads than the main one, nor of signals that are ignored, as SIGHUP is under nohup.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    handlers: Mapping[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
        handlers = {n: signal.signal(n, lambda number, _: os.write(writer, bytes([number])) and None) for n in numbers}
    try:
        yield reader
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _raise(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _end(running: Mapping[int, _Started], signals: int) -> None:
    """End runs, which save first; those that take too long, or all of them at another signal, are killed."""
    processes = {sentinel: started.process for sentinel, started in running.items()}
    if processes:
        say(f"ending {len(processes)} runs, which save first; once more to end at once", error=True)
    for process in processes.values():
        process.terminate()
    until = time.monotonic() + _SAVE_SECONDS
    while processes and (left := until - time.monotonic()) > 0:
        ready = wait([*processes, signals], left)
        if signals in ready:
            break
        processes = {sentinel: process for sentinel, process in processes.items() if sentinel not in ready}
    for process in processes.values():
        process.kill()
    for started in running.values():
        started.process.join()
