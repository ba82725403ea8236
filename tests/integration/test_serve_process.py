import json
import os
import signal
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import obstore
import pytest
import tensorstore
import zarr
from obstore.store import HTTPStore
from served_store import UNCOMMITTED_UNIT, make_store, make_tokens, make_wide_store, running
from servers import make_certificate
from service_process import running_service

from feature_store.client import frames
from feature_store.format.addressing import RowId
from feature_store.processes import stop_signals
from feature_store.store import open_store
from teacher_service.serve import server
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.metrics import MULTIPROCESS_DIR

SHARD = "taps/stage4/c/0/0/0/0"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_swin):
    return make_store(tmp_path_factory.mktemp("served"), tiny_swin)


@pytest.fixture(scope="module")
def wide(store, tmp_path_factory):
    return make_wide_store(tmp_path_factory.mktemp("wide"), store)


@pytest.fixture(scope="module")
def service(store, tmp_path_factory):
    with running(store, tmp_path_factory.mktemp("service")) as started:
        started.wait_until_ready()
        yield started
        assert started.stop() == 0
        assert "Traceback" not in started.log.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--teacher", "test_vit.r160_in1k"], "teacher.name differs"),
        (["--teacher", "TEACHER", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_service_ends_with_2_when_its_teacher_cannot_be_the_stores(store, tiny_swin, options, words):
    options = [tiny_swin.name if option == "TEACHER" else option for option in options]
    with running_service(store, *options, wait=False) as started:
        end = time.monotonic() + 60
        while started.process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert started.process.poll() == 2
        error = started.process.communicate()[1]
    assert "teacher-service: error: " in error
    assert words in error


def expected(store):
    """The tap of both views, NaN where nothing is committed or quarantined."""
    opened = open_store(store)
    source, manifest = opened.source(), opened.manifest
    shape = (manifest.num_views, len(manifest.tars) * manifest.capacity, 4, 64)
    values = np.full(shape, np.nan, np.float16)
    for unit in opened.committed.units:
        for view in sorted(opened.committed_views(unit)):
            for row in source.unit_rows(unit, view):
                values[view, row[0] * manifest.capacity + row[1]] = source.read([row]).taps["stage4"][0]
    return values


def with_zarr_python(url):
    group = zarr.open_group(
        zarr.storage.ObjectStore(HTTPStore.from_url(url, client_options={"allow_http": True})), mode="r"
    )
    return lambda: group["taps/stage4"][:]


def with_tensorstore(url):
    spec = {"driver": "zarr3", "kvstore": {"driver": "http", "base_url": f"{url}/taps/stage4/"}}
    array = tensorstore.open(spec, read=True).result()
    return lambda: array.read().result()


CLIENTS = pytest.mark.parametrize("client", [with_zarr_python, with_tensorstore])


@CLIENTS
def test_zarr_clients_read_values_and_fill_where_nothing_is_committed(service, store, client):
    values = client(f"{service.url}/v1/zarr")()
    np.testing.assert_array_equal(values, expected(store))
    assert np.isnan(values[:, -1]).all()


@CLIENTS
def test_zarr_clients_fail_where_a_committed_object_is_missing(tmp_path, tiny_swin, client):
    path = make_store(tmp_path, tiny_swin)
    with running(path, tmp_path) as started:
        started.wait_until_ready()
        read = client(f"{started.url}/v1/zarr")
        read()
        (path / SHARD).unlink()
        with pytest.raises(Exception, match="410|Gone"):
            read()


def test_obstore_reads_ranges_heads_and_tags(service, store):
    remote = HTTPStore.from_url(f"{service.url}/v1/zarr", client_options={"allow_http": True})
    whole = (store / SHARD).read_bytes()
    assert obstore.head(remote, SHARD)["size"] == len(whole)
    got = obstore.get(remote, SHARD)
    assert bytes(got.bytes()) == whole
    ranges = obstore.get_ranges(remote, SHARD, starts=[0, 100], lengths=[5, 7])
    assert [bytes(part) for part in ranges] == [whole[:5], whole[100:107]]
    tag = got.meta["e_tag"]
    with pytest.raises(obstore.exceptions.NotModifiedError):
        obstore.get(remote, SHARD, options={"if_none_match": tag})
    with pytest.raises(FileNotFoundError):
        obstore.get(remote, f"taps/stage4/c/0/{UNCOMMITTED_UNIT}/0/0")


def test_store_opens_through_the_service_as_from_disk(service, store):
    here, there = open_store(store), open_store(f"{service.url}/v1/zarr")
    assert there.committed.units == here.committed.units == [0, 1]
    rows = here.rows(["u0-000", "u1-001"], 1)
    assert there.source().read(rows).taps["stage4"].tobytes() == here.source().read(rows).taps["stage4"].tobytes()
    assert there.view_params(0, 1) == here.view_params(0, 1)


def test_store_opened_through_the_service_reports_a_missing_object_as_damage(tmp_path, tiny_swin):
    path = make_store(tmp_path, tiny_swin)
    with running(path, tmp_path) as started:
        started.wait_until_ready()
        there = open_store(f"{started.url}/v1/zarr")
        (path / SHARD).unlink()
        with pytest.raises(Exception, match="410|missing") as caught:
            there.source().read([RowId(0, 0, 0)])
        assert not isinstance(caught.value, AssertionError)


def raw(url, receive_bytes=None):
    """An open socket to the service; with few receive_bytes, what it is sent stays with the sender."""
    host, _, port = url.partition("://")[2].rpartition(":")
    connection = socket.socket()
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


LARGE_ROWS = [RowId(0, 0, 0), RowId(0, 2, 1)] * 50
LARGE_BODY = json.dumps({"rows": LARGE_ROWS}).encode()  # 5 MB of features: more than the kernel takes
LARGE_REQUEST = (
    b"POST /v1/rows:batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(LARGE_BODY) + LARGE_BODY
)


def ask_raw(url, request: bytes) -> bytes:
    with raw(url) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def test_cached_rows_are_served_without_torch(tmp_path, store):
    with running(store, tmp_path) as started:
        started.wait_until_ready()
        for target in (
            "/v1/manifest",
            "/v1/units/0/views/0",
            "/v1/blocks",
            "/v1/zarr/zarr.json",
            "/v1/browse/activity",
        ):
            assert started.get(target).status == 200, target
        assert "torch" not in Path(f"/proc/{started.process.pid}/maps").read_text()


@pytest.mark.parametrize(
    "target",
    [b"/v1/zarr/../../../../../../etc/passwd", b"/v1/zarr/%2e%2e/%2e%2e/%2e%2e/etc/passwd", b"/v1/zarr//etc/passwd",
     b"/v1/zarr/..%5c..%5cetc%5cpasswd", b"/v1/zarr/%00", b"/v1/zarr/zarr.json%00.png", b"/v1/zarr/%252e%252e/x",
     b"http://127.0.0.1/etc/passwd", b"*"],
)  # fmt: skip
def test_hostile_targets_over_a_socket_get_nothing(service, target):
    answer = ask_raw(service.url, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ", 2)[1] in (b"404", b"400", b"403")
    assert b"root:" not in answer


def test_a_hundred_requests_in_work_finish_when_the_service_is_told_to_stop(tmp_path, wide):
    """A hundred readers stop in the middle of their answers, then SIGTERM, then they go on."""
    with running(wide, tmp_path) as started:
        started.wait_until_ready()
        connections = [raw(started.url) for _ in range(100)]
        try:
            for connection in connections:
                connection.sendall(LARGE_REQUEST)
            firsts = [connection.recv(1) for connection in connections]  # every answer has begun
            started.process.terminate()
            time.sleep(0.5)
            assert started.process.poll() is None
            with ThreadPoolExecutor(10) as pool:
                bodies = list(pool.map(lambda pair: pair[1] + rest_of(pair[0]), zip(connections, firsts, strict=True)))
        finally:
            for connection in connections:
                connection.close()
        assert started.process.wait(60) == 0
    want = open_store(wide).source().read(LARGE_ROWS).taps["stage4"]
    for answer in bodies:
        head, _, frame = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        arrays, _ = frames.decode(frame)
        assert (arrays["stage4"] == want).all()


def rest_of(connection) -> bytes:
    connection.settimeout(60)
    pieces = []
    while piece := connection.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def test_draining_service_is_not_ready_and_still_answers(tmp_path, store):
    with running(store, tmp_path, "--drain-delay", "3") as started:
        started.wait_until_ready()
        started.process.terminate()
        end = time.monotonic() + 3
        while (probe := started.get("/readyz")).status == 200:
            assert time.monotonic() < end
        assert (probe.status, probe.problem) == (503, "not-ready")
        assert "draining" in probe.json()["detail"]
        assert int(probe.headers["retry-after"]) >= 1
        assert started.get("/v1/rows/u0-000").status == 200
        assert started.get("/livez").status == 200
        assert started.process.wait(60) == 0


def test_tokens_never_reach_a_log(tmp_path, store):
    secrets = make_tokens(tmp_path / "tokens.jsonl")
    with running(store, tmp_path, "--tokens", str(tmp_path / "tokens.jsonl")) as started:
        started.wait_until_ready()
        for secret in (*secrets.values(), "skc_unknown"):
            headers = {"Authorization": f"Bearer {secret}", "X-Request-ID": "call-1"}
            for target in ("/v1/manifest", "/v1/rows/nothing", f"/v1/manifest?token={secret}", "/v1/rows:batch"):
                started.get(target, **headers)
            ask_raw(started.url, b"GET / HTTP/9.9\r\nAuthorization: Bearer " + secret.encode() + b"\r\n\r\n")
        assert started.get("/v1/manifest", Authorization=f"Bearer {secrets['read']}").status == 200
        assert started.stop() == 0
        log = started.log.read_text()
    for secret in (*secrets.values(), "skc_unknown"):
        assert secret not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    assert {line["token"] for line in lines} == {None, "read", "compute", "admin"}
    assert {line["request_id"] for line in lines} > {"call-1"}


def test_workers_share_a_port_and_their_counts(tmp_path, store):
    with running(store, tmp_path, "--workers", "2") as started:
        started.wait_until_ready()
        for _ in range(20):
            while (status := started.get("/v1/rows/u0-000").status) == 503:
                time.sleep(0.05)  # one worker is ready, this one is not yet
            assert status == 200
        end = time.monotonic() + 20
        counted = 'scalekd_http_requests_total{method="GET",route="/v1/rows/{key:path}",status="200"} 20.0'
        while counted not in (text := started.get("/metrics").body.decode()):
            assert time.monotonic() < end, text
        assert started.stop() == 0
    assert "Traceback" not in started.log.read_text()


def test_workers_are_told_to_stop_when_the_signal_comes_while_they_are_started(store, monkeypatch):
    """Otherwise they would outlive the process that is to stop them, and keep its port."""

    class Worker:
        def __init__(self, **_) -> None:
            self.sentinel, self._alive = os.pipe()
            self.exitcode = None

        def start(self) -> None:
            if not workers:
                signal.raise_signal(signal.SIGTERM)
            workers.append(self)

        def terminate(self) -> None:
            if self not in workers:
                raise AttributeError
            if self.exitcode is None:
                self.exitcode = -signal.SIGTERM
                os.close(self._alive)

        def join(self) -> None:
            assert self.exitcode is not None
            os.close(self.sentinel)

    workers: list[Worker] = []
    monkeypatch.setattr(server.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Worker))
    monkeypatch.setenv(MULTIPROCESS_DIR, "")
    before = {sig: signal.getsignal(sig) for sig in stop_signals()}
    try:
        config = ServeConfig(store=str(store), workers=3)
        with socket.socket() as listener:
            server._serve_with_workers(config, listener)
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
    assert [worker.exitcode for worker in workers] == [-signal.SIGTERM] * 3


def test_a_worker_that_dies_ends_the_service_so_that_it_is_started_again(tmp_path, store):
    with running(store, tmp_path, "--workers", "2") as started:
        started.wait_until_ready()
        workers = worker_processes(started)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        assert started.process.wait(60) == 3
        assert "a worker exited with code -9" in started.log.read_text()


def worker_processes(started) -> list[int]:
    children = Path(f"/proc/{started.process.pid}/task/{started.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def bound(listener: socket.socket, host: str, port: int) -> bool:
    try:
        listener.bind((host, port))
    except OSError:
        return False
    listener.listen()
    return True


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGHUP, 0)])
def test_workers_end_and_free_the_port_when_their_main_process_is_killed_or_hung_up(tmp_path, store, number, exit_code):
    with running(store, tmp_path, "--workers", "2") as started:
        started.wait_until_ready()
        workers = worker_processes(started)
        assert len(workers) == 2
        started.process.send_signal(number)
        assert started.process.wait(60) == exit_code
        host, _, port = started.url.partition("://")[2].rpartition(":")
        with socket.socket() as restarted:
            restarted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end = time.monotonic() + 30
            while not bound(restarted, host, int(port)):
                assert time.monotonic() < end
                time.sleep(0.05)
        assert "Traceback" not in started.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_service_drains_when_the_terminal_signals_every_process(tmp_path, store, number):
    with running(store, tmp_path, "--workers", "2", "--drain-delay", "2") as started:
        started.wait_until_ready()
        for pid in (*worker_processes(started), started.process.pid):
            os.kill(pid, number)
        time.sleep(0.5)
        assert started.get("/livez").status == 200  # a second signal would have ended the delay
        assert started.process.wait(60) == 0


def test_service_ends_at_the_drain_limit_when_a_thread_is_still_at_work(tmp_path, store):
    script = tmp_path / "blocked.py"
    script.write_text(
        "import threading, time\n"
        "from teacher_service.cli import main\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        f"main(['serve', '--store', {str(store)!r}, '--port', '0', '--drain-seconds', '1'])\n"
    )
    with subprocess.Popen([os.sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            while ask_raw(url, b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[9:12] != b"200":
                time.sleep(0.05)
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_service_ends_at_the_drain_limit_when_a_reader_takes_nothing(tmp_path, wide):
    with running(wide, tmp_path, "--drain-seconds", "1") as started:
        started.wait_until_ready()
        with raw(started.url, 4096) as stalled:
            stalled.sendall(LARGE_REQUEST)
            assert stalled.recv(1) == b"H"
            assert started.stop() == 0


def test_a_store_that_cannot_be_opened_ends_the_service_with_its_reason(tmp_path, tiny_swin):
    path = make_store(tmp_path, tiny_swin)
    record = next((path / "commits").glob("u00000*"))
    record.write_bytes(record.read_bytes()[:-9])
    (path / "commits/index").unlink()
    with running(path, tmp_path) as started:
        assert started.process.wait(60) == 1
        assert "teacher-service: error: commit record" in started.log.read_text()
        assert "Traceback" not in started.log.read_text()


def test_an_address_in_use_is_said_in_one_line(tmp_path, store, service):
    port = service.url.rpartition(":")[2]
    command = ["-m", "teacher_service", "serve", "--store", str(store), "--port", port]
    done = subprocess.run([os.sys.executable, *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(f"teacher-service: error: cannot listen on 127.0.0.1 port {port}")
    assert len(done.stderr.splitlines()) == 1


def test_tls_files_make_it_https(tmp_path, store):
    certificate, key = make_certificate(tmp_path)
    with running(store, tmp_path, "--tls-cert", str(certificate), "--tls-key", str(key)) as started:
        assert started.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        with context.wrap_socket(raw(started.url), server_hostname="127.0.0.1") as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert rest_of(connection).startswith(b"HTTP/1.1 200")
        assert started.stop() == 0


def test_connections_that_send_headers_too_slowly_or_too_long_are_closed(tmp_path, store):
    with running(store, tmp_path, "--header-seconds", "0.5", "--max-header-bytes", "4000") as started:
        started.wait_until_ready()
        with raw(started.url) as idle, raw(started.url) as slow, raw(started.url) as kept:
            slow.sendall(b"GET /livez HTTP/1.1\r\nHo")
            kept.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert kept.recv(9) == b"HTTP/1.1 "
            assert rest_of(idle).startswith(b"HTTP/1.1 408")
            assert rest_of(slow).startswith(b"HTTP/1.1 408")
        endless = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 8000
        assert ask_raw(started.url, endless).startswith(b"HTTP/1.1 431")
        assert ask_raw(started.url, endless[:5000] + b"\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
        headers = (
            b"GET /v1/manifest HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"a" * 4000 + b"\r\n\r\n"
        )
        assert ask_raw(started.url, headers).startswith(b"HTTP/1.1 431")
        assert ask_raw(started.url, b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\n").startswith(b"HTTP/1.1 431")
        assert started.stop() == 0


def test_a_reader_that_takes_nothing_is_dropped_and_its_memory_comes_back(tmp_path, wide):
    with running(wide, tmp_path, "--stall-seconds", "1") as started:
        started.wait_until_ready()
        with raw(started.url, 4096) as stalled:
            stalled.sendall(LARGE_REQUEST)
            assert stalled.recv(1) == b"H"
            assert "scalekd_response_memory_bytes 0.0" not in started.get("/metrics").body.decode()
            end = time.monotonic() + 30
            while "scalekd_response_memory_bytes 0.0" not in started.get("/metrics").body.decode():
                assert time.monotonic() < end
                time.sleep(0.1)
        assert started.stop() == 0


def test_a_connection_is_closed_when_the_body_after_a_refusal_does_not_end(tmp_path, store):
    make_tokens(tmp_path / "tokens")
    options = ("--tokens", str(tmp_path / "tokens"), "--body-seconds", "0.5")
    with running(store, tmp_path, *options) as started:
        started.wait_until_ready()
        with raw(started.url) as endless:
            endless.sendall(b"POST /v1/rows:batch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{")
            assert endless.recv(12) == b"HTTP/1.1 401"
            endless.sendall(b"a")
            rest_of(endless)
        assert started.stop() == 0


def test_an_answer_stays_whole_when_its_reader_begins_another_request_and_waits(tmp_path, wide):
    with running(wide, tmp_path, "--header-seconds", "0.3") as started:
        started.wait_until_ready()
        whole = ask_raw(started.url, LARGE_REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        with raw(started.url, 4096) as slow:
            slow.sendall(LARGE_REQUEST + b"\r\n")  # an empty line more than it should be, as some clients send
            time.sleep(1)
            answer = rest_of(slow)
        body = whole.partition(b"\r\n\r\n")[2]
        assert answer.partition(b"\r\n\r\n")[2][: len(body)] == body
        assert started.stop() == 0
