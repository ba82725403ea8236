"""Options of a run reach what it is made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_world import SIZE, changed, shared_world, train_config

from feature_store.inputs.tar import Tar
from feature_store.views import apply_view, decode_image, draw_view, view_policy
from student_trainer.config import TrainConfig
from student_trainer.plan import RunPlan, resolve
from student_trainer.teachers.config import LiveOptions, ViewsConfig
from student_trainer.teachers.open import open_teacher


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run on views that are drawn, without a teacher."""
    return train_config(
        tmp_path / "run", method="none", store=None, num_classes=4, views=ViewsConfig(size=SIZE), device="cpu"
    )


def weights(plan: RunPlan) -> torch.Tensor:
    return torch.cat([leaf.flatten() for leaf in (*plan.student.parameters(), *plan.method.parameters())])


def test_weights_and_order_are_the_seeds_own_when_assembled(config):
    first, again, other = (resolve(replace(config, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert list(first.sampler) == list(again.sampler) != list(other.sampler)


def test_plan_says_what_is_trained_on_and_takes_labels_of_its_classes_alone(config):
    plan = resolve(config)
    assert plan.sentence() == "26 samples (all labelled) from 2 units, a new view every epoch, on cpu"
    assert plan.dataset.num_classes == plan.student.num_classes == 4


@pytest.mark.parametrize(("shuffle_units", "mixed"), [(1, False), (2, True)])
def test_batches_mix_units_when_several_are_shuffled_together(config, shuffle_units, mixed):
    plan = resolve(replace(config, shuffle_units=shuffle_units, batch_size=4))
    units = [[row.unit for row in batch] for batch in plan.sampler]
    assert any(len(set(batch)) > 1 for batch in units[:3]) == mixed  # the first tar fills three batches of four


@pytest.mark.parametrize("seed", [0, 7])
def test_views_are_drawn_with_their_own_seed_when_there_is_no_store(config, seed):
    plan = resolve(changed(config, views=ViewsConfig(size=SIZE, seed=seed)))
    rows = next(iter(plan.sampler))
    got = plan.dataset[rows]
    tar, policy = Tar.open(shared_world().tars[rows[0].unit]), view_policy(plan.teacher.views.policy, SIZE)
    sample = tar.read(rows[0].position)
    image = decode_image(sample.image)
    params = draw_view(policy, seed, sample.key, rows[0].view, image.size)
    np.testing.assert_array_equal(got.pixels[0].numpy(), apply_view(image, params, policy.size))


@pytest.mark.parametrize(("policy", "interpolation"), [("a1", "bicubic"), ("rrc_flip", "bilinear")])
def test_validation_resizes_as_the_views_do_when_assembled(config, policy, interpolation):
    plan = resolve(changed(config, views=ViewsConfig(size=SIZE, policy=policy), crop_pct=0.9))
    assert (plan.preprocessing.interpolation, plan.preprocessing.crop_pct) == (interpolation, 0.9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_live_teacher_computes_in_the_dtype_asked_for_when_there_is_no_store(config, dtype):
    world = shared_world()
    name, kwargs = world.teacher
    asked = LiveOptions(name=name, model_kwargs=kwargs, checkpoint=world.checkpoint, compute_dtype=dtype)
    config = changed(config, method="scalekd", source="live", teacher=asked)
    teacher = open_teacher(config.teacher, torch.device("cpu")).teacher
    types = []
    teacher.model.get_classifier().register_forward_hook(lambda *arguments: types.append(arguments[2].dtype))
    teacher(torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8))
    assert types == [getattr(torch, dtype)]
    assert teacher.info.compute_dtype == dtype
