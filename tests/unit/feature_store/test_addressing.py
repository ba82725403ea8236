"""Row addresses and sample keys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.errors import InputError
from feature_store.format.addressing import RowId, decode_keys, encode_keys, key_hash, row_array, row_ids


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


row = st.builds(RowId, *[st.integers(-(2**63), 2**63 - 1)] * 3)


@given(st.lists(row, max_size=6))
def test_row_ids_inverts_row_array(rows):
    array = row_array(rows)
    assert (array.dtype, array.shape) == (np.int64, (len(rows), 3))
    assert row_ids(array) == rows
    assert all(isinstance(row, RowId) and type(row.unit) is int for row in row_ids(array))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, ">i4", np.uint64])
def test_row_array_gives_the_same_for_row_ids_tuples_and_integers_of_any_width(dtype):
    ids = [RowId(2, 0, 1), RowId(0, 5, 0), RowId(2, 0, 1)]
    given_rows = np.array(ids, dtype)
    for rows in (ids, tuple(ids), [tuple(row) for row in ids], given_rows, given_rows[:, ::-1][:, ::-1]):
        array = row_array(rows)
        assert array.dtype == np.int64
        assert array.tolist() == [[2, 0, 1], [0, 5, 0], [2, 0, 1]]


def test_row_array_does_not_copy_rows_that_are_int64_already():
    rows = np.zeros((4, 3), np.int64)
    assert np.shares_memory(row_array(rows), rows)


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (np.zeros((2, 3), np.float64), r"float64 \[2, 3\]"),
        (np.zeros((2, 3), bool), r"bool \[2, 3\]"),
        (np.zeros((2, 4), np.int64), r"int64 \[2, 4\]"),
        (np.zeros((3, 2), np.int64), r"int64 \[3, 2\]"),
        (np.zeros(3, np.int64), r"int64 \[3\]"),
        (np.zeros((1, 2, 3), np.int64), r"int64 \[1, 2, 3\]"),
        (np.zeros((), np.int64), r"int64 \[\]"),
        (np.array([]), r"float64 \[0\]"),
        (np.array([["0", "1", "2"]]), "<U1"),
    ],
)
def test_row_array_refuses_arrays_of_another_shape_or_dtype(rows, got):
    with pytest.raises(InputError, match=rf"rows are {got}.*, expected integers \[n, 3\]: unit, position, view"):
        row_array(rows)


def test_an_empty_sequence_of_rows_is_an_array_of_none():
    assert row_array([]).shape == (0, 3)
    assert row_ids(row_array([])) == []
