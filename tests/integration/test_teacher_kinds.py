"""Teachers of every kind: cached, verified, trained from, with the loss terms of the live teacher."""

from pathlib import Path

import pytest
import timm
import torch
from tiny_jobs import make_config
from training_world import World, make_teacher, samples, train_config, write_tar

from feature_store import RowId, open_store
from feature_store.errors import InputError
from feature_store.tools.cli import main as feature_store
from student_trainer.data.loader import BatchLoader
from student_trainer.engine.metrics import read_metrics
from student_trainer.methods.scalekd import ScaleKDConfig
from student_trainer.plan import resolve
from student_trainer.teachers.config import LiveOptions
from student_trainer.train import Run, train
from teacher_service.cache.job import cache
from teacher_service.config import CacheConfig
from teacher_service.plan.sizes import plan
from teacher_service.verify.config import VerifyConfig
from teacher_service.verify.recompute import verify

_AT_64 = {"pretrained_cfg_overlay": {"input_size": [3, 64, 64]}, "num_classes": 4}
_SMALL = {"img_size": 64, "embed_dim": 64, "depth": 4, "num_heads": 2}
WITH_LATER_BLOCKS = {
    "convnext": ("test_convnext", _AT_64),
    "hiera": (
        "hiera_tiny_224",
        {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1], "num_classes": 4},
    ),
    "siglip": ("vit_base_patch16_siglip_224", _SMALL),
}
WITHOUT = {
    "resnet": ("test_resnet", _AT_64),
    "efficientnet": ("test_efficientnet", _AT_64),
    "maxvit": ("test_maxvit", {"img_size": 64, "num_classes": 4}),
    "naflex": ("naflexvit_base_patch16_gap", {**_AT_64, "embed_dim": 64, "depth": 4, "num_heads": 2}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {
            "img_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 2,
            "num_classes": 4,
        },
    ),
}  # fmt: skip
KINDS = {**WITH_LATER_BLOCKS, **WITHOUT}
STAGE3 = {"stage3_original", "stage3_alternative"}


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tar(tmp_path_factory.mktemp("tars") / "train.tar", samples(8, seed=1))


def cached(kind: str, tar: str, folder: Path, **options) -> World:
    """A world whose store was written by the cache job."""
    name, kwargs = KINDS[kind]
    make_teacher((name, kwargs), folder / "teacher.safetensors")
    world = World((tar,), (tar,), folder / "store", (name, kwargs), folder / "teacher.safetensors")
    cache(
        make_config(
            CacheConfig,
            tars=world.tars,
            teacher=name,
            model_kwargs=kwargs,
            checkpoint=world.checkpoint,
            store=world.store,
            **{"workers": 0, "batch_size": 4, "tap_codec": "f32", **options},
        )
    )
    return world


def terms(world: World, run: Path, source: str, **changes) -> dict[str, float]:
    """Weighted loss terms of the first batch."""
    teacher = LiveOptions(checkpoint=world.checkpoint) if source == "live" else LiveOptions()
    asked = train_config(run, world, source=source, teacher=teacher, batch_size=4, **changes)
    running = Run(resolve(asked))
    batch = next(iter(BatchLoader(running.plan.dataset, running.plan.sampler)))
    return {name: term.item() for name, term in running.terms(batch).weighted.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_of_any_kind_is_cached_verified_and_trained_from(kind: str, tar: str, tmp_path: Path) -> None:
    if not timm.is_model(KINDS[kind][0]):
        pytest.skip(f"this timm has no {KINDS[kind][0]}")
    world = cached(kind, tar, tmp_path)
    store = open_store(world.store)
    assert store.manifest.split.has_later_blocks == (kind in WITH_LATER_BLOCKS)

    found = verify(
        make_config(VerifyConfig, tars=world.tars, store=world.store, checkpoint=world.checkpoint, workers=1)
    )
    assert (found.sound, found.rows) == (True, 8)

    done = train(train_config(tmp_path / "run", world, batch_size=4))
    steps = [line for line in read_metrics(done.run / "metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) == 2
    assert (steps[0]["loss"].keys() >= STAGE3) == (kind in WITH_LATER_BLOCKS)

    from_store, live = (terms(world, tmp_path / source, source) for source in ("store", "live"))
    assert from_store.keys() == live.keys()
    for name, value in from_store.items():
        assert value == pytest.approx(live[name], rel=1e-3), name  # batches of the job and of the run differ


@pytest.mark.parametrize("kind", ["resnet", "naflex"])
def test_tpp_is_off_and_said_so_when_the_teacher_has_no_later_blocks(kind: str, tar: str, tmp_path: Path) -> None:
    world = cached(kind, tar, tmp_path)
    method = resolve(train_config(tmp_path / "run", world)).method
    family = {"resnet": "ResNet", "naflex": "NaFlexVit"}[kind]
    assert method.notes == (f"TPP is off: the teacher, a {family}, has no later blocks",)
    assert not method.needs.tail
    assert "stage3_original" not in method.weights

    asked = ScaleKDConfig(alpha_stage3=0.2)
    with pytest.raises(InputError, match=f"alpha_stage3 is 0.2, an option of TPP, but the teacher, a {family}, has no"):
        resolve(train_config(tmp_path / "run2", world, scalekd=asked))
    with pytest.raises(InputError, match=f"{KINDS[kind][0]} has no later blocks .*or scalekd, whose TPP is then off"):
        open_store(world.store).later_blocks()


def test_store_without_later_blocks_is_described_and_served(tar: str, tmp_path: Path, serve, capsys) -> None:
    world = cached("resnet", tar, tmp_path)
    assert feature_store(["info", str(world.store)]) == 0
    assert "none: TPP is off with this teacher, a ResNet" in " ".join(capsys.readouterr().out.split())
    ask = serve(world.store)
    assert ask("/v1/blocks").status == 200
    assert ask("/v1/rows/s000").status == 200


def test_cache_refuses_options_of_later_blocks_when_the_teacher_has_none(tar: str, tmp_path: Path) -> None:
    for option in ({"depth": 2}, {"drop_prefix": True}):
        with pytest.raises(InputError, match=r"test_resnet has no later blocks.*leave out depth and drop_prefix"):
            cached("resnet", tar, tmp_path, **option)


@pytest.mark.parametrize(
    ("kind", "taps"),
    [("siglip", ("stage4", "stage3", "block3", "block0")), ("convnext", ("stage4", "block3", "block1")),
     ("resnet", ("stage4", "block2"))],
)  # fmt: skip
def test_store_holds_the_outputs_of_blocks_when_taps_name_them(
    kind: str, taps: tuple[str, ...], tar: str, tmp_path: Path
) -> None:
    world = cached(kind, tar, tmp_path, taps=taps)
    store = open_store(world.store)
    assert store.manifest.taps.keys() == set(taps)
    rows = [RowId(0, 0, 0), RowId(0, 5, 0)]
    stored = store.source().read(rows)
    live = resolve(
        train_config(tmp_path / "run", world, source="live", teacher=LiveOptions(checkpoint=world.checkpoint))
    )
    teacher, seen = live.teacher.teacher, {}
    for index, info in enumerate(teacher.model.feature_info):
        teacher.model.get_submodule(info["module"]).register_forward_hook(
            lambda _module, _inputs, output, index=index: seen.update({f"block{index}": output})
        )
    teacher(live.dataset[rows].pixels, taps)
    for tap in taps:
        if tap in seen:
            tokens = seen[tap] if seen[tap].ndim == 3 else seen[tap].flatten(2).transpose(1, 2)
            torch.testing.assert_close(torch.from_numpy(stored.taps[tap]), tokens, rtol=1e-3, atol=1e-4)
    assert len(seen.keys() & set(taps)) == sum(tap.startswith("block") for tap in taps)


BLOCK_METHOD = """
from student_trainer.methods import Method, Needs, Terms


class Block(Method):
    needs = Needs(taps=("{tap}",))

    def forward(self, student, batch):
        size = batch.teacher.taps["{tap}"].square().mean()
        return Terms({{"task": self.task(student.logits, batch.labels), "block": size}}, {{"task": 1.0, "block": 0.1}})
"""


def test_method_of_ones_own_reads_a_block_from_store_and_live_teacher(tar: str, tmp_path: Path, own_module) -> None:
    own_module("block_method", BLOCK_METHOD.format(tap="block2"))
    own_module("no_block_method", BLOCK_METHOD.format(tap="block7"))
    world = cached("resnet", tar, tmp_path, taps=("stage4", "block2"))
    from_store, live = (
        terms(world, tmp_path / source, source, method="block_method:Block") for source in ("store", "live")
    )
    assert from_store == pytest.approx(live, rel=1e-3)
    assert from_store["block"] > 0
    with pytest.raises(InputError, match=r"has no tap 'block7'; it has stage4 and block0 to block4"):
        terms(world, tmp_path / "live7", "live", method="no_block_method:Block")


def test_plan_lists_the_taps_there_are_when_one_is_unknown(tar: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tap 'block9'; it has stage4 and block0 to block4"):
        cached("resnet", tar, tmp_path, taps=("stage4", "block9"))
    with pytest.raises(InputError, match=r"has no tap 'stage3'; it has stage4 and"):
        cached("resnet", tar, tmp_path, taps=("stage4", "stage3"))


def test_plan_gives_the_sizes_of_the_store_when_the_teacher_has_no_later_blocks(tar: str, tmp_path: Path) -> None:
    name, kwargs = KINDS["resnet"]
    config = make_config(
        CacheConfig, tars=(tar,), teacher=name, model_kwargs=kwargs, store=tmp_path / "none", tap_codec="f16"
    )
    promised = plan(config)
    assert promised.taps == {"stage4": (4, 96, "f16")}
    assert promised.bytes["teacher/blocks"] == 0
