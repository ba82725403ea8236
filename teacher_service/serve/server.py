"""Runs the application under uvicorn, in one process or several."""

import logging.config
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing import connection
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from feature_store.backends.open import open_objects
from feature_store.commits.root import read_manifest
from feature_store.errors import InputError, MismatchError, ResourceError, UserError
from feature_store.processes import become_worker, stop_signals
from feature_store.tools.terminal import LogFormatter, say, say_json
from teacher_service.serve.app import create_app
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.metrics import MULTIPROCESS_DIR
from teacher_service.serve.middleware.access_log import LOGGER
from teacher_service.serve.protocol import serving_options
from teacher_service.serve.service import Service
from teacher_service.serve.tokens import TokenFile

if TYPE_CHECKING:
    from feature_store.teacher.model import Teacher
    from teacher_service.serve.live.teacher import LiveTeacher

_BACKLOG = 2048
_SHUTDOWN_SECONDS = 1.0  # for what follows the drain: the teacher and the metrics are closed


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then let requests in work end.

    Raises:
        InputError: Not a store, not a token file, or certificates that cannot be read.
        MismatchError: The teacher is not the one the store was written with.
        ResourceError: The address is taken, or a worker died.
    """
    read_manifest(open_objects(config.store))  # refuses what is no store before anything listens
    if config.tokens is not None:
        TokenFile(config.tokens)
    _configure_logs()
    with listening(config) as listener:
        if config.workers == 1:
            return serve_alone(config, listener)
        return _serve_with_workers(config, listener)


@contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket on the configured address; prints its URL as JSON on stdout, which port 0 needs."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it. The kernel ends those whose peer is gone, or takes nothing of its answer.
            milliseconds = int(config.limits.stall_seconds * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        try:
            listener.bind((config.host, config.port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another --port or --host"
            ) from error
        listener.set_inheritable(True)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if family == socket.AF_INET6 else host
        scheme = "https" if config.tls_cert else "http"
        say_json({"url": f"{scheme}://{host}:{port}", "pid": os.getpid()})
        yield listener


def serve_alone(config: ServeConfig, listener: socket.socket) -> None:
    """Serve in this process.

    Raises:
        UserError: The store or the teacher could not be loaded.
    """
    service = Service(config)
    if config.teacher is not None:
        service.live = _live_teacher(config, service)
    tokens = TokenFile(config.tokens) if config.tokens is not None else None
    server: _Server
    app = create_app(service, tokens, on_failure=lambda: server.stop())
    try:
        options = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            ssl_certfile=config.tls_cert,
            ssl_keyfile=config.tls_key,
            timeout_graceful_shutdown=math.ceil(config.drain_seconds),
            lifespan="on",
            **serving_options(config.limits),
        )
        options.load()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tls-cert {config.tls_cert} with --tls-key {config.tls_key}: {error}; check both"
        ) from error
    server = _Server(options, service)
    server.run([listener])
    if service.failure is not None:
        raise service.failure


class _Server(uvicorn.Server):
    """uvicorn's server, which is not ready from the first signal on, and ends with exit code 0 when the drain does."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._stop_at = service, float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._service.draining = True
        config = self._service.config
        self._stop_at = time.monotonic() + config.drain_delay
        # A thread cannot be cancelled: one that is still at work would hold the process beyond the drain.
        limit = threading.Timer(config.drain_delay + config.drain_seconds + _SHUTDOWN_SECONDS, os._exit, [0])
        limit.daemon = True
        limit.start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn's; with SIGHUP, which a closed terminal sends. Workers leave the terminal's to their parent."""
        with super().capture_signals():
            if multiprocessing.parent_process() is not None:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            elif threading.current_thread() is threading.main_thread():
                for number in stop_signals():
                    signal.signal(number, self.handle_exit)
            yield

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def stop(self) -> None:
        """End as after a signal."""
        self.should_exit = True


def _live_teacher(config: ServeConfig, service: Service) -> "LiveTeacher":
    from teacher_service.serve.live.teacher import Batching, LiveTeacher

    batching = Batching(config.max_batch, config.max_wait, config.queue_rows)
    return LiveTeacher(partial(load_stored_teacher, config), batching, observe=service.metrics.observe_batch)


def load_stored_teacher(config: ServeConfig) -> "Teacher":
    """The store's own teacher, so that live and cached features agree.

    Raises:
        MismatchError: The teacher named is another one; names the first field that differs.
    """
    from feature_store.teacher.model import load_teacher
    from teacher_service.devices import find_device

    manifest, name = read_manifest(open_objects(config.store)), config.teacher or ""
    stored = manifest.teacher
    remedy = "serve the teacher that wrote the store, or a store of this teacher"
    if name != stored.name:  # before its code is imported, or its weights are fetched
        raise MismatchError("teacher.name", expected=stored.name, got=name, remedy=remedy)
    teacher = load_teacher(
        name,
        checkpoint=config.checkpoint,
        model_kwargs=stored.model_kwargs,
        depth=manifest.split.depth or None,
        drop_prefix=manifest.split.drops_prefix,
        compute_dtype=stored.compute_dtype,
        device=find_device(config.device),
    )
    theirs, ours = asdict(stored) | {"split": manifest.split}, asdict(teacher.info) | {"split": teacher.split}
    for field, expected in theirs.items():
        if expected != ours[field]:
            raise MismatchError(
                field if field == "split" else f"teacher.{field}", expected=expected, got=ours[field], remedy=remedy
            )
    return teacher


def _serve_with_workers(config: ServeConfig, listener: socket.socket) -> None:
    """Serve in processes that share the socket; if one dies, all end, so that a supervisor restarts the service.

    Not uvicorn's Multiprocess: its workers run uvicorn.Server, without the drain delay, the drain limit or the tie to a
    killed parent; SIGHUP restarts them, and one that cannot load its store would be restarted without end.
    """
    folder = tempfile.mkdtemp(prefix="scalekd-metrics-")
    os.environ[MULTIPROCESS_DIR] = folder
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(config, listener)) for _ in range(config.workers)]
    told = threading.Event()

    def end(*_: object) -> None:
        told.set()
        for worker in workers:
            with suppress(ProcessLookupError, AttributeError):  # gone, or not yet there
                worker.terminate()

    try:
        for sig in stop_signals():
            signal.signal(sig, end)
        # Workers inherit the mask: a terminal's signals reach every process, and this one passes them on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        for worker in workers:
            worker.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if told.is_set():  # before all were there
            end()
        connection.wait([worker.sentinel for worker in workers])
        died = not told.is_set()
        if died:
            end()
        for worker in workers:
            worker.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fine = (0,) if died else (0, -signal.SIGTERM)  # told before it listened, a worker just ends
    if bad := [worker.exitcode for worker in workers if worker.exitcode not in fine]:
        raise ResourceError(f"a worker exited with code {bad[0]}; see its log above")


def _work(config: ServeConfig, listener: socket.socket) -> None:
    become_worker()
    _configure_logs()
    try:
        serve_alone(config, listener)
    except UserError as error:
        say(f"teacher-service: error: {error}", error=True)
        sys.exit(error.exit_code)


def _configure_logs() -> None:
    """Access log as JSON lines on stdout, everything else on stderr."""
    stream = {"class": "logging.StreamHandler"}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "plain": {"()": LogFormatter},
                "full": {"()": LogFormatter, "fmt": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
            },
            "handlers": {
                "stdout": {**stream, "stream": "ext://sys.stdout", "formatter": "plain"},
                "stderr": {**stream, "stream": "ext://sys.stderr", "formatter": "full"},
            },
            "loggers": {
                LOGGER: {"handlers": ["stdout"], "level": "INFO", "propagate": False},
                "uvicorn": {"level": "WARNING"},
                "teacher_service": {"level": "INFO"},
            },
            "root": {"handlers": ["stderr"], "level": "WARNING"},
        }
    )
