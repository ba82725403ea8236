import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path

import pytest

from feature_store import processes
from feature_store.processes import SHIELDED, become_worker, usable_cpus

_PARENT = """
import multiprocessing, sys, threading
sys.path.insert(0, {folder!r})
from test_processes import work
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    workers = [context.Process(target=work, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    sys.stdout.write(" ".join(str(worker.pid) for worker in workers) + "\\n")  # in one piece, also if unbuffered
    sys.stdout.flush()
    threading.Event().wait()
"""


def work():
    become_worker()
    sys.stdout.write("working\n")
    sys.stdout.flush()
    time.sleep(600)


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_worker_ends_when_its_parent_is_killed(tmp_path, method):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT.format(folder=str(Path(__file__).parent), method=method))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        lines = [parent.stdout.readline() for _ in range(3)]
        parent.kill()
        parent.wait()
        pids = [int(pid) for line in lines if line != "working\n" for pid in line.split()]
        deadline = time.monotonic() + 30
        while (alive := [pid for pid in pids if not ended(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(pids) == 2
        assert not alive


_SHIELDED_SERVER = """
import multiprocessing, sys
sys.path.insert(0, {folder!r})
from test_processes import blocked
from feature_store.processes import shielded_forkserver
if __name__ == "__main__":
    ours = shielded_forkserver([])
    for context in (ours, multiprocessing.get_context("forkserver")):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=blocked, args=(sender,))
        worker.start()
        print(receiver.recv())
        worker.join()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(pool.apply(abs, (-1,)))
    print("ended")
"""


def blocked(results):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    results.send(len(mask & SHIELDED))


def test_shielded_fork_server_blocks_signals_in_its_own_workers_alone(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(_SHIELDED_SERVER.format(folder=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(len(SHIELDED)), "0", "1", "ended"]


def ignored(results):
    become_worker()
    results.send([signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGHUP)])


def test_worker_leaves_terminal_signals_to_its_parent_when_it_starts():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=ignored, args=(sender,))
    worker.start()
    assert receiver.recv() == [True, True]
    assert connection.wait([worker.sentinel], 30)
    worker.join()
    assert worker.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_usable_cpus_counts_allowed_cores_when_the_machine_has_more():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_usable_cpus_follows_the_quota_when_a_container_has_one(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(processes, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cpus() == expected


@pytest.mark.parametrize(("error", "told"), [("ConnectionResetError", False), ("KeyError", True)])
def test_loader_worker_ends_without_a_word_when_the_connection_to_its_parent_is_gone(error, told):
    script = f"from feature_store.processes import become_loader_worker\nbecome_loader_worker()\nraise {error}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (error in done.stderr) == told
    assert told or not done.stderr


@pytest.mark.parametrize("module", ["teacher_service.cache.decode", "student_trainer.data.loader"])
def test_worker_processes_do_not_import_timm(module):
    code = f"import sys, {module}; print('torch' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
