import pickle

import pytest

from feature_store.errors import CorruptStoreError, InputError, MismatchError, Remedy
from feature_store.tools.cli import main
from feature_store.tools.remedies import COMMANDS


def test_mismatch_error_survives_pickling():
    error = MismatchError("seed", expected=1, got=2, remedy="start a new store", where="the manifest")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object
    assert (str(copy), copy.field, copy.expected, copy.got) == (str(error), "seed", 1, 2)
    assert str(copy) == "seed differs: the manifest has 1, got 2; start a new store"


@pytest.mark.parametrize("kind", [InputError, CorruptStoreError])
def test_remedy_survives_pickling(kind):
    copy = pickle.loads(pickle.dumps(kind("what", remedy=Remedy.REPAIR)))  # noqa: S301 - our own object
    assert (type(copy), str(copy), copy.remedy) == (kind, "what", Remedy.REPAIR)
    assert kind("what").remedy is None


def test_every_remedy_has_a_command():
    assert COMMANDS.keys() == set(Remedy)


def test_commands_print_the_command_that_remedies_an_error(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere is not a store (no zarr.json)" in error
    assert error.rstrip().endswith(COMMANDS[Remedy.WRITE_STORE])
