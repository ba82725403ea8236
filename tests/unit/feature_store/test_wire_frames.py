import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from feature_store.client.frames import MAX_HEADER_BYTES, decode, encode, read_frame
from feature_store.errors import InputError, WireError

RNG = np.random.default_rng(0)
ARRAYS = {
    "stage4": RNG.integers(-128, 128, (5, 4, 6), np.int8),
    "stage4.scale": RNG.standard_normal((5, 4)).astype("<f2"),
    "logits": RNG.integers(0, 2**16, (5, 3), np.uint16),
    "rows": RNG.integers(0, 99, (5, 3), np.int64),
    "none": np.empty((0, 7), "<f4"),
    "one": np.array(1.5),
}
STRINGS = {"store": "5e", "note": 'ünï "quoted"'}


def body(arrays=ARRAYS, metadata=STRINGS) -> bytes:
    frame = encode(arrays, metadata)
    whole = b"".join(frame.chunks(7))
    assert len(whole) == frame.nbytes
    return whole


def with_header(described, data: bytes = b"") -> bytes:
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + data


def dribble(whole: bytes):
    """A stream that gives at most three bytes at a time."""
    stream = io.BytesIO(whole)
    return lambda memory: stream.readinto(memory[:3])


def assert_same(got, want=ARRAYS):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes()


def test_frame_comes_back_whole_when_it_arrives_in_small_pieces():
    whole = body()
    arrays, strings = read_frame(dribble(whole), len(whole))
    assert_same(arrays)
    assert strings.items() >= STRINGS.items()
    assert_same(decode(whole)[0])


def test_frame_is_a_safetensors_file_and_such_a_file_is_a_frame():
    assert_same(load(body()))
    assert_same(decode(save(ARRAYS, metadata=STRINGS))[0])


def test_frame_shares_the_memory_of_its_arrays_and_aligns_them():
    frame = encode(ARRAYS)
    assert len(frame.header) % 8 == 0
    shared = [np.shares_memory(np.frombuffer(buffer, np.uint8), ARRAYS["stage4"]) for buffer in frame.buffers]
    assert sum(shared) == 1
    for array in decode(bytes(b"".join(frame.chunks())))[0].values():
        assert array.flags.aligned


def test_bfloat16_arrives_as_its_bit_patterns():
    described = {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    (array,) = decode(with_header(described, b"\x80\x3f\x00\x40"))[0].values()
    assert (array.dtype, array.tolist()) == (np.dtype("<u2"), [0x3F80, 0x4000])


def test_read_fills_the_memory_given_when_it_has_room():
    whole, out = body(), {"stage4": np.zeros((9, 4, 6), np.int8)}
    arrays, _ = read_frame(io.BytesIO(whole).readinto, len(whole), out)
    assert np.shares_memory(arrays["stage4"], out["stage4"])
    assert_same(arrays)


@pytest.mark.parametrize(
    "memory", [np.zeros((4, 4, 6), np.int8), np.zeros((9, 4, 6), np.uint8), np.zeros((9, 4, 12), np.int8)[..., ::2]]
)
def test_read_refuses_memory_that_does_not_fit(memory):
    whole = body()
    with pytest.raises(InputError, match=r"out\['stage4'\].*expected int8 \[5, 4, 6\] or more rows"):
        read_frame(io.BytesIO(whole).readinto, len(whole), {"stage4": memory})


@pytest.mark.parametrize("array", [np.zeros(2, ">f4"), np.zeros((2, 2))[:, ::2], np.zeros(2, complex)])
def test_encode_refuses_what_cannot_be_sent(array):
    with pytest.raises(InputError, match="array 'x' is .*cannot be sent"):
        encode({"x": array})


def test_read_refuses_a_body_that_ends_anywhere():
    whole = body()
    for end in range(len(whole)):
        with pytest.raises(WireError):
            read_frame(io.BytesIO(whole[:end]).readinto, len(whole))
        with pytest.raises(WireError):
            decode(whole[:end])


def test_read_notices_every_flipped_bit_of_an_array():
    whole = bytearray(body())
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole)):
        whole[at] ^= 4
        with pytest.raises(WireError, match="crc32c of array"):
            read_frame(io.BytesIO(whole).readinto, len(whole))
        whole[at] ^= 4


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\x00" * 7,
        (2**63).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1),
        with_header(b"{"),
        with_header(b"[]"),
        with_header(b"[" * 100_000),
        with_header(b"\xff\xfe"),
        with_header({"__metadata__": {"a": 1}}),
        with_header({"__metadata__": []}),
        with_header({"x": []}),
        with_header({"x": entry(dtype="F8_E4M3")}, b"1234"),
        with_header({"x": entry(dtype=["U8"])}, b"1234"),
        with_header({"x": entry(shape=(-4,))}, b"1234"),
        with_header({"x": entry(shape=(True, 4))}, b"1234"),
        with_header({"x": entry(shape=(4.0,))}, b"1234"),
        with_header({"x": entry(shape=(1,) * 9)}, b"1"),
        with_header({"x": entry(shape=(2**62, 2**62))}, b"1234"),
        with_header({"x": entry(shape=(2**63,), offsets=(0, 2**63))}, b"1234"),
        with_header({"x": entry(shape=(2**40,), offsets=(0, 2**40))}, b"1234"),
        with_header({"x": entry(shape=(0, 2**62), offsets=(0, 0))}),
        with_header({"x": entry(shape=(0, 2**31, 2**31, 2**31), offsets=(0, 0))}),
        with_header({"x": entry(offsets=(1, 5))}, b"12345"),
        with_header({"x": entry(offsets=(0, 3))}, b"123"),
        with_header({"x": entry(offsets=(0, 4, 4))}, b"1234"),
        with_header({"x": entry(), "y": entry()}, b"1234"),
        with_header({"x": entry(), "y": entry(offsets=(2, 6))}, b"123456"),
        with_header({"x": entry()}, b"12345"),
        with_header({"x": entry(more=1)}, b"1234"),
        with_header({str(i): entry(shape=(0,), offsets=(0, 0)) for i in range(2000)}),
    ],
)
def test_read_refuses_hostile_bodies(hostile):
    with pytest.raises(WireError):
        read_frame(io.BytesIO(hostile).readinto, len(hostile))
    with pytest.raises(WireError):
        decode(hostile)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_read_gives_a_frame_or_a_wire_error_when_bytes_are_changed(data):
    whole = bytearray(body())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_frame(io.BytesIO(whole).readinto, len(whole))
    except WireError:
        return
    decode(whole)


def test_frame_of_a_service_is_refused_when_an_array_has_no_checksum():
    body = save(ARRAYS, metadata=STRINGS)
    with pytest.raises(WireError, match=r"comes without its crc32c"):
        read_frame(io.BytesIO(body).readinto, len(body))
