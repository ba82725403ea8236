"""Materialised views: JPEG files in tars."""

import io

import numpy as np
from PIL import Image

from feature_store.views.apply import apply_view
from feature_store.views.decode import decode_image
from feature_store.views.draws import ViewParams

JPEG = "jpeg95"
"""``view_encoding`` of a store whose views are materialised: JPEG of quality 95, chroma not subsampled (4:4:4)."""

ENCODINGS = (None, JPEG)
_QUALITY = 95
_FULL_CHROMA = 0  # Pillow's number for 4:4:4


def encode_view(pixels: np.ndarray) -> bytes:
    """A view [H, W, 3] as the JPEG that is materialised."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, subsampling=_FULL_CHROMA)
    return file.getvalue()


def decode_view(data: bytes) -> np.ndarray:
    """Pixels [H, W, 3] of a materialised view: what the teacher saw and the student sees.

    Raises:
        ImageError: It is damaged.
    """
    return np.array(decode_image(data))


def replay_view(
    image: Image.Image, params: ViewParams, size: int | tuple[int, int], encoding: str | None = None
) -> np.ndarray:
    """The pixels the teacher saw, made again from the source: with an encoding those of its JPEG, decoded.

    Args:
        image: The source in RGB, as decode_image gives it.
        params: Stored parameters of the view.
        size: Side or (H, W) of the view, in pixels.
        encoding: The manifest's ``view_encoding``.

    Raises:
        InputError: See apply_view.
    """
    pixels = apply_view(image, params, size)
    return pixels if encoding is None else decode_view(encode_view(pixels))


def view_tar(unit: int, view: int) -> str:
    """Path of one unit's tar of one view, below the folder or URL of materialised views."""
    return f"v{view}/u{unit:05}.tar"
