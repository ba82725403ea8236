import math

import torch

from student_trainer.engine.distributed import ALONE
from student_trainer.engine.terms import TermMeans
from student_trainer.methods.base import Terms


def terms(n: int) -> Terms:
    return Terms({"task": torch.tensor(0.1 * n), "kd": torch.tensor(1 / (n + 1))}, {"task": 0.5, "kd": 2.0})


def test_means_are_the_same_to_the_bit_when_resumed():
    whole, first, second = TermMeans(), TermMeans(), TermMeans()
    for n in range(7):
        whole.add([terms(n)], n + 1)
    for n in range(3):
        first.add([terms(n)], n + 1)
    second.load_state_dict(first.state_dict(ALONE), ALONE)
    for n in range(3, 7):
        second.add([terms(n)], n + 1)
    assert second.means(ALONE) == whole.means(ALONE)
    assert math.isclose(whole.means(ALONE)["raw"]["task"], 0.3, rel_tol=1e-6)
    assert math.isclose(whole.means(ALONE)["loss"]["task"], 0.15, rel_tol=1e-6)


def test_last_terms_are_the_mean_over_micro_batches_with_their_weighted_total():
    means = TermMeans()
    means.add([terms(0), terms(2)], 1)
    values = means.last(ALONE)
    assert math.isclose(values["raw"]["task"], 0.1, rel_tol=1e-6)
    assert math.isclose(values["loss"]["total"], 0.5 * 0.1 + 2 * (1 + 1 / 3) / 2, rel_tol=1e-6)
    assert math.isclose(means.last_total, values["loss"]["total"])


def test_first_step_that_is_not_finite_is_kept_with_its_terms_however_many_follow():
    means = TermMeans()
    for step, value in enumerate((1.0, math.inf, math.nan, 1.0), 1):
        means.add([Terms({"task": torch.tensor(value)}, {"task": 1.0})], step)
    assert means.first_not_finite() == 2
    assert means.first_not_finite_terms() == {"task": math.inf, "total": math.inf}


def test_means_are_empty_before_the_first_step():
    assert TermMeans().means(ALONE) == {}
    assert TermMeans().state_dict(ALONE) is None
    assert TermMeans().first_not_finite() is None


def test_sums_are_averaged_when_another_number_of_processes_resumes():
    state = {"names": ("task",), "weights": {"task": 1.0}, "sums": [[2.0, 2.0], [4.0, 4.0]], "count": 2}
    means = TermMeans()
    means.load_state_dict(state, ALONE)
    assert means.means(ALONE)["raw"] == {"task": 1.5}
