"""A running service: the real command in a process of its own, on a free port of loopback."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from forked_programs import Program

from feature_store.client.service import RetryPolicy, ServiceClient


class Running(NamedTuple):
    """Where it is, and its process."""

    url: str
    process: Program


@contextmanager
def running_service(store: Path | str, *options: str, wait: bool = True) -> Iterator[Running]:
    """``teacher-service serve`` over a store; with wait, ready when given. Ended by SIGTERM."""
    with tempfile.TemporaryDirectory() as folder:
        process = Program("teacher-service", ["serve", "--store", store, "--port", "0", *options], Path(folder))
        try:
            while "\n" not in (printed := process.printed()):
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            url = json.loads(printed.splitlines()[0])["url"]
            if wait:
                ServiceClient.at(url, retry=RetryPolicy(deadline=60, longest_pause=0.2)).call(
                    "GET", "/readyz", lambda answer: answer.read(1000)
                )
            yield Running(url, process)
        finally:
            process.terminate(20)
