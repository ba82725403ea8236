import numpy as np
import pytest
from PIL import Image

from feature_store.errors import ImageError
from feature_store.views import (
    apply_view,
    decode_view,
    draw_view,
    encode_view,
    replay_view,
    view_policy,
    view_tar,
)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8))


def test_replayed_view_is_its_jpeg_decoded_when_the_store_has_an_encoding(image):
    policy = view_policy("a2", (24, 32))
    params = draw_view(policy, 5, "key", 1, image.size)
    plain = apply_view(image, params, policy.size)
    jpeg = encode_view(plain)
    assert np.array_equal(replay_view(image, params, policy.size), plain)
    assert np.array_equal(replay_view(image, params, policy.size, "jpeg95"), decode_view(jpeg))
    assert not np.array_equal(decode_view(jpeg), plain)


def test_jpeg_keeps_size_and_smooth_pixels_nearly(image):
    y, x = np.mgrid[:24, :32]
    pixels = np.stack([4 * x, 6 * y, 3 * (x + y)], axis=-1).astype(np.uint8)
    decoded = decode_view(encode_view(pixels))
    assert (decoded.shape, decoded.dtype) == (pixels.shape, np.uint8)
    assert np.abs(decoded.astype(int) - pixels).max() <= 6
    assert encode_view(pixels) == encode_view(pixels.copy())


def test_decode_view_says_why_when_the_jpeg_is_cut_short(image):
    with pytest.raises(ImageError, match="truncated or damaged"):
        decode_view(encode_view(np.array(image))[:200])


def test_view_tar_names_unit_and_view():
    assert view_tar(12, 3) == "v3/u00012.tar"
    assert view_tar(123456, 10) == "v10/u123456.tar"
