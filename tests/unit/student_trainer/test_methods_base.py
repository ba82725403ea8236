"""The parts methods share: terms, teacher outputs, the registry, plain training."""

import sys
from dataclasses import fields
from types import ModuleType

import pytest
import torch
from method_batches import logits_batch, small_batch

from feature_store.errors import InputError
from student_trainer.methods import METHODS, Method, Needs, TaskOnly, TeacherOutput, Terms, find_method
from student_trainer.methods.criterion import cross_entropy


class Own(Method):
    """A user's method."""


def test_terms_weigh_and_add_up():
    terms = Terms({"task": torch.tensor(2.0), "own": torch.tensor(3.0)}, {"task": 0.5, "own": 2.0, "unused": 9.0})
    assert terms.weighted == {"task": 1.0, "own": 6.0}
    assert terms.total == 7.0


def test_probabilities_are_the_softmax_at_a_temperature():
    z = torch.tensor([[1.0, 2.0, 4.0]])
    torch.testing.assert_close(TeacherOutput(logits=z).probabilities(), z.softmax(dim=1))
    torch.testing.assert_close(TeacherOutput(logits=z).probabilities(2.0), (z / 2).softmax(dim=1))
    assert TeacherOutput(logits=z.bfloat16()).probabilities().dtype == torch.float32
    assert TeacherOutput(logits=z.double()).probabilities().dtype == torch.float64


def test_probabilities_are_the_weighted_mean_when_there_are_several_teachers():
    a, b = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 0.0, -1.0]])
    output = TeacherOutput(logits=a, mixture=((0.25, a), (0.75, b)))
    torch.testing.assert_close(output.probabilities(3.0), 0.25 * (a / 3).softmax(dim=1) + 0.75 * (b / 3).softmax(dim=1))


def test_probabilities_ask_for_logits_when_there_are_none():
    with pytest.raises(InputError, match=r"no teacher logits.*Needs\(logits=True\)"):
        TeacherOutput().probabilities()


def test_plain_training_is_the_task_loss_alone():
    small = logits_batch(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 3]))
    method = TaskOnly(TaskOnly.Config(), small.shape, None)
    terms = small.terms(method, logits=None)
    assert terms.weights == {"task": 1.0}
    torch.testing.assert_close(terms.total, cross_entropy(small.student.logits, small.batch.labels))
    assert method.needs == Needs(some_labels=True)
    assert not TaskOnly.requires_teacher
    assert [name for name, found in METHODS.items() if not found.requires_teacher] == ["none"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_step_with_its_defaults(name):
    small = small_batch()
    method = small.build(name)
    assert isinstance(method, METHODS[name])
    terms = small.terms(method)
    terms.total.backward()
    assert terms.raw.keys() >= METHODS[name].shared_terms
    assert all(weight > 0 for weight in terms.weights.values())
    assert small.student.logits.grad.abs().max() > 0
    assert all(leaf.grad is not None for leaf in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_task_loss_of_the_run(name):
    small, two = small_batch(), torch.tensor(2.0)
    method = METHODS[name](METHODS[name].Config(), small.shape, small.teacher, lambda *_: two)
    assert small.terms(method).raw["task"] == 2.0


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_refused_by_its_name_when_of_another_type(name):
    for field in fields(METHODS[name].Config):
        with pytest.raises(InputError, match=rf"^--{name}\.{field.name}\b".replace("_", "[-_]")):
            METHODS[name].Config(**{field.name: object()})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_nothing_it_does_not_need(name):
    small = small_batch()
    method = small.build(name)
    needs, given = method.needs, small.batch.teacher
    kept = {tap: given.taps[tap] for tap in needs.taps}
    torch.testing.assert_close(
        small.terms(method, taps=kept, logits=given.logits if needs.logits else None).total, small.terms(method).total
    )


def test_find_method_gives_a_users_class_when_named_by_module(monkeypatch):
    module = ModuleType("own_methods")
    module.Own, module.number = Own, 3
    monkeypatch.setitem(sys.modules, "own_methods", module)
    assert find_method("own_methods:Own") is Own
    assert find_method("scalekd") is METHODS["scalekd"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalkd", "--method is 'scalkd', did you mean scalekd.*package.module:Class"),
        ("at all", "expected one of scalekd, fd, kd, none, dist, nkd, attention_transfer"),
        ("no_such_module:Own", "No module named 'no_such_module'; the module must be importable.*PYTHONPATH"),
        ("json:Own", "--method json:Own: module 'json' has no attribute 'Own'"),
        ("json:dumps", "expected a subclass of student_trainer.methods.Method"),
        ("json:JSONDecoder", "expected a subclass of student_trainer.methods.Method"),
    ],
)
def test_find_method_refuses_when_there_is_no_such_method(name, message):
    with pytest.raises(InputError, match=message):
        find_method(name)


def test_a_method_without_forward_is_no_loss():
    small = logits_batch(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(NotImplementedError):
        small.terms(Own(Own.Config(), small.shape, small.teacher))
