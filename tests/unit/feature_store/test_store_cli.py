import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.filesize import decimal
from tiny_store import tiny_store

import feature_store.tools.cli
from feature_store.errors import CorruptStoreError
from feature_store.tools.cli import main
from feature_store.tools.info import summarise


def test_info_prints_a_table_with_what_matters(tmp_path, capsys):
    tiny_store(tmp_path / "s", units=(0,), quarantined={1: "zero bytes"})
    assert main(["info", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    blocks = sum(file.stat().st_size for file in (tmp_path / "s/teacher/blocks").rglob("*") if file.is_file())
    assert f"size of later blocks │ {decimal(blocks)}" in " ".join(out.split())
    for text in ("test_vit", "stage4 [4, 6] f16", "1 of 3 complete", "8 committed of 24", "key/0-1: zero bytes"):
        assert text in out


def test_info_json_is_the_stores_info(tmp_path, capsys):
    store = tiny_store(tmp_path / "s")
    assert main(["info", str(tmp_path / "s"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summarise(store)


def test_info_takes_a_url(tmp_path, capsys):
    store = tiny_store(tmp_path / "s")
    assert main(["info", f"file://{tmp_path}/s", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summarise(store)


def test_errors_are_one_line_and_an_exit_code(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("feature-store: error: ")
    assert err.count("\n") == 1
    store = tiny_store(tmp_path / "s")
    record = store.path / "commits/u00000-v0-1.json"
    os.truncate(record, 20)
    assert main(["info", str(tmp_path / "s")]) == 1
    assert "commit record commits/u00000-v0-1.json is damaged" in capsys.readouterr().err


def test_wrong_usage_exits_2(capsys):
    assert main(["inof"]) == 2
    assert main(["inof", "--help"]) == 2
    assert "the command is 'inof', expected one of info, verify, " in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_list_options_are_refused_when_given_twice(tmp_path, capsys):
    store = tiny_store(tmp_path / "s")
    for options in (["--codecs", "f32", "--codecs", "f16"], ["--codecs=f32", "--codecs", "f16"]):
        assert main(["bench", str(store.objects.url), *options]) == 2
        assert "--codecs is given 2 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "verify STORE --workers 0", "verify STORE --workers -2", "repair STORE --workers 0",
        "copy STORE COPY --workers -3",
        "bench STORE --codecs f32 --rows 0", "bench STORE --codecs f32 --seed -1", "plot STORE --out COPY --rows 0",
        "plot STORE --out COPY --rows -1", "plot STORE --out COPY --thumbnails -4", "plot STORE --out COPY --seed -1",
    ],
)  # fmt: skip
def test_numbers_that_no_command_can_use_are_refused_with_their_option(tmp_path, capsys, arguments):
    places = {"STORE": str(tiny_store(tmp_path / "s").path), "COPY": str(tmp_path / "copy")}
    *command, option, number = [places.get(word, word) for word in arguments.split()]
    assert main([*command, option, number]) == 2
    assert f"error: {option} is {number}, expected {'0 or more' if option == '--seed' else 'at least 1'}" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["info", "STORE"], ["info", "STORE", "--json"]])
def test_output_is_ended_without_a_word_when_its_reader_is_gone(tmp_path, arguments):
    store = str(tiny_store(tmp_path / "s").path)
    command = [sys.executable, "-m", "feature_store", *(argument.replace("STORE", store) for argument in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (1, 141)  # 1: rich looks after what it prints


def test_full_shared_memory_is_told_apart_from_a_full_disk_when_semaphores_find_no_room(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_store.tools.cli, "open_store", full)
    assert main(["info", str(tmp_path)]) == 3
    assert "error: the disk is full: [Errno 28]" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert main(["info", str(tmp_path)]) == 3
    assert (
        "error: shared memory (/dev/shm) is full; in a container give it more with --shm-size"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("kind", [OSError, CorruptStoreError])
def test_too_many_open_files_are_told_with_the_limit_whatever_failed_first(monkeypatch, tmp_path, capsys, number, kind):
    def refused(*_):
        reason = f"[Errno {number}] {os.strerror(number)}"
        raise OSError(number, os.strerror(number)) if kind is OSError else kind(f"shard a: {reason}; restore the shard")

    monkeypatch.setattr(feature_store.tools.cli, "open_store", refused)
    assert main(["info", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert f"Too many open files; this process may have {limit} open (ulimit -n)" in message
    assert "restore" not in message
