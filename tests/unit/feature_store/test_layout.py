"""Our bytes against zarr's own, both ways."""

from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_store import CHANNELS, CLASSES, SAMPLES, TOKENS, tiny_manifest, tiny_store, unit_data

from feature_store.errors import CorruptStoreError, InputError
from feature_store.format.arrays import (
    MISSING_CHUNK,
    ShardBuilder,
    decode_chunk,
    decode_row,
    decode_shard_index,
    encode_chunk,
    encode_row,
    shard_index_bytes,
)
from feature_store.format.checksums import CRC_BYTES, combined_crc32c, crc32c, object_checksum
from feature_store.format.layout import ObjectAddress, StoreLayout
from feature_store.format.manifest import TapInfo

LAYOUT = StoreLayout(tiny_manifest())
TAP, LABEL = LAYOUT.arrays["taps/stage4"], LAYOUT.arrays["label"]
ZSTD_TAP = replace(TAP, zstd=True)


def test_store_written_by_us_reads_equal_when_opened_with_plain_zarr(tmp_path):
    manifest = tiny_manifest()
    tiny_store(tmp_path / "store", manifest, units=(0, 1), quarantined={1: "unreadable"})
    group = zarr.open_group(tmp_path / "store", mode="r")
    for unit in (0, 1):
        data = unit_data(manifest, unit, quarantined={1: "unreadable"})
        rows = slice(unit * manifest.capacity, unit * manifest.capacity + SAMPLES[unit])
        good = [i for i in range(SAMPLES[unit]) if i != 1]
        taps, logits = group["taps/stage4"][:, rows], group["logits"][:, rows]
        assert np.array_equal(taps[:, good], data.features["stage4"][""][:, good])
        assert np.array_equal(logits[:, good], data.features["logits"][""][:, good])
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
        for path in ours.layout.arrays:
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


def test_array_shapes_are_view_row_token_channel():
    rows = len(SAMPLES) * max(SAMPLES)
    assert LAYOUT.shape(TAP) == (2, rows, TOKENS, CHANNELS)
    assert LAYOUT.shape(LAYOUT.arrays["logits"]) == (2, rows, CLASSES)
    assert LAYOUT.shape(LABEL) == (rows,)
    assert TAP.object_path(1, 0) == "taps/stage4/c/0/1/0/0"
    assert LABEL.object_path(2) == "label/c/2"


def test_ops_arrays_are_absent_when_the_policy_has_no_randaugment():
    assert "view/ops" not in StoreLayout(tiny_manifest(policy="rrc_flip")).arrays


@settings(max_examples=25)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 3))
def test_object_bytes_predicts_exactly_what_is_written(written, spare):
    capacity = len(written) + spare
    values = np.zeros((sum(written), *TAP.row_shape), TAP.dtype)
    builder = ShardBuilder(TAP, capacity)
    parts = [*builder.add(np.flatnonzero(written), values), builder.finish()]
    assert sum(part.nbytes for part in parts) == builder.nbytes == TAP.object_bytes(sum(written), capacity)


@given(st.integers(0, 43), st.integers(0, 7))
def test_decode_chunk_refuses_when_any_bit_flips(byte, bit):
    raw = encode_chunk(LABEL, np.arange(3), 5)
    raw[byte] ^= 1 << bit
    with pytest.raises(CorruptStoreError, match="crc32c"):
        decode_chunk(LABEL, raw, 5, "label/c/0")


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=12), st.integers(1, 40))
def test_combined_crc32c_is_that_of_all_bytes_one_after_the_other(pieces, nbytes):
    equal = [piece.ljust(nbytes, b"\0")[:nbytes] for piece in pieces]
    checksums = np.array([crc32c(piece) for piece in equal], np.uint32)
    assert combined_crc32c(checksums, nbytes) == crc32c(b"".join(equal))


def test_arrays_are_those_of_every_store_of_the_format():
    """Path, dtype, row, whether it has views and is sharded, fill and axes: the metadata of written stores."""
    box, op, no, views, rows = ("left_top_width_height",), ("op",), (False, False), (True, False), (True, True)
    expected = [
        ("label", "<i8", (), *no, "-1", ()),
        ("key", "|u1", (16,), *no, "0", ("byte",)),
        ("key_hash", "<u8", (), *no, "0", ()),
        ("view/crop", "<i4", (4,), *views, "0", box),
        ("view/flip", "|u1", (), *views, "0", ()),
        ("view/erase", "<i4", (4,), *views, "0", box),
        ("view/noise_seed", "<u8", (), *views, "0", ()),
        ("view/pixel_crc", "<u4", (), *views, "0", ()),
        ("view/ops", "|u1", (2,), *views, "0", op),
        ("view/magnitude", "<f4", (2,), *views, "0.0", op),
        ("taps/stage4", "|i1", (4, 6), *rows, "0", ("token", "channel")),
        ("taps/stage4.scale", "<f2", (4,), *rows, "nan", ("token",)),
        ("logits", "<f2", (3,), *rows, "nan", ("class",)),
        ("taps/stage4.crc32c", "<u4", (), *views, "0", ()),
        ("taps/stage4.scale.crc32c", "<u4", (), *views, "0", ()),
        ("logits.crc32c", "<u4", (), *views, "0", ()),
    ]
    manifest = replace(tiny_manifest(), taps={"stage4": TapInfo(TOKENS, CHANNELS, "int8+zstd")})
    layout = StoreLayout(manifest)
    specs = layout.arrays
    assert [
        (s.path, s.dtype.str, s.row_shape, s.per_view, s.sharded, str(s.fill), s.dimensions) for s in specs.values()
    ] == expected
    assert [path for path, spec in specs.items() if spec.zstd] == ["taps/stage4"]
    assert [path for path, spec in specs.items() if spec.attributes] == ["taps/stage4"]
    assert list(specs) == [spec.path for spec in specs.values()]
    assert list(layout.values) == list(specs)[:-3]
    assert {name: [spec.path for spec in parts.values()] for name, parts in layout.features.items()} == {
        "stage4": ["taps/stage4", "taps/stage4.scale"], "logits": ["logits"],
    }  # fmt: skip
    assert {name: codec.codec.name for name, codec in layout.codecs.items()} == {"stage4": "int8+zstd", "logits": "f16"}


def test_shapes_and_paths_have_views_only_where_the_array_has():
    assert (LAYOUT.unit_shape(TAP), LAYOUT.unit_shape(LABEL)) == ((1, 5, TOKENS, CHANNELS), (5,))
    assert (TAP.row_bytes, LABEL.row_bytes) == (48, 8)
    assert TAP.checksums.object_path(3, 1) == "taps/stage4.crc32c/c/1/3"
    assert LABEL.object_path(2, 1) == "label/c/2"


def test_chunk_is_padded_with_the_fill_value_and_ends_with_its_crc():
    raw = encode_chunk(LABEL, np.array([7, 8]), 4)
    assert raw[:-CRC_BYTES].view("<i8").tolist() == [7, 8, -1, -1]
    assert object_checksum(raw) == crc32c(raw[:-CRC_BYTES]) == int.from_bytes(raw[-4:].tobytes(), "little")
    assert decode_chunk(LABEL, raw, 4, "-").tolist() == [7, 8, -1, -1]
    assert raw.nbytes == LABEL.object_bytes(2, 4)
    boxes = LAYOUT.arrays["view/crop"]
    assert decode_chunk(boxes, encode_chunk(boxes, np.ones((1, 4)), 2), 2, "-").tolist() == [[1] * 4, [0] * 4]


@pytest.mark.parametrize("size", [0, 1, 3])
def test_decode_chunk_refuses_when_there_is_no_room_for_a_crc(size):
    with pytest.raises(CorruptStoreError, match="object label/c/0 is damaged: the crc32c of its chunk does not match"):
        decode_chunk(LABEL, np.zeros(size, np.uint8), 5, "label/c/0")


@pytest.mark.parametrize("capacity", [2, 4])
def test_decode_chunk_refuses_another_length_when_its_crc_is_right(capacity):
    raw = encode_chunk(LABEL, np.arange(2), capacity)
    message = f"label/c/1 is damaged: its chunk has {8 * capacity} bytes, expected 24; drop the unit"
    with pytest.raises(CorruptStoreError, match=message):
        decode_chunk(LABEL, raw, 3, "label/c/1")


def built(spec, positions, rows, capacity):
    builder = ShardBuilder(spec, capacity)
    parts = [*builder.add(np.array(positions), rows), builder.finish()]
    return builder, np.concatenate(parts)


@pytest.mark.parametrize("spec", [TAP, ZSTD_TAP])
def test_shard_index_points_at_rows_and_says_which_are_missing(spec):
    rows = np.random.default_rng(0).standard_normal((2, TOKENS, CHANNELS)).astype(np.float16)
    builder, shard = built(spec, [1, 3], rows, 4)
    tail = shard[-shard_index_bytes(4) :]
    index = decode_shard_index(tail, 4, "-")
    assert index[[0, 2]].tolist() == [[MISSING_CHUNK] * 2] * 2
    for position, row in ((1, rows[0]), (3, rows[1])):
        start, length = index[position].astype(int)
        stored = shard[start : start + length - CRC_BYTES]
        assert crc32c(stored) == object_checksum(shard[start : start + length]) == builder.checksums[position]
        out = np.empty(spec.row_bytes, np.uint8)
        decode_row(spec, stored, out, "-")
        assert out.tobytes() == row.tobytes()
        assert stored.tobytes() == encode_row(spec, row).tobytes()
    assert builder.checksums[[0, 2]].tolist() == [0, 0]
    assert (builder.nbytes, builder.checksum) == (shard.nbytes, object_checksum(shard))


def test_shard_index_refuses_when_it_is_anothers():
    _, shard = built(TAP, [], [], 4)
    with pytest.raises(CorruptStoreError, match="x is damaged: its shard index has 64 bytes, expected 80"):
        decode_shard_index(shard, 5, "x")
    shard[3] ^= 1
    with pytest.raises(CorruptStoreError, match="the crc32c of its shard index does not match"):
        decode_shard_index(shard, 4, "x")


def test_shard_builder_refuses_when_rows_and_positions_differ_in_number():
    with pytest.raises(ValueError, match="shorter"):
        ShardBuilder(TAP, 4).add(np.array([0, 1]), np.zeros((1, TOKENS, CHANNELS), np.float16))


def test_rows_that_are_not_contiguous_are_stored_in_order():
    turned = np.arange(TOKENS * CHANNELS, dtype=np.float16).reshape(CHANNELS, TOKENS).T
    assert encode_row(TAP, turned).tobytes() == turned.tobytes()


@pytest.mark.parametrize("stored", [b"", b"nonsense", encode_row(ZSTD_TAP, np.zeros(3, np.float16)).tobytes()[:-2]])
def test_decode_row_refuses_when_it_cannot_be_decompressed(stored):
    with pytest.raises(CorruptStoreError, match="taps/x is damaged: a row cannot be decompressed"):
        decode_row(ZSTD_TAP, np.frombuffer(stored, np.uint8), np.empty(48, np.uint8), "taps/x")


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_object_bytes_bounds_rows_that_zstd_cannot_compress(tokens):
    """Closely: plans reserve this much."""
    spec = replace(ZSTD_TAP, dtype=np.dtype("u1"), row_shape=(tokens, 64))
    rows = np.random.default_rng(0).integers(0, 256, (3, tokens, 64), np.uint8)
    _, shard = built(spec, [0, 1, 2], rows, 5)
    most = spec.object_bytes(3, 5)
    assert shard.nbytes <= most <= shard.nbytes + 3 * (spec.row_bytes // 256 + 64)
    assert replace(spec, zstd=False).object_bytes(3, 5) == 3 * (64 * tokens + 4) + 5 * 16 + 4


def test_layout_refuses_an_unknown_codec():
    with pytest.raises(InputError, match="unknown codec 'int3'"):
        StoreLayout(tiny_manifest(codec="int3"))


def test_layout_gives_each_arrays_object_bytes_for_its_own_capacity():
    assert [LAYOUT.object_bytes(spec, 2) for spec in (TAP, LABEL)] == [2 * (48 + 4) + 5 * 16 + 4, 5 * 8 + 4]


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_address_is_the_inverse_of_object_path_for_every_array(unit, view):
    """Also for units and views the manifest does not have: the store may have grown since."""
    addresses = [ObjectAddress(spec, unit, view if spec.per_view else None) for spec in LAYOUT.arrays.values()]
    assert [LAYOUT.address(array.object_path(u, v)) for array, u, v in addresses] == addresses


@pytest.mark.parametrize("spec", LAYOUT.arrays.values(), ids=lambda spec: spec.path)
def test_address_is_none_for_near_misses_of_every_arrays_path(spec):
    path = spec.object_path(3, 2)
    array, _, chunk = path.partition("/c/")
    numbers = chunk.split("/")
    for at in range(len(numbers)):
        for wrong in ("", "-1", "+3", " 3", "3 ", "03", "00", "x", "1.0", "1_0", "0x1", "\u00b2", "\u0663", "9" * 5000):
            near = "/".join([array, "c", *numbers[:at], wrong, *numbers[at + 1 :]])
            assert LAYOUT.address(near) is None, near
    fewer = "/".join([array, "c", *numbers[:-1]])
    for near in (
        fewer, f"{path}/0", f"{path}/", f"/{path}", f"x/{path}", f"{path}.1-1.partial", f"{array}/{chunk}",
        f"{array}/c", f"{array}/c/", f"{array}//c/{chunk}", f"{array}/c//{chunk}", f"{array}/c/c/{chunk}",
        f"{array}/C/{chunk}", f"{array}/d/{chunk}", f"{array}/zarr.json", f"{array}x/c/{chunk}", array, chunk,
    ):  # fmt: skip
        assert LAYOUT.address(near) is None, near
    for at in range(1 + spec.per_view, len(numbers)):  # a row is one chunk along its own axes
        near = "/".join([array, "c", *numbers[:at], "1", *numbers[at + 1 :]])
        assert LAYOUT.address(near) is None, near


@pytest.mark.parametrize(
    "path", ["", "/", "c", "/c/", "taps/other/c/0/1/0/0", "stage4/c/0/1/0/0", "zarr.json", "commits/index"]
)
def test_address_is_none_for_paths_of_no_array(path):
    assert LAYOUT.address(path) is None


@given(st.text(alphabet="0123456789/c-+_ \u0660\u00b2", max_size=12), st.sampled_from(list(LAYOUT.arrays)))
def test_address_of_any_text_is_none_or_of_exactly_that_path(text, array):
    path = f"{array}/c/{text}"
    address = LAYOUT.address(path)
    assert address is None or address.array.object_path(address.unit, address.view) == path


@given(st.integers(0, 9), st.integers(0, 3), st.integers(1, 3))
def test_object_index_is_the_place_in_object_paths(unit, first, count):
    views = range(first, first + count)
    paths = LAYOUT.object_paths(unit, views)
    assert [LAYOUT.object_index(path, unit, views) for path in paths] == list(range(len(paths)))
    assert len(set(paths)) == len(LAYOUT.per_unit) + count * len(LAYOUT.per_view)
    for path in [LABEL.object_path(unit + 1), TAP.object_path(unit, first + count), TAP.path, "notes.txt"]:
        with pytest.raises(KeyError):
            LAYOUT.object_index(path, unit, views)
