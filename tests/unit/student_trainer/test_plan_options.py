"""Options of a run reach what it is made of."""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from training_world import SIZE, changed, samples, shared_world, train_config, write_tar

from feature_store.errors import InputError, MismatchError, ResourceError
from feature_store.format.addressing import RowId
from feature_store.inputs.tar import Tar
from feature_store.store import open_store
from feature_store.views import apply_view, decode_image, draw_view, view_policy
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.engine.distributed import Group
from student_trainer.methods import FD, KD, ScaleKD, SeveralTeachers
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.plan import RunPlan, find_device, resolve
from student_trainer.teachers.config import LiveOptions, ViewsConfig
from student_trainer.teachers.expectations import ExpectConfig
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


@pytest.fixture
def cached(tmp_path) -> TrainConfig:
    """A run on a store's views, of two tars with one quarantined sample."""
    return train_config(tmp_path / "run", student="test_vit", device="cpu")


def parameters(module: torch.nn.Module) -> int:
    return sum(leaf.numel() for leaf in module.parameters())


def test_plan_is_described_in_full_for_the_runs_folder(cached):
    config = replace(cached, preset="mine", optim=OptimConfig(lr=0.1, lr_batch=4, lr_scale="linear"), num_classes=None)
    plan = resolve(config)
    store = open_store(shared_world().store)
    described = plan.describe()
    assert described.pop("method") == {"name": "scalekd", **asdict(config.scalekd)}
    assert described == {
        "preset": "mine",
        "needs": plan.method.needs._asdict(),
        "notes": [],
        "teacher": "test_vit",
        "weights": [1.0],
        "store_fingerprint": store.manifest.fingerprint(),
        "device": "cpu",
        "processes": 1,
        "num_classes": 4,
        "student_dims": plan.student.dims,
        "student_grids": plan.student.grids,
        "student_parameters": parameters(plan.student),
        "method_parameters": parameters(plan.method),
        "preprocessing": {
            "input_size": (SIZE, SIZE), "mean": plan.teacher.info.mean, "std": plan.teacher.info.std,
            "interpolation": "bicubic", "crop_pct": config.crop_pct,
        },
        "lr": pytest.approx(0.2),
        "samples": 25,
        "labelled": 25,
        "units": 2,
        "quarantined": 1,
        "views": 2,
        "steps_per_epoch": 3,
    }  # fmt: skip
    assert plan.sentence() == ("25 samples (all labelled) from 2 units, 1 quarantined ones left out, 2 views, on cpu")
    (note,) = plan.notes()
    assert re.fullmatch(r"top-1 of the teacher's stored logits: [\d.]+% of 13 labelled rows of the first unit", note)


def test_plan_of_a_run_without_a_teacher_names_none_and_normalises_as_its_student(config):
    plan = resolve(config)
    described = plan.describe()
    assert (described["teacher"], described["weights"], described["store_fingerprint"]) == (None, [], None)
    assert (described["views"], described["processes"]) == (None, 1)
    assert plan.preprocessing.mean == plan.student.model.pretrained_cfg["mean"]
    assert plan.preprocessing.std == plan.student.model.pretrained_cfg["std"]


def test_identity_is_of_what_is_read(config, cached):
    stored, drawn = resolve(cached).identity, resolve(config).identity
    store = open_store(shared_world().store)
    assert (stored["views"], stored["drawn"], stored["features"]) == (2, None, "cached")
    assert stored["tars"].keys() == {"train-0.tar", "train-1.tar"}
    assert stored["tars"]["train-0.tar"] == store.manifest.tars[0].header_sha256
    assert (drawn["views"], drawn["features"], drawn["weights"]) == (None, "none", None)
    assert drawn["drawn"] == {**view_policy("rrc_flip", SIZE).to_dict(), "seed": 0}
    plain = resolve(replace(cached, method="none")).identity  # of the store, only views are read
    assert (plain["features"], plain["weights"], plain["views"]) == ("none", None, 2)


def test_process_of_a_group_takes_its_share_of_each_batch(config):
    alone = list(resolve(replace(config, accumulate=2)).sampler)
    shares = [list(resolve(config, Group(rank, 2, rank)).sampler) for rank in range(2)]
    assert [rows for batch in zip(*shares, strict=True) for rows in batch] == alone
    assert [len(rows) for rows in alone] == [4] * 6


@pytest.mark.parametrize(("num_views", "expected"), [(None, 2), (1, 1)])
def test_views_of_a_store_are_used_in_turn(cached, num_views, expected):
    plan = resolve(changed(cached, num_views=num_views))
    assert plan.sampler.num_views == expected
    assert len({plan.sampler.view_of(epoch) for epoch in range(4)}) == expected


def test_weights_are_the_same_whatever_the_teacher_side(cached):
    live = changed(cached, source="live", teacher=LiveOptions(checkpoint=shared_world().checkpoint))
    assert torch.equal(weights(resolve(cached)), weights(resolve(live)))


@pytest.mark.parametrize(("method", "kind"), [("scalekd", ScaleKD), ("kd", KD), ("fd", FD)])
def test_method_is_built_for_teacher_and_student_with_its_options(cached, method, kind):
    plan = resolve(replace(cached, method=method, label_smoothing=0.25, num_classes=None))
    assert type(plan.method) is kind
    assert plan.method.config == plan.config.method_config()
    assert plan.method.task.keywords == {"label_smoothing": 0.25}
    assert bool(plan.dataset.sources) == bool(plan.method.needs.taps or plan.method.needs.logits)


def test_task_loss_is_the_one_asked_for(config):
    logits, labels = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
    losses = {task: resolve(replace(config, task=task)).method.task(logits, labels).item() for task in ("ce", "bce")}
    assert losses["ce"] != pytest.approx(losses["bce"])


def test_several_stores_are_several_teachers_with_weights(cached):
    stores = shared_world().store, shared_world("vit", "f32").store
    plan = resolve(changed(cached, store=stores, store_weights=(1.0, 0.5), label_smoothing=0.25))
    assert type(plan.method) is SeveralTeachers
    assert plan.method.task.keywords == plan.method.methods[1].task.keywords == {"label_smoothing": 0.25}
    assert plan.method.teacher_weights == (1.0, 0.5)
    assert plan.describe()["weights"] == [1.0, 0.5]
    assert len(plan.dataset.sources) == 2


def test_classes_are_those_asked_for_else_the_teachers_else_the_labels(cached, config, tmp_path):
    assert resolve(cached).student.num_classes == 4
    assert resolve(replace(cached, num_classes=9, scalekd=ScaleKDConfig(kd_alpha=None))).student.num_classes == 9
    with pytest.raises(MismatchError, match=r"num_classes differs: the teacher has 4, got 9; leave out --num-classes"):
        resolve(replace(cached, num_classes=9))
    with pytest.raises(InputError, match=r"labels up to 3, but the student 3 classes; give --num-classes 4 or more"):
        resolve(replace(cached, num_classes=3, method="fd"))
    with pytest.raises(InputError, match=r"number of classes is unknown.*give --num-classes"):
        resolve(replace(config, num_classes=None))


def test_methods_that_need_labels_are_refused_by_how_many_are_missing(config, cached, tmp_path):
    content = [{k: v for k, v in sample.items() if k != "cls"} for sample in samples(8, seed=1)]
    tar = write_tar(tmp_path / "none.tar", content)
    without = replace(config, tars=(tar,), labels="optional")
    with pytest.raises(InputError, match=r"^--method none learns from labels alone, but none of 8 samples has one;"):
        resolve(without)
    content[2]["cls"] = "1"
    plan = resolve(replace(without, tars=(write_tar(tmp_path / "one.tar", content),)))
    assert plan.sentence().startswith("8 samples (1 labelled) from 1 units, a new view")
    assert plan.summary()["labelled"] == 1


def test_student_gives_maps_of_the_stages_asked_for(config):
    default, other = (resolve(replace(config, student_stages=stages)).student for stages in (None, (1, 2)))
    assert default.grids == ((4, 4), (2, 2))
    assert other.grids == ((16, 16), (8, 8))


def test_features_that_a_preset_does_not_expect_are_refused_with_its_command(cached):
    expecting = replace(cached, preset="adv-swin_l-resnet50", expect=ExpectConfig(teacher="swin_large"))
    with pytest.raises(MismatchError, match=r"expect.teacher differs: .*presets adv-swin_l-resnet50 --cache-command"):
        resolve(expecting)


def test_synchronised_batchnorm_is_the_students_alone(cached):
    group = Group(0, 2, 0)
    with pytest.raises(InputError, match="--sync-bn with several processes needs GPUs"):
        resolve(replace(cached, sync_bn=True), group)
    assert resolve(replace(cached, sync_bn=True)).group == Group()


@pytest.mark.parametrize(
    ("name", "local_rank", "gpus", "expected"),
    [
        ("auto", None, 0, "cpu"), ("auto", 1, 0, "cpu"), ("auto", None, 2, "cuda"), ("auto", 1, 2, "cuda:1"),
        ("cuda", 0, 2, "cuda:0"), ("cuda:1", None, 2, "cuda:1"), ("cpu", 1, 2, "cpu"),
    ],
)  # fmt: skip
def test_device_is_the_processs_own(monkeypatch, name, local_rank, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert find_device(name, local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("tpu9", InputError, "--device is 'tpu9', expected auto, cpu, cuda or cuda:N"),
        ("cuda:1", ResourceError, "--device is cuda:1, but torch sees 1 GPUs here; use --device cpu"),
    ],
)
def test_device_is_refused_when_there_is_no_such_one(monkeypatch, name, kind, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(kind, match=f"^{message}$"):
        find_device(name)
    assert find_device("cuda:0") == torch.device("cuda:0")


def test_device_cuda_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ResourceError, match="--device is cuda, but torch sees 0 GPUs"):
        find_device("cuda")


@pytest.mark.parametrize(("check_all", "position", "checked"), [(True, 8, True), (False, 8, False), (False, 7, True)])
def test_views_are_checked_as_asked(cached, check_all, position, checked):
    """Without check_all_pixels, the first eight of a unit are."""
    plan = resolve(changed(cached, check_all_pixels=check_all))
    row = RowId(0, position, 0)
    sample = plan.dataset.views.read(plan.dataset.tars[0], row)
    wrong = 255 - plan.dataset.views.pixels(row, sample)
    if checked:
        with pytest.raises(MismatchError, match=rf"pixels of sample '{sample.key}', view 0"):
            plan.dataset.views.check(row, sample, wrong)
    else:
        plan.dataset.views.check(row, sample, wrong)
