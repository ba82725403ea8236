"""Our bytes against zarr's own, both ways."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_store import CHANNELS, CLASSES, SAMPLES, TOKENS, tiny_manifest, tiny_store, unit_data

from feature_store.errors import CorruptStoreError
from feature_store.layout import (
    ShardBuilder,
    array_specs,
    crc32c,
    decode_chunk,
    encode_chunk,
    joined_crc32c,
    joined_crc32cs,
    object_bytes,
)


def test_store_written_by_us_reads_equal_when_opened_with_plain_zarr(tmp_path):
    manifest = tiny_manifest()
    tiny_store(tmp_path / "store", manifest, units=(0, 1), quarantined={1: "unreadable"})
    group = zarr.open_group(tmp_path / "store", mode="r")
    for unit in (0, 1):
        data = unit_data(manifest, unit, quarantined={1: "unreadable"})
        rows = slice(unit * manifest.capacity, unit * manifest.capacity + SAMPLES[unit])
        good = [i for i in range(SAMPLES[unit]) if i != 1]
        taps, logits = group["taps/stage4"][:, rows], group["logits"][:, rows]
        assert np.array_equal(taps[:, good], data.taps["stage4"].astype(np.float16)[:, good])
        assert np.array_equal(logits[:, good], data.logits.astype(np.float16)[:, good])
        assert np.isnan(taps[:, 1]).all()
        assert np.isnan(logits[:, 1]).all()
        assert np.array_equal(group["label"][rows], data.labels)
        assert np.array_equal(group["view/pixel_crc"][:, rows], data.pixel_crc)
        assert group["view/crop"][1, rows][good].tolist() == [list(data.params[1][i].crop) for i in good]
        magnitudes = [list(data.params[1][i].magnitudes) for i in good]
        assert group["view/magnitude"][1, rows][good].astype(float).tolist() == magnitudes


def test_rows_of_an_unwritten_unit_are_nan_when_opened_with_plain_zarr(tmp_path):
    manifest = tiny_manifest()
    tiny_store(tmp_path / "store", manifest, units=(0,))
    group = zarr.open_group(tmp_path / "store", mode="r")
    assert np.isnan(group["taps/stage4"][:, manifest.capacity :]).all()
    assert (group["label"][manifest.capacity :] == -1).all()


@pytest.mark.parametrize("codec", ["f16", "f32"])
def test_objects_equal_zarr_pythons_own_when_it_writes_the_same_values(tmp_path, codec):
    """zarr-python writes the same rows into the same arrays; every object must have the same bytes."""
    manifest = tiny_manifest(codec=codec)
    ours = tiny_store(tmp_path / "ours", manifest)
    theirs = tiny_store(tmp_path / "theirs", manifest, units=())
    source, target = zarr.open_group(ours.path, mode="r"), zarr.open_group(theirs.path, mode="r+")
    with zarr.config.set({"array.write_empty_chunks": True}):
        for path in array_specs(manifest):
            target[path][...] = source[path][...]
    compared = 0
    for record in ours.committed.records:
        for path in record.objects:
            sharded = path.startswith(("taps/stage4/", "logits/"))
            if sharded and record.samples < manifest.capacity:
                continue  # zarr stores explicit NaN rows, we leave them out
            assert (theirs.path / path).read_bytes() == (ours.path / path).read_bytes(), path
            compared += 1
    assert compared > 60


def test_array_shapes_are_view_row_token_channel(tmp_path):
    manifest = tiny_manifest()
    specs = array_specs(manifest)
    rows = len(SAMPLES) * max(SAMPLES)
    assert specs["taps/stage4"].shape(manifest) == (2, rows, TOKENS, CHANNELS)
    assert specs["logits"].shape(manifest) == (2, rows, CLASSES)
    assert specs["label"].shape(manifest) == (rows,)
    assert specs["taps/stage4"].object_path(1, 0) == "taps/stage4/c/0/1/0/0"
    assert specs["label"].object_path(2) == "label/c/2"


def test_ops_arrays_are_absent_when_the_policy_has_no_randaugment():
    assert "view/ops" not in array_specs(tiny_manifest(policy="rrc_flip"))


@settings(max_examples=25)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 3))
def test_object_bytes_predicts_exactly_what_is_written(written, spare):
    spec = array_specs(tiny_manifest())["taps/stage4"]
    capacity = len(written) + spare
    values = np.zeros((sum(written), *spec.row_shape), spec.dtype)
    builder = ShardBuilder(spec, capacity)
    parts = [*builder.add(np.flatnonzero(written), values), builder.finish()]
    assert sum(part.nbytes for part in parts) == builder.nbytes == object_bytes(spec, sum(written), capacity)


@given(st.integers(0, 43), st.integers(0, 7))
def test_decode_chunk_refuses_when_any_bit_flips(byte, bit):
    spec = array_specs(tiny_manifest())["label"]
    raw = encode_chunk(spec, np.arange(3), 5)
    raw[byte] ^= 1 << bit
    with pytest.raises(CorruptStoreError, match="crc32c"):
        decode_chunk(spec, raw, 5, "label/c/0")


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=12), st.integers(1, 40))
def test_joined_crc32c_is_that_of_all_bytes_one_after_the_other(pieces, nbytes):
    equal = [piece.ljust(nbytes, b"\0")[:nbytes] for piece in pieces]
    checksums = np.array([crc32c(piece) for piece in equal], np.uint32)
    assert joined_crc32c(checksums, nbytes) == crc32c(b"".join(equal))


@given(st.lists(st.binary(min_size=9, max_size=9), min_size=1, max_size=12), st.data())
def test_joined_crc32cs_are_those_of_each_range(pieces, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(pieces) - 1))))) if len(pieces) > 1 else []
    starts, stops = [0, *cuts], [*cuts, len(pieces)]
    checksums = np.array([crc32c(piece) for piece in pieces], np.uint32)
    joined = joined_crc32cs(checksums, np.array(starts), np.array(stops), 9)
    assert joined == [crc32c(b"".join(pieces[start:stop])) for start, stop in zip(starts, stops, strict=True)]
