import resource

import pytest
import torch

from feature_store.errors import InputError
from student_trainer.engine.metrics import (
    MetricsLog,
    Throughput,
    peak_memory,
    read_metrics,
    rewind_metrics,
    set_aside_accuracies,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(4):
            log.write("step", step, total=step / 3)
    return path


def test_log_gives_back_what_was_written_when_read(path):
    assert read_metrics(path) == [{"kind": "step", "step": s, "total": s / 3} for s in range(4)]


def test_log_appends_when_opened_again(path):
    with MetricsLog(path) as log:
        log.write("epoch", 4, top1=50.0)
    assert [line["kind"] for line in read_metrics(path)] == ["step"] * 4 + ["epoch"]


def test_log_leaves_out_its_last_line_when_a_crash_cut_it(path):
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert len(read_metrics(path)) == 4


def test_log_is_refused_when_a_line_in_the_middle_is_damaged(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", *lines[2:], ""]))
    with pytest.raises(InputError, match=r"metrics.jsonl line 2 is damaged"):
        read_metrics(path)


def test_log_is_refused_when_missing(tmp_path):
    with pytest.raises(InputError, match=r"metrics.jsonl is missing"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_log_ends_at_the_checkpoint_when_rewound(path):
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    rewind_metrics(path, 2, 1)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]
    assert path.read_text().endswith("}\n")


def test_log_keeps_only_epochs_that_are_over_when_rewound(path):
    with MetricsLog(path) as log:
        log.write("epoch", 2, epoch=0)
        log.write("epoch", 2, epoch=1)
        log.write("epoch", 2, epoch=2)
    rewind_metrics(path, 2, 1)
    assert [line["epoch"] for line in read_metrics(path) if line["kind"] == "epoch"] == [0]


def test_accuracies_stay_under_another_name_when_set_aside(path):
    with MetricsLog(path) as log:
        log.write("epoch", 4, epoch=0, val={"top1": 50.0})
    before = read_metrics(path)
    set_aside_accuracies(path)
    last = {"kind": "epoch", "step": 4, "epoch": 0, "earlier_val": {"top1": 50.0}}
    assert read_metrics(path) == [*before[:-1], last]


def test_peak_memory_is_in_bytes_when_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")  # where the system counts in KiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = peak_memory(torch.device("cpu"))
    assert 1024 * before <= found <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_throughput_counts_from_the_last_line_when_asked():
    throughput = Throughput()
    assert throughput.median() is None
    throughput.add(10, 0.5, 1.5)
    throughput.add(10, 0.0, 3.0)
    assert throughput.since_last() == {"images_per_second": 4.0, "data_wait": 0.1}
    throughput.add(5, 1.0, 0.0)
    assert throughput.since_last() == {"images_per_second": 5.0, "data_wait": 1.0}
    assert throughput.median() == 2.0
