"""Several teachers: shared terms once, each teacher's own weighted."""

from dataclasses import replace

import pytest
import torch
from method_batches import SmallBatch, small_batch

from feature_store.errors import InputError
from student_trainer.methods import (
    METHODS,
    Needs,
    ScaleKD,
    SeveralTeachers,
    StudentOutput,
    Terms,
    find_method,
)
from student_trainer.methods.kd import kd_loss


@pytest.fixture
def first() -> SmallBatch:
    return small_batch()


@pytest.fixture
def second(first) -> SmallBatch:
    """Another teacher's features for the same student and labels."""
    other = small_batch(seed=1)
    return replace(other, student=first.student, batch=other.batch._replace(labels=first.batch.labels))


def several(name: str, weights: list[float], batches: list[SmallBatch], **options) -> SeveralTeachers:
    method = find_method(name)
    teachers = [batch.teacher for batch in batches]
    return SeveralTeachers(method, method.Config(**options), batches[0].shape, teachers, weights)


def terms_of(method: SeveralTeachers, student: StudentOutput, batches: list[SmallBatch]) -> Terms:
    teachers = [each.batch.teacher for each in batches]
    return method(student, batches[0].batch._replace(teacher=teachers[0], others=tuple(teachers[1:])))


@pytest.mark.parametrize("name", METHODS)
def test_two_equal_teachers_of_half_weight_give_the_total_of_one(first, name):
    one = first.build(name)
    both = several(name, [0.5, 0.5], [first, first])
    for each in both.methods:
        each.load_state_dict(one.state_dict())
    torch.testing.assert_close(terms_of(both, first.student, [first, first]).total, first.terms(one).total)


def test_total_is_the_shared_terms_and_the_weighted_sum_when_teachers_differ(first, second):
    w1, w2, T, alpha = 0.75, 2.25, 2.0, 0.4
    method = several("scalekd", [w1, w2], [first, second], kd_alpha=alpha, kd_temperature=T)
    terms = terms_of(method, first.student, [first, second])
    alone = [each.terms(part) for part, each in zip(method.methods, (first, second), strict=True)]
    z1, z2 = first.batch.teacher.logits, second.batch.teacher.logits
    p = 0.25 * (z1 / T).softmax(dim=1) + 0.75 * (z2 / T).softmax(dim=1)
    expected = (1 - alpha) * alone[0].raw["task"] + alpha * kd_loss(first.student.logits, p, T)
    for w, each in zip((w1, w2), alone, strict=True):
        for name, weight in each.weights.items():
            if name.startswith("stage"):
                expected = expected + w * weight * each.raw[name]
    torch.testing.assert_close(terms.total, expected)
    features = {f"stage{stage}_{view}" for stage in (3, 4) for view in ("original", "alternative")}
    own = {f"teacher{i}_{name}" for i in (1, 2) for name in features}
    assert set(terms.raw) == {"task", "kd", *own}
    torch.testing.assert_close(terms.raw["teacher2_stage4_original"], alone[1].raw["stage4_original"])
    assert terms.weights["teacher2_stage4_original"] == pytest.approx(w2 * 0.08)
    terms.total.backward()
    assert all(leaf.grad is not None for leaf in method.parameters())


@pytest.mark.parametrize("lacking", [0, 1])
def test_kd_takes_the_teachers_that_have_a_classifier(first, second, lacking):
    teachers = [first, second]
    without = teachers[lacking]
    teachers[lacking] = replace(
        without,
        teacher=replace(without.teacher, num_classes=0),
        batch=without.batch._replace(teacher=without.batch.teacher._replace(logits=None)),
    )
    method = several("scalekd", [0.2, 0.6], teachers)
    terms = terms_of(method, first.student, teachers)
    p = teachers[1 - lacking].batch.teacher.logits.softmax(dim=1)
    torch.testing.assert_close(terms.raw["kd"], kd_loss(first.student.logits, p))
    assert (terms.weights["task"], terms.weights["kd"]) == (0.5, 0.5)
    assert method.notes == (f"teacher {lacking + 1}: KD is off: the teacher has no classifier",)
    assert method.needs.logits


def test_kd_is_off_when_no_teacher_has_a_classifier(first, second):
    teachers = [replace(each, teacher=replace(each.teacher, num_classes=0)) for each in (first, second)]
    method = several("scalekd", [1.0, 1.0], teachers)
    terms = terms_of(method, first.student, teachers)
    assert "kd" not in terms.raw
    assert terms.weights["task"] == 1.0
    assert not method.needs.logits


def test_needs_are_those_of_all_teachers_and_each_has_its_own(first, second):
    dropped = replace(second, teacher=replace(second.teacher, split=replace(second.teacher.split, prefix="dropped")))
    method = several("scalekd", [1.0, 1.0], [dropped, first])
    assert method.needs == Needs(("stage4", "stage3_prefix"), logits=True, tail=True)
    assert [part.needs.taps for part in method.methods] == [("stage4",), ("stage4", "stage3_prefix")]
    assert several("nkd", [1.0], [first]).needs == Needs(logits=True, labels=True)
    assert several("fd", [1.0], [first]).needs == Needs(("stage4",))
    assert several("none", [1.0, 1.0], [first, second]).needs == Needs(some_labels=True)


def test_projectors_are_separate_for_each_teacher(first, second):
    method = several("scalekd", [1.0, 1.0], [first, second])
    assert isinstance(method.methods[0], ScaleKD)
    assert {name.split(".")[1] for name in method.state_dict()} == {"0", "1"}
    assert not {id(leaf) for leaf in method.methods[0].parameters()} & {
        id(leaf) for leaf in method.methods[1].parameters()
    }


def test_task_loss_is_the_runs_own(first):
    find = find_method("fd")
    two = torch.tensor(2.0)
    method = SeveralTeachers(find, find.Config(), first.shape, [first.teacher], [1.0], lambda *_: two)
    assert method.task(torch.zeros(1, 2), torch.zeros(1)) is two
    assert terms_of(method, first.student, [first]).raw["task"] == 2.0


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1.0, 1.0]])
def test_several_teachers_refuse_weights_that_do_not_fit(first, weights):
    with pytest.raises(InputError, match="weights of 2 teachers are .*, expected one above 0 for each"):
        several("kd", weights, [first, first])
    with pytest.raises(InputError, match="weights of 0 teachers"):
        SeveralTeachers(find_method("kd"), find_method("kd").Config(), first.shape, [], [])


def test_several_teachers_refuse_a_batch_of_fewer(first):
    method = several("kd", [1.0, 1.0], [first, first])
    with pytest.raises(InputError, match="the batch carries 1 teachers, expected 2"):
        terms_of(method, first.student, [first])
