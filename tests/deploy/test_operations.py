"""Procedures of deploy/OPERATIONS.md: moving a store, rotating tokens."""

import shutil
from pathlib import Path

import pytest
from served_store import in_process
from tiny_store import everything, tiny_store

from feature_store.errors import UserError
from feature_store.store import open_store
from feature_store.tools.cli import main as feature_store
from teacher_service.serve.tokens import create_token


def _copy(source: Path, target: Path, *, last: bool) -> None:
    """The first or the last step of the copy: what makes objects count comes last."""
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        counts = relative.parts[0] == "commits" or relative == Path("zarr.json")
        if path.is_file() and relative.parts[0] != ".locks" and counts == last:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def test_a_store_copied_in_two_steps_is_whole_and_of_the_same_identity(tmp_path: Path) -> None:
    store, target = tiny_store(tmp_path / "store"), tmp_path / "copy"
    (tmp_path / "store" / ".locks").mkdir(exist_ok=True)
    (tmp_path / "store" / ".locks" / "lease-u00000").touch()
    _copy(tmp_path / "store", target, last=False)
    with pytest.raises(UserError, match=str(target)):
        open_store(target)
    _copy(tmp_path / "store", target, last=True)
    assert not (target / ".locks").exists()
    copied = open_store(target)
    assert copied.manifest.identity() == store.manifest.identity()
    assert everything(copied) == everything(store)
    assert feature_store(["verify", str(target)]) == 0


def test_two_tokens_are_valid_until_the_old_line_is_removed(tmp_path: Path) -> None:
    tiny_store(tmp_path / "store")
    file = tmp_path / "tokens.jsonl"
    old = create_token(file, "trainers", ("read",))
    asked = in_process(tmp_path / "store", tokens=file)

    def status(token: str) -> int:
        return asked("/v1/manifest", headers={"Authorization": f"Bearer {token}"}).status

    new = create_token(file, "trainers-2027", ("read",))
    assert (status(old), status(new)) == (200, 200)
    left = [line for line in file.read_text().splitlines() if '"trainers"' not in line]
    edited = tmp_path / "edited"
    edited.write_text("\n".join(left) + "\n")
    edited.chmod(0o600)
    edited.replace(file)
    assert (status(old), status(new)) == (401, 200)
    asked.close()
