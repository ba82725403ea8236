import pickle

from feature_store.errors import MismatchError


def test_mismatch_error_survives_pickling():
    error = MismatchError("seed", expected=1, got=2, remedy="start a new store", where="the manifest")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object
    assert (str(copy), copy.field, copy.expected, copy.got) == (str(error), "seed", 1, 2)
    assert str(copy) == "seed differs: the manifest has 1, got 2; start a new store"
