"""The trainer's decoding must be the store's decoding."""

import pickle

import numpy as np
import pytest
import torch

from feature_store.format.codecs.bound import BoundCodec
from feature_store.format.codecs.registry import CODECS, get_codec
from feature_store.teacher.torch_codecs import TorchDecoder


def features(channels: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    spread, offset = np.exp(rng.standard_normal(channels)), 5 * rng.standard_normal(channels)
    return (rng.standard_normal((9, 4, channels)) * spread + offset).astype(np.float32)


def bound(name: str, values: np.ndarray) -> BoundCodec:
    return BoundCodec.learn("stage4", get_codec(name), values[:5])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("channels", [64, 70, 33, 1])
def test_decoded_values_equal_the_codecs_own(name, channels):
    values = features(channels)
    codec = bound(name, values)
    parts = codec.encode(values)
    got = TorchDecoder(codec)(parts)
    assert got.dtype == torch.float32
    expected = codec.decode(parts)
    # the same operations in the same order; a fused multiply-add may differ in the last bit
    assert np.allclose(got.numpy(), expected, rtol=2**-22, atol=2**-22 * np.abs(expected).max())
    assert np.abs(got.numpy() - values).max() <= codec.max_error(values).max()


@pytest.mark.parametrize(("name", "classes"), [("top3", 10), ("top3", 40000), ("top3", 70000), ("f16", 10)])
def test_decoded_logits_equal_the_codecs_own(name, classes):
    values = np.random.default_rng(0).standard_normal((4, classes)).astype(np.float32)
    values[:, -1] = 20
    codec = BoundCodec("logits", get_codec(name), (classes,))
    parts = codec.encode(values)
    assert np.array_equal(TorchDecoder(codec)(parts).numpy(), codec.decode(parts))


def test_decoder_takes_tensors_and_arrays_alike():
    values = features(40)
    codec = bound("int4", values)
    parts = codec.encode(values)
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    assert torch.equal(TorchDecoder(codec)(tensors), TorchDecoder(codec)(parts, "cpu"))


def test_decoder_does_not_change_what_it_is_given():
    values = features(40)
    for name in CODECS:
        codec = bound(name, values)
        parts = codec.encode(values)
        before = {key: part.copy() for key, part in parts.items()}
        TorchDecoder(codec)(parts)
        assert all(np.array_equal(before[key], part) for key, part in parts.items()), name


def test_decoder_survives_pickling():
    values = features(40)
    codec = bound("int6", values)
    first = TorchDecoder(codec)
    parts = codec.encode(values)
    assert torch.equal(pickle.loads(pickle.dumps(first))(parts), first(parts))  # noqa: S301 - our own object
