"""Load on the live teacher, from a process of its own: clients in turn, or requests at a fixed rate.

    python -m benchmarks.http_load URL together CLIENTS EACH
    python -m benchmarks.http_load URL offer RATE SECONDS

Prints one JSON object.
"""

import json
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np

from feature_store.client import frames
from feature_store.client.service import RetryPolicy, ServiceClient
from feature_store.client.transport import LOST, HttpTransport

TARGET = "/v1/features:compute?taps=stage4"
_OPEN_REQUESTS = 128  # at once; a queue of 32 and two batches of 16 keep half of them


def main() -> None:
    url, kind, first, second = sys.argv[1:]
    found = together(url, int(first), int(second)) if kind == "together" else offer(url, float(first), float(second))
    print(json.dumps(found))


def together(url: str, clients: int, each: int) -> dict[str, Any]:
    """Clients that each ask for one view after the other: views per second, and how long each took."""
    calls = ServiceClient.at(url, retry=RetryPolicy(deadline=600, timeout=300))
    bodies = [one_view(url, seed) for seed in range(clients)]
    latencies: list[float] = []

    def client(body: bytes) -> None:
        for _ in range(each):
            started = time.perf_counter()
            calls.frame("POST", TARGET, body, media_type=frames.MEDIA_TYPE)
            latencies.append(time.perf_counter() - started)

    begun = time.perf_counter()
    _run([threading.Thread(target=client, args=(body,)) for body in bodies])
    return {"rate": clients * each / (time.perf_counter() - begun), "latencies": latencies}


def offer(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Requests of one view each at a fixed rate: their answers, and good ones per second.

    Good answers come by whole batches, so they are counted until the last one within the time, and divided by its time.
    """
    transport, body = HttpTransport(url), one_view(url)
    headers = {"Content-Type": frames.MEDIA_TYPE}
    statuses: Counter[str] = Counter()
    done: list[float] = []
    asked: list[float] = []
    numbers = iter(range(int(rate * seconds)))
    lock, begun = threading.Lock(), time.perf_counter()

    def ask() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            time.sleep(max(0.0, begun + number / rate - time.perf_counter()))
            asked.append(time.perf_counter() - begun)
            try:
                with transport.send("POST", TARGET, headers, body, 120) as answer:
                    kind = str(answer.status)
                    if answer.status in (429, 503) and not answer.getheader("retry-after", "").isdecimal():
                        kind += " without Retry-After"
                    while answer.read(1 << 20):
                        pass
            except LOST as error:
                kind = type(error).__name__
            with lock:
                statuses[kind] += 1
                if kind == "200":
                    done.append(time.perf_counter() - begun)

    _run([threading.Thread(target=ask) for _ in range(_OPEN_REQUESTS)])
    in_time = [stamp for stamp in done if stamp <= seconds]
    return {
        "answers": dict(sorted(statuses.items())),
        "offered": len(asked) / max(asked),
        "goodput": len(in_time) / seconds,
    }


def one_view(url: str, seed: int = 0) -> bytes:
    """A frame of one view of noise, of the teacher's size."""
    size = ServiceClient.at(url).json("/v1/teacher")["teacher"]["input_size"]
    pixels = np.random.default_rng(seed).integers(0, 256, (1, *size, 3), np.uint8)
    return b"".join(frames.encode({"pixels": pixels}).chunks())


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
