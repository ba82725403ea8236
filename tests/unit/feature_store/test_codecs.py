"""What a codec states it keeps, it keeps: alone, through a store, and for a client that is not this project's."""

import re
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_store import BLOCKS, tiny_manifest, tiny_store, unit_data

from feature_store import Store, open_store
from feature_store.errors import InputError
from feature_store.format.codecs.base import blocks
from feature_store.format.codecs.bound import (
    MOST_ROW_BYTES,
    BoundCodec,
    bind_codecs,
    calibrated,
    needs_calibration,
    require_decodable,
)
from feature_store.format.codecs.group_quantise import pack, unpack
from feature_store.format.codecs.quantise import float16_at_least
from feature_store.format.codecs.registry import CODECS, DEFAULT_TAP_CODEC, get_codec
from feature_store.format.manifest import Manifest, TapInfo

CALIBRATED = ("int8", "int6", "int4")
ALL = [*CODECS, *(f"{name}+zstd" for name in CODECS)]


def bound(name: str, values: np.ndarray, sample: np.ndarray | None = None) -> BoundCodec:
    return BoundCodec.learn("stage4", get_codec(name), values if sample is None else sample)


def heavy_features(rows: int = 12, tokens: int = 5, channels: int = 70) -> np.ndarray:
    """Features with the heavy channels of a LayerNorm'ed transformer, float32."""
    rng = np.random.default_rng(7)
    spread, offset = np.exp(rng.standard_normal(channels)), 3 * rng.standard_normal(channels)
    spread[3], offset[5] = 60, -200
    return (rng.standard_normal((rows, tokens, channels)) * spread + offset).astype(np.float32)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70))
moderate = st.floats(-100, 100, width=32)
held_by_f16 = st.floats(-60000, 60000, width=32)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoded_values_are_within_the_stated_error(name, data):
    shape = data.draw(shapes)
    sample = data.draw(arrays(np.float32, shape, elements=moderate))
    values = data.draw(arrays(np.float32, shape, elements=st.one_of(moderate, held_by_f16)))
    codec = bound(name, values, sample)
    try:
        decoded = codec.decode(codec.encode(values))
    except InputError:  # only where a token is further from the sample than a float16 scale reaches
        mean, std = codec.statistics["mean"], codec.statistics["std"]
        assert np.abs((values - mean.astype(np.float64)) / std).max() / 127 > 65000 / 256
        return
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    assert (np.abs(decoded.astype(np.float64) - values) <= codec.max_error(values)).all()


@pytest.mark.parametrize("name", CODECS)
def test_codec_holds_values_when_their_spread_is_subnormal(name):
    values = np.array([[[np.finfo(np.float32).tiny, 0], [0, 0]]], np.float32)
    codec = bound(name, values, values)
    decoded = codec.decode(codec.encode(values))
    assert (np.abs(decoded.astype(np.float64) - values) <= codec.max_error(values)).all()


@pytest.mark.parametrize("scale", [1, 1e-6, 100])
@pytest.mark.parametrize(
    ("name", "median"), [("f32", 0), ("f16", 0.3), ("bf16", 0.3), ("int8-channel", 0.28), ("int8", 0.45),
                         ("int6", 0.22), ("int4", 0.22)],
)  # fmt: skip
def test_stated_error_is_reached_within_a_tenth_by_features_of_any_size(name, median, scale):
    sample, values = np.float32(scale) * heavy_features(200).reshape(2, 100, 5, 70)
    codec = bound(name, values, sample)
    error, stated = np.abs(codec.decode(codec.encode(values)).astype(np.float64) - values), codec.max_error(values)
    assert (error <= stated).all()
    if name == "f32":
        assert error.max() == stated.max() == 0
    else:
        assert (error / stated).max() > 0.9
        assert np.median(error / stated) > median


@pytest.mark.parametrize(
    ("name", "most"), [("f32", 0), ("f16", 8e-4), ("bf16", 6e-3), ("int8-channel", 6e-6), ("int8", 3e-6),
                       ("int6", 3e-6), ("int4", 3e-6)],
)  # fmt: skip
def test_stated_error_of_a_constant_is_that_of_its_roundings(name, most):
    values = np.full((3, 2, 5), 1.5, np.float32)
    assert bound(name, values).max_error(values).max() <= most


@pytest.mark.parametrize(
    ("name", "worst"),
    [("f32", 0), ("f16", 1.9e-4), ("bf16", 1.42e-3), ("int8-channel", 3.7e-5), ("int8", 9.5e-5), ("int6", 3.2e-4),
     ("int4", 1.3e-3)],
)  # fmt: skip
def test_relative_error_of_features_with_heavy_channels(name, worst):
    values = heavy_features(200)[100:]
    codec = bound(name, values, heavy_features(200)[:100])
    spread = values.std(axis=(0, 1))
    error = (codec.decode(codec.encode(values)) - values) / spread
    assert np.sqrt(np.mean(error**2)) <= worst * np.sqrt(1 + np.mean((values.mean(axis=(0, 1)) / spread) ** 2))
    assert (np.sqrt(np.mean(error**2)) > 0) == (worst > 0)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encode_refuses_when_a_value_is_not_finite(name, bad):
    values = heavy_features()
    codec = bound(name, values)
    values[2, 1, 4] = bad
    with pytest.raises(InputError, match=f"codec {name} cannot hold.*choose codec f32"):
        codec.encode(values)


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrate_refuses_when_the_sample_is_not_finite(name):
    values = heavy_features()
    values[0, 0, 0] = np.nan
    with pytest.raises(InputError, match=f"codec {name} cannot hold"):
        get_codec(name).calibrate(values)


@pytest.mark.parametrize("name", ["f16", "int8-channel"])
def test_encode_refuses_when_a_value_is_beyond_float16(name):
    values = np.array([[[1.0], [70000.0]]], np.float32)
    with pytest.raises(InputError, match=f"codec {name} cannot hold .*70000"):
        bound(name, values).encode(-values if name == "int8-channel" else values)


def test_bf16_refuses_when_rounding_reaches_infinity():
    with pytest.raises(InputError, match="codec bf16 cannot hold"):
        get_codec("bf16").encode(np.array([[[np.finfo(np.float32).max]]], np.float32))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_bf16_refuses_every_pattern_of_nan(bits):
    with pytest.raises(InputError, match="codec bf16 cannot hold"):
        get_codec("bf16").encode(np.array([[[bits]]], np.uint32).view(np.float32))


def test_bf16_rounds_to_nearest_even_as_torch_does():
    torch = pytest.importorskip("torch")
    values = heavy_features()
    stored = get_codec("bf16").encode(values)[""]
    assert np.array_equal(stored, torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("name", CALIBRATED)
def test_encode_names_the_remedy_when_statistics_are_missing(name):
    values = heavy_features()
    with pytest.raises(InputError, match=r"needs per-channel statistics .*calibrated"):
        get_codec(name).encode(values)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_dead_channel_of_the_sample_costs_the_others_nothing(name):
    values = heavy_features()
    dead = values.copy()
    dead[:, :, 9] = 0
    alive = np.arange(values.shape[-1]) != 9
    codec, same = bound(name, values, dead), bound(name, values)
    errors = [np.abs(c.decode(c.encode(values)) - values)[..., alive].mean() for c in (codec, same)]
    assert errors[0] < 25 * errors[1]
    assert np.isfinite(codec.decode(codec.encode(values))).all()


def test_constant_features_are_kept():
    values = np.full((3, 2, 5), 1.5, np.float32)
    for name in CODECS:
        codec = bound(name, values)
        assert np.allclose(codec.decode(codec.encode(values)), 1.5, atol=1e-6), name


@given(st.integers(1, 40), st.sampled_from([2, 4]), st.randoms(use_true_random=False))
def test_unpack_gives_back_what_was_packed(channels, width, random):
    codes = np.array([[random.randrange(1 << width) for _ in range(channels)]], np.uint8)
    packed = pack(codes, width)
    assert packed.shape == (1, -(-channels * width // 8))
    assert np.array_equal(unpack(packed, width, channels), codes)


def test_int4_uses_the_lowest_code_for_the_largest_value_of_a_group():
    values = heavy_features(1, 1, 32)
    codec = bound("int4", values, heavy_features(250, 1, 32))
    codes = unpack(codec.encode(values)[""], 4, 32)
    assert codes.min() == 0


STATISTICS = {"mean": np.array([1, 0], np.float32), "std": np.array([2, 1], np.float32)}


@pytest.mark.parametrize(
    ("name", "values", "parts", "decoded"),
    [
        ("f16", [[1 + 2**-11, 1 + 3 * 2**-11]], {"": [[1, 1 + 2**-9]]}, None),
        ("bf16", [[1 + 2**-8, -2.0], [1 + 3 * 2**-8, 1 + 5 * 2**-8]],
         {"": [[0x3F80, 0xC000], [0x3F82, 0x3F82]]}, [[1, -2], [1 + 2**-6] * 2]),
        # z = 63.5 and -10.2 have the step 0.5
        ("int8", [[128, -10.2], [1, 0]], {"": [[127, -20], [0, 0]], "scale": [0.5, 0]}, [[128, -10], [1, 0]]),
        # from -1 to 254 in steps of 1, and nothing but 3
        ("int8-channel", [[-1, 3], [254, 3], [1.4, 3]],
         {"": [[0, 0], [255, 0], [2, 0]], "scale": [1, 0], "offset": [-1, 3]}, [[-1, 3], [254, 3], [1, 3]]),
        # z = -31.75 and 7.9 have the step 127 / 128, and z = 31.75 the step -127 / 128
        ("int6", [[-62.5, 7.9], [64.5, -7.9]], {"": [[0x80, 8], [0x80, 8]], "group": [[127], [-127]]}, None),
    ],
)  # fmt: skip
def test_encode_gives_the_codes_of_the_format(name, values, parts, decoded):
    codec = get_codec(name)
    got = codec.encode(np.array([values], np.float32), STATISTICS)
    assert {suffix: got[suffix][0].tolist() for suffix in parts} == parts
    if decoded is not None:
        assert codec.decode(got, got[""].shape[1:], STATISTICS)[0].tolist() == decoded


@pytest.mark.parametrize("name", ["int6", "int4"])
def test_of_the_largest_of_both_signs_the_positive_has_the_lowest_code(name):
    statistics = {"mean": np.zeros(2, np.float32), "std": np.ones(2, np.float32)}
    codec, values = get_codec(name), np.array([[[-7, 7], [7, -7]]], np.float32)
    encoded = codec.encode(values, statistics)
    assert (encoded["group"] < 0).all()
    decoded = codec.decode(encoded, (2, 2), statistics)
    assert np.abs(decoded - values)[values > 0].max() < 0.01 < np.abs(decoded - values)[values < 0].min()


def test_float32_rows_are_decoded_without_a_copy():
    values = heavy_features()
    codec = bound("f32", values)
    assert np.shares_memory(codec.decode({"": values}), values)


@pytest.mark.parametrize("name", ["int6", "int4"])
def test_codes_are_within_half_a_step_but_where_the_other_sign_is_cut(name):
    levels = {"int6": 32, "int4": 8}[name]
    values = np.array([[np.linspace(-8, 8, 33)[:32], np.linspace(8, -8, 33)[:32]]], np.float32)
    statistics = {"mean": np.zeros(32, np.float32), "std": np.ones(32, np.float32)}
    codec = get_codec(name)
    error = np.abs(codec.decode(codec.encode(values, statistics), (2, 32), statistics) - values)[0]
    assert (error[:, values[0, 0] < 8 - 8 / levels] <= 4.01 / levels).all()
    assert error[:, 0].max() < 0.01  # the largest of each token has a code of its own


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_encoded_alike_alone_and_among_many(name):
    """More rows than are worked on at a time."""
    values = heavy_features(30, 64, 100)
    assert len(list(blocks(values))) > 1
    codec = bound(name, values)
    together, alone = codec.encode(values), [codec.encode(values[row : row + 1]) for row in range(len(values))]
    for suffix, part in together.items():
        assert np.array_equal(part, np.concatenate([parts[suffix] for parts in alone])), suffix
    decoded = codec.decode(together)
    assert np.array_equal(decoded, np.concatenate([codec.decode(parts) for parts in alone]))


@pytest.mark.parametrize("shape", [(0, 4, 6), (1, 1, 1), (100, 64, 100), (3, 4096, 1024), (1_000_000, 2)])
def test_blocks_are_all_rows_once_in_spans_of_half_a_megabyte(shape):
    spans = list(blocks(np.broadcast_to(np.float32(0), shape)))
    assert [row for span in spans for row in range(span.start, min(span.stop, shape[0]))] == list(range(shape[0]))
    row_bytes = 4 * int(np.prod(shape[1:]))
    for span in spans:
        assert span.stop - span.start == max(1, (1 << 19) // row_bytes)


@given(st.floats(0, 65504, width=32))
def test_float16_at_least_is_the_next_float16(value):
    (rounded,) = float16_at_least(np.array([value], np.float32))
    assert np.float32(rounded) >= value
    assert rounded == 0 or np.float32(np.nextafter(rounded, np.float16(-np.inf))) < value


def test_float16_at_least_is_infinite_when_there_is_none():
    assert np.isinf(float16_at_least(np.array([65505, 1e38], np.float32))).all()


BF16 = "bfloat16 bit patterns: the upper 16 bits of a float32"
INT8 = "value = mean[channel] + std[channel] * (scale[token] * code); see the manifest"
INT8_CHANNEL = "value = offset[channel] + scale[channel] * code"
GROUPS = (
    "value = mean[channel] + std[channel] * (code * scale[token] * group[token, channel % groups]), "
    "code = stored {} bits - {}; see FORMAT.md for their order"
)
TOP = "class indices, most likely first; beside them in .values their log-probabilities, then that of each other class"
CHANNELS, BYTES, TOKEN = ("token", "channel"), ("token", "byte"), ("token",)
NAN = "nan"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("f32", (4, 70), [("", "<f4", (4, 70), CHANNELS, NAN, None)]),
        ("f16", (10,), [("", "<f2", (10,), ("class",), NAN, None)]),
        ("bf16", (4, 70), [("", "<u2", (4, 70), CHANNELS, "32704", BF16)]),
        ("int8-channel", (4, 70), [("", "|u1", (4, 70), CHANNELS, "0", INT8_CHANNEL),
                                   ("scale", "<f2", (70,), ("channel",), NAN, None),
                                   ("offset", "<f2", (70,), ("channel",), NAN, None)]),
        ("int8", (4, 70), [("", "|i1", (4, 70), CHANNELS, "0", INT8), ("scale", "<f2", (4,), TOKEN, NAN, None)]),
        ("int6", (4, 70), [("", "|u1", (4, 53), BYTES, "0", GROUPS.format(6, 32)),
                           ("group", "|i1", (4, 3), ("token", "group"), "0", None),
                           ("scale", "<f2", (4,), TOKEN, NAN, None)]),
        ("int4", (4, 64), [("", "|u1", (4, 32), BYTES, "0", GROUPS.format(4, 8)),
                           ("group", "|i1", (4, 2), ("token", "group"), "0", None),
                           ("scale", "<f2", (4,), TOKEN, NAN, None)]),
        ("top3", (10,), [("", "<u2", (3,), ("rank",), "0", TOP), ("values", "<f4", (4,), ("rank",), NAN, None)]),
    ],
)  # fmt: skip
def test_parts_are_those_of_every_store_of_the_format(name, shape, expected):
    """The metadata of written stores; verify compares them byte by byte."""
    for zstd in ("", "+zstd"):
        parts = get_codec(name + zstd).parts(shape)
        got = [
            (p.suffix, p.dtype.str, p.row_shape, p.dimensions, str(p.fill), dict(p.attributes).get("encoding"))
            for p in parts
        ]
        assert got == expected
        assert [p.zstd for p in parts] == [bool(zstd)] + [False] * (len(parts) - 1)  # only the largest is compressed


@pytest.mark.parametrize("name", ALL)
def test_name_survives_get_codec(name):
    assert get_codec(name).name == name
    assert get_codec(name).parts((4, 6))[0].zstd == name.endswith("+zstd")


@pytest.mark.parametrize(
    "name", ["int3", "top0", "top", "f16+zstd+zstd", "zstd", "+zstd", "top-1", "top1000000", "top05"]
)
def test_get_codec_names_the_known_ones_when_unknown(name):
    with pytest.raises(InputError, match=r"unknown codec .*f32, f16, bf16, int8-channel, int8, int6, int4, or top<k>"):
        get_codec(name)


def test_a_million_classes_may_be_kept():
    assert get_codec("top999999+zstd").name == "top999999+zstd"


def test_default_codec_exists():
    assert DEFAULT_TAP_CODEC in CODECS


@pytest.mark.parametrize("name", ["int8", "int8-channel", "int4"])
def test_parts_refuses_when_rows_are_logits(name):
    with pytest.raises(InputError, match=f"{name} is a codec of taps"):
        get_codec(name).parts((10,))


# ---- calibration


def manifest_with(codec: str, logits_codec: str = "f16") -> Manifest:
    return replace(tiny_manifest(), taps={"stage4": TapInfo(4, 6, codec)}, logits_codec=logits_codec)


def tap_values(unit: int) -> np.ndarray:
    """The values [V, n, N, C] that unit_data encodes, float32."""
    return unit_data(manifest_with("f32"), unit).features["stage4"][""]


def tap_sample() -> np.ndarray:
    return tap_values(0).reshape(-1, 4, 6)


def test_calibrated_gives_the_same_manifest_when_the_sample_is_the_same():
    manifest = manifest_with("int8")
    first, again = (calibrated(manifest, {"stage4": tap_sample()}) for _ in range(2))
    assert first.fingerprint() == again.fingerprint() != manifest.fingerprint()
    assert Manifest.from_dict(first.to_dict()) == first


def test_calibrated_keeps_the_spread_and_place_of_each_channel():
    sample = heavy_features(400)
    manifest = replace(manifest_with("int8"), taps={"stage4": TapInfo(5, 70, "int8")})
    learnt = calibrated(manifest, {"stage4": sample}).taps["stage4"].statistics
    assert np.allclose(learnt["mean"], sample.mean(axis=(0, 1)), rtol=1e-4, atol=1e-4)
    assert np.allclose(
        learnt["std"], np.maximum(sample.std(axis=(0, 1)), 0.01 * np.std(sample, axis=(0, 1)).mean()), rtol=1e-4
    )


def test_calibrated_gives_a_dead_channel_a_hundredth_of_the_others_spread():
    sample = np.array([[[-1, 5], [1, 5]]], np.float32)
    assert get_codec("int8").calibrate(sample) == {
        "mean": [0, 5],
        "std": [1, 0.00707107],
    }  # a hundredth of the root mean


@pytest.mark.parametrize("value", [0, 7.25, 1e-44])
def test_calibrated_gives_a_constant_the_spread_one(value):
    sample = np.full((2, 3, 2), value, np.float32)
    sample[0] += np.float32(1e-45) if value < 1e-40 else 0  # a spread whose inverse float32 does not hold
    assert get_codec("int4").calibrate(sample)["std"] == [1, 1]


def test_calibrated_keeps_six_digits():
    learnt = get_codec("int6").calibrate(np.array([[[100 / 3]], [[1e6 / 7]]], np.float32))
    assert learnt == {"mean": [71445.2], "std": [71411.9]}


def test_needs_calibration_names_the_taps_without_statistics():
    taps = {name: TapInfo(4, 6, codec) for name, codec in (("a", "f16"), ("b", "int8"), ("c", "int4+zstd"))}
    manifest = replace(tiny_manifest(), taps=taps)
    assert needs_calibration(manifest) == ("b", "c")
    learnt = calibrated(manifest, {name: tap_sample() for name in "bc"})
    assert needs_calibration(learnt) == ()
    assert learnt.taps["a"] == taps["a"]


def test_require_decodable_accepts_rows_of_a_gigabyte_and_no_larger():
    largest = replace(tiny_manifest(), taps={"stage4": TapInfo(1 << 14, 1 << 15, "f16")})
    assert MOST_ROW_BYTES == 1 << 30
    require_decodable(largest)
    larger = replace(tiny_manifest(), taps={"stage4": TapInfo((1 << 14) + 1, 1 << 15, "f16+zstd")})
    with pytest.raises(
        InputError, match="a row of taps/stage4 has 1,073,807,360 bytes, expected at most 1,073,741,824; it was not"
    ):
        require_decodable(larger)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mean": [0] * 6, "std": [1] * 5 + [0]}, "std .* has 0.0 at channel 5, expected 6 finite positive float32"),
        ({"mean": [0, np.inf, *[0] * 4], "std": [1] * 6}, "mean .* has inf at channel 1, expected 6 finite float32"),
        ({"mean": [0] * 5, "std": [1] * 6}, "mean in the statistics of taps/stage4 has 5 numbers, expected 6 finite"),
        ({"mean": [0] * 6}, "std .* has 0 numbers"),
        (None, "mean .* has 0 numbers"),
    ],
)
def test_require_decodable_names_what_is_wrong_with_statistics(statistics, message):
    manifest = replace(tiny_manifest(), taps={"stage4": TapInfo(4, 6, "int8", statistics)})
    with pytest.raises(InputError, match=message):
        require_decodable(manifest)


def test_require_decodable_accepts_negative_means_and_any_positive_spread():
    require_decodable(
        replace(tiny_manifest(), taps={"stage4": TapInfo(4, 6, "int8", {"mean": [-1] * 6, "std": [0.5] * 6})})
    )


def test_calibrated_changes_nothing_when_no_codec_needs_it():
    manifest = manifest_with("f16")
    assert calibrated(manifest, {}) == manifest


@pytest.mark.parametrize("sample", [None, np.zeros((3, 4, 7)), np.zeros((0, 4, 6)), np.zeros((4, 6))])
def test_calibrated_refuses_when_the_sample_does_not_fit(sample):
    with pytest.raises(InputError, match=r"codec int8 of tap stage4 learns from .* \[n, 4, 6\], got"):
        calibrated(manifest_with("int8"), {} if sample is None else {"stage4": sample})


def test_a_resumed_job_takes_the_statistics_of_the_store():
    begun = calibrated(manifest_with("int8"), {"stage4": tap_sample()})
    begun.require_equal(manifest_with("int8").with_statistics_of(begun), "-")


# ---- bound to a store's values


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0), (1, 2, 2)])
def test_bound_codec_encodes_rows_of_any_leading_shape_as_rows_in_a_line(name, leading):
    values = heavy_features(max(1, int(np.prod(leading))))
    codec = bound(name, values)
    rows = values[: int(np.prod(leading))]
    encoded, flat = codec.encode(rows.reshape(*leading, 5, 70)), codec.encode(rows)
    assert {suffix: part.shape for suffix, part in encoded.items()} == {
        suffix: (*leading, *spec.row_shape) for suffix, spec in codec.arrays.items()
    }
    assert {suffix: part.dtype for suffix, part in encoded.items()} == {s: a.dtype for s, a in codec.arrays.items()}
    for suffix, part in flat.items():
        assert np.array_equal(encoded[suffix].reshape(part.shape), part), suffix


@pytest.mark.parametrize("name", ["f16", "int8-channel", "int4+zstd"])
def test_bound_codec_refuses_a_nan_in_any_view(name):
    values = heavy_features().reshape(2, 6, 5, 70)
    codec = bound(name, values[0])
    values[1, 3, 2, 1] = np.nan
    with pytest.raises(InputError, match=f"codec {re.escape(name)} cannot hold"):
        codec.encode(values)


def test_bind_codecs_names_taps_and_logits_and_their_arrays():
    codecs = bind_codecs(manifest_with("int4", "top2+zstd"))
    assert {name: codec.name for name, codec in codecs.items()} == {"stage4": "stage4", "logits": "logits"}
    assert [spec.path for spec in codecs["stage4"].arrays.values()] == [
        "taps/stage4", "taps/stage4.group", "taps/stage4.scale",
    ]  # fmt: skip
    assert {suffix: spec.path for suffix, spec in codecs["logits"].arrays.items()} == {
        "": "logits", "values": "logits.values",
    }  # fmt: skip
    assert all(
        codec.array_path(suffix) == spec.path for codec in codecs.values() for suffix, spec in codec.arrays.items()
    )
    assert list(bind_codecs(replace(manifest_with("f16"), logits_codec=None))) == ["stage4"]


def test_bind_codecs_refuses_a_tap_named_like_the_logits(tmp_path):
    manifest = replace(tiny_manifest(), taps={"logits": TapInfo(4, 6, "f16")})
    for logits_codec in ("f16", None):
        with pytest.raises(InputError, match="a tap named 'logits', which means the logits; rename the tap"):
            bind_codecs(replace(manifest, logits_codec=logits_codec))
    with pytest.raises(InputError, match="rename the tap"):
        Store.create(tmp_path / "s", manifest, BLOCKS)
    assert not (tmp_path / "s").exists()


# ---- through a store


@pytest.mark.parametrize("name", ALL)
def test_store_gives_decoded_values_and_plain_zarr_the_parts(name, tmp_path):
    manifest = manifest_with(name)
    manifest = calibrated(manifest, {"stage4": tap_sample()})
    tiny_store(tmp_path / "s", manifest, quarantined={1: "unreadable"})
    store, codec = open_store(tmp_path / "s"), bind_codecs(manifest)["stage4"]
    group = zarr.open_group(tmp_path / "s", mode="r")
    for unit in range(3):
        good = [i for i in range(manifest.tars[unit].samples) if i != 1]
        values = tap_values(unit)[1][good]
        parts = codec.encode(values)
        batches = list(store.source().iter_unit(unit, 1))
        read = np.concatenate([batch.taps["stage4"] for batch in batches])
        assert np.array_equal(read, codec.decode(parts).astype(read.dtype))
        assert (np.abs(read.astype(np.float64) - values) <= codec.max_error(values)).all()
        rows = unit * manifest.capacity + np.array(good)
        for suffix, spec in codec.arrays.items():
            assert np.array_equal(group[spec.path][1][rows], parts[suffix]), spec.path


@pytest.mark.parametrize("name", ALL)
def test_objects_equal_zarr_pythons_own_when_it_writes_the_same_parts(name, tmp_path):
    manifest = manifest_with(name)
    manifest = replace(calibrated(manifest, {"stage4": tap_sample()}), num_views=1)
    ours, theirs = tiny_store(tmp_path / "ours", manifest), tiny_store(tmp_path / "theirs", manifest, units=())
    source, target = zarr.open_group(ours.path, mode="r"), zarr.open_group(theirs.path, mode="r+")
    full = [unit for unit, tar in enumerate(manifest.tars) if tar.samples == manifest.capacity]
    assert full
    for path in (spec.path for spec in bind_codecs(manifest)["stage4"].arrays.values()):
        with zarr.config.set({"array.write_empty_chunks": True}):
            target[path][...] = source[path][...]
        for unit in full:
            (object_path,) = [p for p in ours.path.glob(f"{path}/c/0/{unit}/**/*") if p.is_file()]
            relative = object_path.relative_to(ours.path)
            assert (theirs.path / relative).read_bytes() == object_path.read_bytes(), relative


def test_a_foreign_client_is_told_how_to_read_bf16(tmp_path):
    manifest = manifest_with("bf16")
    tiny_store(tmp_path / "s", manifest)
    array = zarr.open_group(tmp_path / "s", mode="r")["taps/stage4"]
    assert array.attrs["encoding"].startswith("bfloat16 bit patterns")
    values = (array[0, :5].astype("u4") << 16).view("f4")
    assert np.allclose(values, tap_values(0)[0], rtol=2**-8)
    unwritten = (array[0, 8:10].astype("u4") << 16).view("f4")
    assert np.isnan(unwritten).all()


def test_source_gives_the_parts_when_asked_not_to_decode(tmp_path):
    manifest = calibrated(manifest_with("int4"), {"stage4": tap_sample()})
    store = tiny_store(tmp_path / "s", manifest)
    rows = store.rows(["key/0-1", "key/2-3"], 1)
    source, codec = store.source(), store.layout.codecs["stage4"]
    encoded = source.read(rows, decode=False).encoded["stage4"]
    assert set(encoded) == {"", "group", "scale"}
    assert np.array_equal(codec.decode(encoded), source.read(rows).taps["stage4"])


def test_store_create_refuses_when_statistics_are_missing(tmp_path):
    with pytest.raises(InputError, match=r"codec int8 of tap stage4 needs statistics of a first sample.*calibrated"):
        tiny_store(tmp_path / "s", manifest_with("int8"), units=())
    assert not (tmp_path / "s" / "zarr.json").exists()
