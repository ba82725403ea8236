import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import zarr
from tiny_store import tiny_manifest

from feature_store import Store, open_store
from feature_store.errors import CorruptStoreError, MismatchError
from feature_store.format.manifest import TapInfo
from feature_store.read.blocks import blocks_sha256, read_blocks
from feature_store.teacher import split_teacher
from feature_store.teacher.bundle import build_later_blocks, bundle_sha256, bundle_state
from feature_store.teacher.model import load_teacher

SWIN = {"img_size": 32, "patch_size": 2, "window_size": 2, "depths": (1, 1, 2, 2), "embed_dim": 24, "num_classes": 5}
TEACHERS = {"swin_tiny_patch4_window7_224": SWIN, "test_vit": {"num_classes": 5}}


def make(path, name="swin_tiny_patch4_window7_224", kwargs=SWIN, seed=0, depth=None, drop_prefix=False):
    torch.manual_seed(seed)
    teacher = load_teacher(name, pretrained=False, model_kwargs=kwargs, depth=depth, drop_prefix=drop_prefix)
    blocks = bundle_state(teacher.later_blocks)
    tokens, channels = teacher.tap_shapes["stage4"]
    manifest = dataclasses.replace(
        tiny_manifest(),
        teacher=teacher.info,
        split=teacher.split,
        blocks_sha256=bundle_sha256(blocks),
        taps={"stage4": TapInfo(tokens, channels, "f16")},
    )
    return teacher, Store.create(path, manifest, blocks)


@pytest.mark.parametrize("name", TEACHERS)
def test_later_blocks_from_the_store_give_bitwise_what_the_teacher_gives(tmp_path, name):
    teacher, store = make(tmp_path / "s", name, TEACHERS[name])
    height, width = teacher.info.input_size
    stage3 = split_teacher(teacher.model)[0](torch.randn(2, 3, height, width))
    assert blocks_sha256(read_blocks(store.objects)) == store.manifest.blocks_sha256
    reloaded = open_store(store.path).later_blocks()
    assert reloaded(stage3).equal(teacher.later_blocks(stage3))
    assert sum(p.numel() for p in reloaded.parameters()) == sum(p.numel() for p in teacher.later_blocks.parameters())
    assert not any(t.is_meta for t in [*reloaded.parameters(), *reloaded.buffers()])


def test_later_blocks_refuse_when_the_blocks_come_from_another_checkpoint(tmp_path):
    _, store = make(tmp_path / "a", seed=0)
    _, other = make(tmp_path / "b", seed=1)
    with pytest.raises(MismatchError, match=r"blocks_sha256 differs: the manifest has .* another checkpoint") as caught:
        build_later_blocks(store.manifest, read_blocks(other.objects))
    assert (caught.value.expected, caught.value.got) == (store.manifest.blocks_sha256, other.manifest.blocks_sha256)


def test_later_blocks_refuse_when_a_stored_weight_changed(tmp_path):
    _, store = make(tmp_path / "s")
    array = zarr.open_group(store.path, mode="r+")["teacher/blocks/norm.weight"]
    array[0] = 1.0000001
    with pytest.raises(MismatchError, match="blocks_sha256"):
        store.later_blocks()


def test_later_blocks_refuse_when_a_stored_weight_is_missing_or_damaged(tmp_path):
    """A missing chunk reads as zeros in zarr, a flipped bit fails its checksum; neither may pass."""
    _, store = make(tmp_path / "s")
    chunk = store.path / "teacher/blocks/norm.weight/c/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(CorruptStoreError, match="blocks are damaged: the length or crc32c of teacher/blocks/norm"):
        store.later_blocks()
    chunk.unlink()
    with pytest.raises(MismatchError, match="blocks_sha256"):
        store.later_blocks()


_MEASURE = """
import json, sys
from pathlib import Path
from feature_store import open_store
from feature_store.teacher.model import build_model

def peak_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

start = peak_megabytes()
store = open_store(sys.argv[1])
blocks = store.later_blocks()
with_blocks = peak_megabytes()
teacher = build_model(store.manifest.teacher.name, store.manifest.teacher.model_kwargs)
print(json.dumps({
    "blocks": with_blocks - start,
    "teacher": peak_megabytes() - with_blocks,
    "blocks_weights": sum(p.nbytes for p in blocks.parameters()) / 2**20,
    "teacher_weights": sum(p.nbytes for p in teacher.parameters()) / 2**20,
}))
"""


def test_loading_later_blocks_takes_memory_for_them_alone(tmp_path):
    """Peak memory of a fresh process: a 24-block ViT of over 130 MB, of which the last block is 6 MB."""
    kwargs = {"img_size": 64, "embed_dim": 384, "num_heads": 6, "depth": 24, "num_classes": 5}
    teacher, store = make(tmp_path / "s", "test_vit", kwargs, depth=1)
    del teacher
    command = [sys.executable, "-c", _MEASURE, str(store.path)]
    megabytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert megabytes["blocks_weights"] < megabytes["teacher_weights"] / 20
    assert megabytes["teacher"] > megabytes["teacher_weights"] * 0.8
    assert megabytes["blocks"] < megabytes["teacher"] / 3


def test_later_blocks_from_the_store_run_on_grid_tokens_alone_when_it_drops_the_prefix(tmp_path):
    teacher, store = make(tmp_path / "s", "test_vit", {"num_classes": 5}, drop_prefix=True)
    assert teacher.tap_shapes.keys() == teacher(torch.zeros(1, 160, 160, 3, dtype=torch.uint8)).taps.keys()
    assert teacher.tap_shapes.keys() == {"stage4", "stage3"}
    reloaded, tokens = open_store(store.path).later_blocks(), torch.randn(2, 100, 64)
    assert reloaded.info == store.manifest.split == teacher.split
    assert reloaded.info.drops_prefix
    assert reloaded(tokens).equal(teacher.later_blocks(tokens))


def test_manifest_of_a_dropped_prefix_differs_in_the_splits_prefix_alone(tmp_path):
    _, dropped = make(tmp_path / "a", "test_vit", {"num_classes": 5}, drop_prefix=True)
    _, cached = make(tmp_path / "b", "test_vit", {"num_classes": 5})
    mine, other = dropped.manifest.to_dict(), cached.manifest.to_dict()
    assert (mine["split"].pop("prefix"), other["split"].pop("prefix")) == ("dropped", "cached")
    assert mine == other
