import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.errors import InputError
from feature_store.format.addressing import RowId, decode_keys, encode_keys, key_hash


def test_row_is_unit_times_capacity_plus_position():
    assert RowId(unit=3, position=4, view=1).row(capacity=10) == 34


def test_key_hash_is_pinned_because_stores_hold_it():
    assert key_hash("n01440764_10026") == 13284954660173055674


@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=8), max_size=5))
def test_keys_survive_encoding(keys):
    assert decode_keys(encode_keys(keys, 32)) == keys


@pytest.mark.parametrize("key", ["x" * 17, "a\0b"])
def test_encode_keys_refuses_when_key_does_not_fit(key):
    with pytest.raises(InputError, match="does not fit the store"):
        encode_keys([key], 16)
