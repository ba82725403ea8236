"""Servers for the HTTP benchmark, each a process of its own: the service, nginx over the same files, a raw socket."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feature_store.client.service import RetryPolicy, ServiceClient

_CHUNK = 1 << 20


class Server(NamedTuple):
    """A running server."""

    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time it has used so far."""
        return _cpu_seconds(f"/proc/{self.pid}/stat")

    def loop_seconds(self) -> float:
        """CPU time of its main thread so far, the service's event loop."""
        return _cpu_seconds(f"/proc/{self.pid}/task/{self.pid}/stat")

    def peak_memory(self) -> int:
        """Most bytes it has held so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _cpu_seconds(stat: str) -> float:
    fields = Path(stat).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def service(store: Path, *options: str, cores: Sequence[int] = ()) -> Iterator[Server]:
    """``teacher-service serve``, ready; on some cores only, if they are given."""
    command = [sys.executable, "-m", "teacher_service", "serve", "--store", str(store), "--port", "0", *options]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(len(cores))} if cores else {})}
    pin = partial(os.sched_setaffinity, 0, cores) if cores else None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, preexec_fn=pin
    ) as process:
        assert process.stdout is not None
        try:
            started = json.loads(process.stdout.readline())
            threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
            calls = ServiceClient.at(started["url"], retry=RetryPolicy(deadline=120, longest_pause=0.2))
            calls.call("GET", "/readyz", lambda answer: answer.read(1 << 16))
            yield Server(started["url"], process.pid)
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def nginx(root: Path) -> Iterator[Server | None]:
    """Nginx with sendfile over a folder; None if it is not installed."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = Path(folder) / "nginx.conf"
        config.write_text(
            f"pid {folder}/pid; daemon off; worker_processes 1; error_log /dev/null;\n"
            + ("user root;\n" if os.geteuid() == 0 else "")
            + "events { worker_connections 1024; }\n"
            f"http {{ access_log off; sendfile on; keepalive_requests 1000000; client_body_temp_path {folder}/body;\n"
            f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
        )
        with subprocess.Popen([binary, "-c", str(config), "-p", folder], stderr=subprocess.DEVNULL) as process:
            url = f"http://127.0.0.1:{port}"
            ServiceClient.at(url, retry=RetryPolicy(deadline=20, longest_pause=0.1)).call(
                "GET", "/zarr.json", lambda answer: answer.read(1 << 24)
            )
            try:
                yield Server(url, process.pid)
            finally:
                process.terminate()
                process.wait(20)


class RawSocket:
    """Client and server of the floor: the server sends a number of bytes per request, and does nothing else.

    Args:
        nbytes: Number of bytes.
        file: Where it reads them from each time, anywhere; None sends what lies in memory.
    """

    def __init__(self, nbytes: int, file: Path | None = None) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.pid = os.fork()
        if self.pid == 0:
            _send_forever(listener, nbytes, file)
        self._connection = socket.create_connection(listener.getsockname())
        listener.close()
        self.server = Server("", self.pid)

    def read(self, memory: np.ndarray) -> None:
        """Fill memory of the agreed size."""
        self._connection.sendall(b"?")
        view, done = memoryview(memory.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            done += self._connection.recv_into(view[done:])

    def close(self) -> None:
        """End the server."""
        self._connection.sendall(b".")  # closing it would not do: later children hold it open too
        os.waitpid(self.pid, 0)
        self._connection.close()


def _send_forever(listener: socket.socket, nbytes: int, file: Path | None) -> None:
    connection, _ = listener.accept()
    payload = memoryview(np.ones(nbytes, np.uint8))
    descriptor = None if file is None else os.open(file, os.O_RDONLY)
    last = 0 if file is None else file.stat().st_size - nbytes
    for turn in itertools.count():
        if connection.recv(1) != b"?":
            os._exit(0)
        if descriptor is not None:
            os.preadv(descriptor, [payload], turn * 7919 * 4096 % last)
        for start in range(0, nbytes, _CHUNK):
            connection.sendall(payload[start : start + _CHUNK])
