import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.codecs import CODECS, get_codec
from feature_store.errors import InputError


@pytest.mark.parametrize("name", CODECS)
@given(values=st.lists(st.floats(2**-14, 65504, width=32), min_size=1, max_size=20))
def test_codec_keeps_its_stated_relative_error(name, values):
    codec, exact = get_codec(name), np.array(values, np.float32)
    stored = codec.encode(exact).astype(np.float64)
    assert (np.abs(stored - exact) <= codec.relative_error * np.abs(exact)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 70000.0])
def test_f16_refuses_when_a_value_cannot_be_held(bad):
    with pytest.raises(InputError, match="codec f16 cannot hold"):
        get_codec("f16").encode(np.array([1.0, bad], np.float32))


def test_get_codec_names_the_known_ones_when_unknown():
    with pytest.raises(InputError, match="unknown codec 'int3'.*f16, f32"):
        get_codec("int3")
