import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from student_trainer.sweeps.comparison import RunResult, compare_runs, paired_difference
from student_trainer.sweeps.file import Sweep
from student_trainer.sweeps.report import comparison_rows, markdown_table, write_comparison

OURS, THEIRS = {0: 71.0, 1: 73.5, 2: 72.0}, {0: 70.0, 1: 71.0, 2: 71.5, 3: 10.0}


def runs(setting: str, top1: dict[int, float]) -> list[RunResult]:
    return [
        RunResult(
            setting, seed, Path(f"{setting}{seed}"), value, 8, 0.5, 0.0, (2.0, 1.0 + seed), ((1, 50.0), (2, value))
        )
        for seed, value in top1.items()
    ]


@pytest.fixture
def comparison():
    sweep = Sweep("A <title> & more", ("plain", "ours | best", "one", "none yet"), "plain", "last", ())
    results = [*runs("ours | best", OURS), *runs("plain", THEIRS), *runs("one", {1: 75.0})]
    return compare_runs(sweep, results)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_interval_is_students_when_differences_are_paired_by_seed(confidence):
    found = paired_difference(runs("a", OURS), runs("b", THEIRS), confidence)
    differences = np.array([1.0, 2.5, 0.5])  # seed 3 has no partner
    low, high = stats.t.interval(confidence, 2, differences.mean(), stats.sem(differences))
    assert found is not None
    assert (found.mean, found.low, found.high, found.pairs) == pytest.approx((differences.mean(), low, high, 3))


def test_interval_is_a_point_when_differences_are_equal():
    found = paired_difference(runs("a", {0: 71.0, 1: 72.0}), runs("b", {0: 70.0, 1: 71.0}), 0.95)
    assert found is not None
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_difference_has_no_interval_when_an_accuracy_is_not_a_number():
    found = paired_difference(runs("a", {0: float("nan"), 1: 72.0}), runs("b", {0: 70.0, 1: 71.0}), 0.95)
    assert found is not None
    assert (found.low, found.high, found.pairs) == (None, None, 2)


def test_difference_has_no_interval_when_one_seed_pairs_and_is_none_when_no_seed_does():
    one = paired_difference(runs("a", {1: 75.0}), runs("b", THEIRS), 0.95)
    assert one is not None
    assert (one.mean, one.low, one.high, one.pairs) == (4.0, None, None, 1)
    assert paired_difference(runs("a", {9: 75.0}), runs("b", THEIRS), 0.95) is None


def test_rows_hold_mean_std_and_difference_when_runs_are_laid_side_by_side(comparison):
    plain, ours, one, none = comparison.settings
    assert ours.mean == pytest.approx(np.mean(list(OURS.values())))
    assert ours.std == pytest.approx(np.std(list(OURS.values()), ddof=1))
    assert plain.difference is None
    assert (one.mean, one.std) == (75.0, None)
    assert (none.mean, none.difference, none.runs) == (None, None, ())
    assert comparison_rows(comparison)[1] == ("ours | best", "72.17", "1.26", "3", "+1.33", "-1.25 to +3.92", "0.5000")
    assert comparison_rows(comparison)[3] == ("none yet", "-", "-", "0", "-", "-", "-")


def test_markdown_is_a_table_when_names_hold_bars(comparison):
    lines = markdown_table(comparison).splitlines()
    assert lines[0] == "| Setting | Top-1 % | Std | Seeds | vs plain | 95% interval | Seconds / step |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[3].startswith("| ours \\| best | 72.17 | 1.26 | 3 | +1.33 |")
    assert "paired by seed" in lines[-1]


def test_files_hold_numbers_table_and_plots_when_written(comparison, tmp_path):
    write_comparison(tmp_path / "c", comparison)
    saved = json.loads((tmp_path / "c/results.json").read_text())
    assert saved["settings"][1]["difference"]["pairs"] == 3
    assert saved["settings"][1]["runs"][0]["top1"] == 71.0
    page = (tmp_path / "c/report.html").read_text()
    assert "A &lt;title&gt; &amp; more" in page
    assert "<title> & more" not in page.replace("A &lt;title&gt; &amp; more", "")
    assert page.count("<svg") == 3  # accuracy bars, loss curves, accuracy curves
    assert "<td>+1.33</td>" in page
    assert {file.name for file in (tmp_path / "c").iterdir()} == {"results.json", "table.md", "report.html"}


def test_page_says_what_to_install_when_matplotlib_is_absent(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr("student_trainer.reports.plots.find_spec", lambda name: None)
    write_comparison(tmp_path, comparison)
    page = (tmp_path / "report.html").read_text()
    assert "scalekd-cache[report]" in page
    assert "<svg" not in page
    assert "<td>+1.33</td>" in page
