"""A running service: the real command in a process of its own, on a free port of loopback."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from feature_store.client.service import RetryPolicy, ServiceClient


class Running(NamedTuple):
    """Where it is, and its process."""

    url: str
    process: subprocess.Popen


@contextmanager
def running_service(store: Path | str, *options: str, wait: bool = True) -> Iterator[Running]:
    """``teacher-service serve`` over a store; with wait, ready when given. Ended by SIGTERM."""
    command = [sys.executable, "-m", "teacher_service", "serve", "--store", str(store), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    try:
        url = json.loads(process.stdout.readline())["url"]
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop the service
        if wait:
            ServiceClient.at(url, retry=RetryPolicy(deadline=60, longest_pause=0.2)).call(
                "GET", "/readyz", lambda answer: answer.read(1000)
            )
        yield Running(url, process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
