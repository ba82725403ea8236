from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_store import tiny_manifest, tiny_store, unit_data

from feature_store import open_store
from feature_store.errors import InputError
from feature_store.format.codecs.registry import get_codec

logits = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(4, 30)), elements=st.floats(-80, 80, width=32))


def probabilities(values: np.ndarray) -> np.ndarray:
    exponents = np.exp(values.astype(np.float64) - values.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


@settings(max_examples=80, deadline=None)
@given(logits, st.integers(1, 3))
def test_top_probabilities_are_exact_and_the_rest_is_even(values, k):
    codec, shape = get_codec(f"top{k}"), values.shape[1:]
    decoded = codec.decode(codec.encode(values), shape)
    exact, got = probabilities(values), probabilities(decoded)
    kept = np.argsort(-values, axis=1, kind="stable")[:, :k]
    log_exact = np.take_along_axis(np.log(exact), kept, axis=1)
    log_got = np.take_along_axis(np.log(got), kept, axis=1)
    bound = np.take_along_axis(codec.max_error(values), kept, axis=1)
    assert (np.abs(log_got - log_exact) <= bound + 1e-6).all()
    assert np.isinf(codec.max_error(values)).sum() == len(values) * (shape[0] - k)
    others = np.ones(values.shape, bool)
    np.put_along_axis(others, kept, False, axis=1)
    for row in range(len(values)):
        rest = got[row, others[row]]
        assert np.allclose(rest, rest[0], rtol=1e-6, atol=0)
        assert np.isclose(rest.sum(), exact[row, others[row]].sum(), rtol=1e-4, atol=1e-30)


@settings(max_examples=80, deadline=None)
@given(logits, st.integers(1, 3))
def test_kept_log_probabilities_are_within_the_stated_error(values, k):
    codec = get_codec(f"top{k}")
    exact, bound = np.log(np.maximum(probabilities(values), 1e-300)), codec.max_error(values)
    decoded = codec.decode(codec.encode(values), values.shape[1:])
    kept = np.isfinite(bound)
    assert (np.abs(decoded - exact)[kept] <= bound[kept]).all()
    # float32 has 24 bits, and no log-probability is further from 0 than the logits' span and the classes' logarithm
    span = np.ptp(values, axis=1, keepdims=True).astype(float) + np.log(values.shape[1])
    assert (bound[kept] <= (2.0**-22 * span).repeat(values.shape[1], axis=1)[kept]).all()


def test_the_smallest_rest_is_not_lost_to_cancellation():
    values = np.array([[0.0, -60.0, -61.0, -62.0]], np.float32)
    codec = get_codec("top1")
    rest = codec.encode(values)["values"][0, 1]
    assert np.isclose(np.exp(np.float64(rest)), np.exp([-60.0, -61.0, -62.0]).mean(), rtol=1e-5)


def test_of_equal_logits_the_lower_class_is_kept():
    assert get_codec("top2").encode(np.zeros((1, 5), np.float32))[""].tolist() == [[0, 1]]


def test_an_impossible_class_is_no_error():
    codec = get_codec("top1")
    decoded = codec.decode(codec.encode(np.array([[0.0, -2000.0, -2000.0]], np.float32)), (3,))
    assert np.isfinite(decoded).all()
    assert probabilities(decoded)[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(("classes", "dtype"), [(1000, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_indices_are_as_narrow_as_the_classes_allow(classes, dtype):
    codec = get_codec("top5")
    assert codec.parts((classes,))[0].dtype == np.dtype(dtype)
    values = np.zeros((1, classes), np.float32)
    values[0, -1] = 9
    decoded = codec.decode(codec.encode(values), (classes,))
    assert decoded[0].argmax() == classes - 1


@pytest.mark.parametrize("shape", [(5,), (3,), (4, 6)])
def test_parts_refuses_when_there_is_no_rest(shape):
    with pytest.raises(InputError, match="codec top5 keeps 5 of a row's classes"):
        get_codec("top5").parts(shape)


def test_encode_refuses_when_a_logit_is_not_finite():
    with pytest.raises(InputError, match="codec top1 cannot hold"):
        get_codec("top1").encode(np.array([[0.0, np.nan]], np.float32))


@pytest.mark.parametrize("name", ["top1", "top2+zstd", "f16", "bf16", "f32+zstd"])
def test_store_gives_decoded_logits_and_plain_zarr_the_parts(name, tmp_path):
    manifest = replace(tiny_manifest(), logits_codec=name)
    tiny_store(tmp_path / "s", manifest)
    store, codec = open_store(tmp_path / "s"), get_codec(name)
    values = unit_data(tiny_manifest(codec="f32"), 1).features["logits"][""]
    parts = codec.encode(values[0])
    read = np.concatenate([batch.logits for batch in store.source().iter_unit(1, 0)])
    assert np.array_equal(read, codec.decode(parts, (3,)).astype(read.dtype))
    group = zarr.open_group(tmp_path / "s", mode="r")
    for suffix, part in parts.items():
        path = f"logits.{suffix}" if suffix else "logits"
        assert np.array_equal(group[path][0, manifest.capacity : manifest.capacity + 3], part)
