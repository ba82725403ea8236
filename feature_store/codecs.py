"""How tap values are stored: one small frozen class per codec, by name in the manifest."""

from dataclasses import dataclass

import numpy as np

from feature_store.errors import InputError


@dataclass(frozen=True)
class FloatCodec:
    """Plain IEEE floats.

    Attributes:
        name: Name in the manifest.
        dtype: numpy dtype of the stored array.
        relative_error: Largest rounding error of a normal value, relative to it (2**-11 for float16).
    """

    name: str
    dtype: np.dtype
    relative_error: float

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values as stored.

        Raises:
            InputError: A value is not finite, or too large for the dtype.
        """
        with np.errstate(over="ignore"):
            encoded = np.ascontiguousarray(values, dtype=self.dtype)
        if not np.isfinite(encoded).all():
            largest = float(np.abs(values).max())
            raise InputError(
                f"the teacher gave values that codec {self.name} cannot hold (largest magnitude {largest:g}); "
                "use --tap-codec f32, or check the teacher for NaN"
            )
        return encoded


CODECS = {
    codec.name: codec
    for codec in (
        FloatCodec("f16", np.dtype("<f2"), 2.0**-11),
        FloatCodec("f32", np.dtype("<f4"), 0.0),
    )
}


def get_codec(name: str) -> FloatCodec:
    """Codec by name.

    Raises:
        InputError: Unknown name.
    """
    if name not in CODECS:
        raise InputError(f"unknown codec {name!r}; expected one of {', '.join(CODECS)}")
    return CODECS[name]
