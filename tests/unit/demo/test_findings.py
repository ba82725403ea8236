"""The report's sentences say what the numbers say, also when that is unflattering."""

from dataclasses import replace

import pytest

from demo.findings import findings
from demo.results import Results, StoreResult, StudentResult, TeacherResult
from demo.students import METHODS, SettingResult

FEW = {
    "No distillation": (80.0, 81.0, 82.0),
    "KD": (84.0, 85.0, 86.0),
    "FD": (83.0, 84.0, 85.0),
    "ScaleKD, store": (87.0, 88.0, 89.0),
    "ScaleKD, live": (87.0, 88.0, 88.4),
}


def setting(labels: str, method: str, top1: tuple[float, ...]) -> SettingResult:
    live = method.endswith("live")
    return SettingResult(
        labels=labels,
        method=method,
        images=100 if labels == "few" else 1297,
        seeds=tuple(range(len(top1))),
        top1=top1,
        mean=sum(top1) / len(top1),
        spread=1.0 if len(top1) > 1 else None,
        steps=3,
        seconds_per_step=0.25 if live else 0.2 if "ScaleKD" in method else 0.1,
        teacher_seconds=4.0 if live else 0.0,
        curves=tuple((2.0, 1.5, 1.25 if live else 1.0) for _ in top1),
    )


@pytest.fixture
def results() -> Results:
    few = [setting("few", method.label, FEW[method.label]) for method in METHODS]
    whole = [setting("all", method.label, (95.0,)) for method in METHODS]
    return Results(
        quick=False,
        test_images=500,
        teacher=TeacherResult("teacher", 1000, 98.0, 60.0),
        store=StoreResult(1000, 1000, 10376, 8, teacher_seconds=10.0, seconds=13.0),
        student=StudentResult("student", 100),
        settings=(*few, *whole),
        seconds=300.0,
        cpu_seconds=500.0,
        software={},
    )


def change(results: Results, labels: str, method: str, top1: tuple[float, ...]) -> Results:
    changed = setting(labels, method, top1)
    same = (labels, method)
    return replace(results, settings=tuple(changed if (s.labels, s.method) == same else s for s in results.settings))


def test_findings_say_the_teacher_wins_when_it_does(results):
    assert "is better than" in findings(results)[0]
    assert "3.0 points ahead" in findings(results)[0]


def test_findings_say_the_teacher_loses_when_it_does(results):
    first = findings(change(results, "all", "No distillation", (99.0,)))[0]
    assert "is NOT better than" in first
    assert "1.0 points behind" in first


def test_findings_say_no_seed_overlaps_when_ranges_are_apart(results):
    assert "+7.0 points against No distillation (no seed overlaps)" in findings(results)[1]


def test_findings_say_chance_when_seeds_overlap(results):
    few = findings(change(results, "few", "KD", (86.0, 87.0, 88.0)))[1]
    assert "+1.0 points against KD (the seeds overlap, so this may be chance)" in few


def test_findings_name_another_best_method_when_scalekd_is_worse(results):
    few = findings(change(results, "few", "KD", (90.0, 91.0, 92.0)))[1]
    assert "best of the store-fed methods is KD (91.0 ± 1.0 %)" in few
    assert "-3.0 points against KD (no seed overlaps)" in few


def test_findings_see_no_difference_when_all_labels_tie(results):
    assert "in doubt, with one seed: none." in findings(results)[2]


def test_findings_name_methods_when_all_labels_differ_clearly(results):
    whole = findings(change(results, "all", "FD", (80.0,)))[2]
    assert "FD -15.0 points" in whole
    assert "in doubt, with one seed: FD." in whole


def test_findings_give_the_gap_of_losses_when_store_and_live_differ(results):
    store_or_live = findings(results)[3]
    assert "+0.2 points with 100 labels and +0.0 points with 1,297 labels" in store_or_live
    assert "within 0.25 of each other" in store_or_live


def test_findings_count_students_until_break_even_when_live_costs_less_each(results):
    cost = findings(results)[4]
    assert "paid for itself after 3 students" in cost  # 10 s once, 4 s each time
    assert "(13.0 s) after 4 students" in cost
    assert "The 12 store-fed distilled runs here would have spent 48 s" in cost


def test_findings_give_step_ratios_when_scalekd_costs_more(results):
    assert "2.0 times a plain step and 0.80 times a live one" in findings(results)[5]
