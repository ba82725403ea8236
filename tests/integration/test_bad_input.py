"""Bad input through the real command line: quarantined with a reason, or one clear line and the right exit code."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_jobs import (
    TINY_SWIN,
    TinyTeacher,
    encode_image,
    noise,
    noise_samples,
    store_files,
    write_tar,
    write_tars,
)

from feature_store import open_store
from feature_store.teacher.model import Teacher
from teacher_service.cli import main

Command = Callable[..., list[str]]


@pytest.fixture
def command(tmp_path: Path, tiny_swin: TinyTeacher) -> Command:
    """Arguments of a cache job of the tiny Swin into tmp_path/store."""

    def make(*tars: str, teacher: TinyTeacher = tiny_swin, options: tuple[str, ...] = ()) -> list[str]:
        checkpoint = ["--checkpoint", str(teacher.checkpoint)]
        return ["cache", *tars, *teacher.arguments, *checkpoint, "--store", str(tmp_path / "store"),
                "--workers", "0", "--batch-size", "4", *options]  # fmt: skip

    return make


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every forward pass of a teacher a failure of the test."""

    def forward(*_: Any) -> None:
        pytest.fail("the teacher ran")

    monkeypatch.setattr(Teacher, "forward", forward)


def _error(capsys: pytest.CaptureFixture[str], argv: list[str], exit_code: int) -> str:
    """The one line of error a command ends with."""
    assert main(argv) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("teacher-service: error: ")
    assert "Traceback" not in captured.err
    return last


# --- samples: quarantined or used, the run goes on


def _broken_jpeg() -> bytes:
    return encode_image(noise(), "JPEG")[:-300]


def _sixteen_bit() -> bytes:
    return encode_image(noise()[..., 0].astype(np.uint16) * 256)


QUARANTINED = {
    "not-an-image": {"png": b"these are no pixels", "cls": b"1"},
    "empty-image": {"png": b"", "cls": b"1"},
    "cut-image": {"jpg": _broken_jpeg(), "cls": b"1"},
    "no-label": {"png": encode_image(noise())},
    "bad-label": {"png": encode_image(noise()), "cls": b"cat"},
    "no-image": {"cls": b"1"},
}
USED = {
    "wide": {"png": encode_image(noise(3, 400)), "cls": b"1"},
    "tall": {"png": encode_image(noise(400, 3)), "cls": b"1"},
    "one-pixel": {"png": encode_image(noise(1, 1)), "cls": b"1"},
    "grey": {"png": encode_image(noise(), mode="L"), "cls": b"1"},
    "bilevel": {"png": encode_image(noise(), mode="1"), "cls": b"1"},
    "palette": {"png": encode_image(noise(), mode="P"), "cls": b"1"},
    "alpha": {"png": encode_image(noise(), mode="RGBA"), "cls": b"1"},
    "cmyk": {"jpg": encode_image(noise(), "JPEG", "CMYK"), "cls": b"1"},
    "16-bit": {"png": _sixteen_bit(), "cls": b"1"},
    "gif": {"gif": encode_image(noise(), "GIF", "P"), "cls": b"1"},
}


def test_cache_quarantines_unusable_samples_and_uses_unusual_ones(tmp_path: Path, command: Command) -> None:
    samples = [{"__key__": key, **members} for key, members in (QUARANTINED | USED).items()]
    tar = write_tar(tmp_path / "odd.tar", samples)

    assert main(command(tar, options=("--views", "2", "--policy", "a2"))) == 0

    store = open_store(tmp_path / "store")
    keys, quarantined = store.keys(0), store.quarantined(0)
    assert keys == [*QUARANTINED, *USED]  # nothing is lost
    assert {keys[position] for position in quarantined} == set(QUARANTINED)
    assert all(len(reason) > 10 for reason in quarantined.values())
    rows = store.rows(list(USED), view=1)
    assert np.isfinite(store.source().read(rows).taps["stage4"]).all()


@pytest.mark.parametrize(("key", "workers"), [*((key, "0") for key in QUARANTINED), ("cut-image", "1")])
def test_cache_names_the_unusable_sample_when_strict(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], key: str, workers: str
) -> None:
    bad = {"__key__": key, **QUARANTINED[key]}
    tars = (
        write_tar(tmp_path / "a.tar", noise_samples("good", 3)),
        write_tar(tmp_path / "b.tar", [*noise_samples("more", 5), bad]),
    )

    error = _error(capsys, command(*tars, options=("--strict", "--workers", workers)), 2)

    assert repr(key) in error
    assert tars[1] in error
    assert open_store(tmp_path / "store").committed.units in ([], [0])  # never the bad one


# --- jobs that cannot run: found before any forward pass


def _cut_tar(folder: Path) -> str:
    path = Path(write_tar(folder / "cut.tar", noise_samples("c", 3)))
    path.write_bytes(path.read_bytes()[:-9000])
    return str(path)


def _foreign_file(folder: Path) -> str:
    (folder / "note.tar").write_text("no tar at all" * 1000)
    return str(folder / "note.tar")


@pytest.mark.parametrize(
    ("make_tars", "words"),
    [
        (lambda folder: [], "no tars are listed"),
        (lambda folder: [str(folder / "missing.tar")], "missing.tar is not there"),
        (lambda folder: [str(folder / "trian")], "error: file or folder "),
        (lambda folder: [_cut_tar(folder)], "cut.tar"),
        (lambda folder: [_foreign_file(folder)], "note.tar"),
        (lambda folder: [write_tar(folder / "empty.tar", [])], "empty.tar"),
        (lambda folder: [f"pipe:cat {folder}/a.tar"], "give --allow-pipe"),
        (lambda folder: [write_tar(folder / "a.tar", noise_samples("a", 1))] * 2, "listed twice"),
        (
            lambda folder: [write_tar(folder / f"{name}.tar", noise_samples("same", 2)) for name in "xy"],
            "'same000' is in ",
        ),
    ],
    ids=["none", "missing", "missing-folder", "cut", "foreign", "empty", "pipe", "twice", "same-keys"],
)
def test_cache_refuses_tars_it_cannot_use(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    no_forward: None,
    make_tars: Callable[[Path], list[str]],
    words: str,
) -> None:
    good = write_tars(tmp_path, 2)
    bad = make_tars(tmp_path)

    error = _error(capsys, command(*(good if bad else ()), *bad), 2)

    assert words in error
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--teacher", "swin_tiny_patch4_window7_22"], 2, "did you mean swin_tiny_patch4_window7_224"),
        (["--teacher", "resnet18", "--model-kwargs", "{}", "--depth", "1"], 2, "leave out depth"),
        (["--teacher", "test_vit", "--model-kwargs", '{"no_such_argument": 1}'], 2, "no_such_argument"),
        (["--checkpoint", "nowhere.safetensors"], 2, "nowhere.safetensors is not a file"),
        (["--checkpoint", __file__], 2, "is no safetensors or torch file"),
        (["--model-kwargs", json.dumps(TINY_SWIN | {"num_classes": 7})], 2, "does not fit"),
        (["--policy-options", '{"no_such_field": 1}'], 2, "no_such_field"),
        (["--depth", "3"], 2, "depth 3"),
        (["--views", "0"], 2, "--views"),
        (["--taps", "stage3"], 2, "stage4"),
        (["--device", "cuda:99"], 3, "--device cuda:99"),
        (["--device", "meta"], 3, "--device meta"),
        (["--device", "toaster"], 3, "--device toaster"),
    ],
)
def test_cache_refuses_settings_it_cannot_use(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    no_forward: None,
    options: list[str],
    exit_code: int,
    words: str,
) -> None:
    argv = command(*write_tars(tmp_path, 2))
    for name, value in zip(options[::2], options[1::2], strict=True):
        argv = _with_option(argv, name, value)

    assert words in _error(capsys, argv, exit_code)
    assert not (tmp_path / "store").exists()


def _with_option(argv: list[str], name: str, value: str) -> list[str]:
    """The command with an option set, in place of what it said before."""
    if name in argv:
        at = argv.index(name)
        argv = argv[:at] + argv[at + 2 :]
    return [*argv, name, value]


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_cache_refuses_model_kwargs_when_not_a_json_object(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    argv = _with_option(command(*write_tars(tmp_path, 1)), "--model-kwargs", text)

    assert main(argv) == 2
    assert "JSON" in capsys.readouterr().err


def test_cache_tells_of_checkpoint_when_pretrained_weights_cannot_be_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tars = write_tars(tmp_path, 1)

    argv = ["cache", *tars, "--teacher", "test_vit", "--store", str(tmp_path / "store"), "--workers", "0"]
    error = _error(capsys, argv, 3)

    assert "'test_vit' could not be fetched" in error
    assert "--checkpoint" in error
    assert not (tmp_path / "store").exists()


# --- a store begun with other settings


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--seed", "5"], "seed"),
        (["--policy", "a1"], "policy."),
        (["--policy-options", '{"flip": 0.25}'], "policy.flip"),
        (["--tap-codec", "f32"], "taps.stage4.codec"),
        (["--logits-codec", "f32"], "logits_codec"),
        (["--licence-note", "mine"], "licence"),
        (["--compute-dtype", "bfloat16"], "teacher.compute_dtype"),
        (["--model-kwargs", json.dumps(TINY_SWIN | {"qkv_bias": False})], "teacher.model_kwargs.qkv_bias"),
    ],
)
def test_cache_refuses_a_store_begun_with_other_settings(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], change: list[str], field: str
) -> None:
    argv = command(*write_tars(tmp_path, 2))
    assert main(argv) == 0
    before = store_files(tmp_path / "store")
    capsys.readouterr()

    error = _error(capsys, _with_option(argv, *change), 2)

    assert f"error: {field}" in error
    assert "another store" in error
    assert store_files(tmp_path / "store") == before


def test_cache_refuses_a_store_begun_with_other_weights(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], other_swin: TinyTeacher
) -> None:
    tars = write_tars(tmp_path, 2)
    assert main(command(*tars)) == 0
    capsys.readouterr()

    error = _error(capsys, command(*tars, teacher=other_swin), 2)

    assert "blocks_sha256" in error or "teacher.weights_sha256" in error


def _changed_key(tars: tuple[str, ...]) -> list[str]:
    write_tar(Path(tars[1]), noise_samples("other-", 2, seed=1))
    return [*tars]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda tars: [tars[0]], "tars"),
        (lambda tars: [tars[1], tars[0]], "tars[0].header_sha256"),
        (lambda tars: [tars[0], shutil.copy(tars[1], tars[1].replace("images", "renamed"))], "tars[1].name"),
        (_changed_key, "key_width"),
    ],
    ids=["fewer", "swapped", "renamed", "other-keys"],
)
def test_cache_refuses_a_store_begun_with_other_tars(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[tuple[str, ...]], list[str]],
    field: str,
) -> None:
    tars = write_tars(tmp_path, 2, 2)
    assert main(command(*tars)) == 0
    before = store_files(tmp_path / "store")
    capsys.readouterr()

    error = _error(capsys, command(*change(tars)), 2)

    assert f"error: {field} differs" in error
    assert store_files(tmp_path / "store") == before


def test_plan_refuses_a_store_begun_with_other_settings(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], tiny_swin: TinyTeacher
) -> None:
    tars = write_tars(tmp_path, 2)
    assert main(command(*tars)) == 0
    capsys.readouterr()
    argv = ["plan", *tars, *tiny_swin.arguments, "--store", str(tmp_path / "store")]

    assert main(argv) == 0
    capsys.readouterr()
    assert "error: seed differs" in _error(capsys, [*argv, "--seed", "1"], 2)


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("mine"), lambda path: path.mkdir() or (path / "mine").write_text("mine")]
)
def test_cache_leaves_alone_what_is_no_store(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Any]
) -> None:
    make(tmp_path / "store")

    error = _error(capsys, command(*write_tars(tmp_path, 2)), 2)

    assert "already exists" in error
    assert (tmp_path / "store").is_file() or (tmp_path / "store/mine").read_text() == "mine"


# --- the machine gives up


def test_cache_says_what_is_missing_when_the_plan_does_not_fit(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_forward: None,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    error = _error(capsys, command(*write_tars(tmp_path, 2)), 3)

    assert "10.0 kB are free" in error
    assert "are missing" in error
    assert not (tmp_path / "store").exists()


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write files larger than this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_cache_keeps_committed_units_and_resumes_when_a_write_fails(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    big = command(
        *write_tars(tmp_path, 2, 250), options=("--batch-size", "64", "--tap-codec", "f16")
    )  # 250 rows make a shard of 130 kB
    with _largest_file(100_000):
        error = _error(capsys, big, 3)

    assert "unit 1 does not fit on the disk" in error
    assert "a quota or file size limit is in the way" in error
    assert "run the same command again" in error
    store = open_store(tmp_path / "store")
    assert store.committed.units == [0]

    assert main(big) == 0
    assert open_store(tmp_path / "store").committed.units == [0, 1]
    assert not list((tmp_path / "store").rglob("*.partial"))


def test_cache_says_so_when_a_tar_shrinks_under_it(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = write_tars(tmp_path, 3)
    forward = Teacher.forward

    def shrink_then_forward(self: Teacher, pixels: torch.Tensor, taps: Sequence[str]) -> Any:
        Path(tars[0]).write_bytes(Path(tars[0]).read_bytes()[:5000])
        return forward(self, pixels, taps)

    monkeypatch.setattr(Teacher, "forward", shrink_then_forward)
    error = _error(capsys, _with_option(command(*tars), "--batch-size", "1"), 2)

    assert "was cut short while in use" in error
    assert open_store(tmp_path / "store").committed.units == []


def test_cache_refuses_features_its_codec_cannot_hold(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], tiny_swin: TinyTeacher
) -> None:
    weights = load_file(tiny_swin.checkpoint)
    weights["norm.weight"] = weights["norm.weight"] * 1e6
    loud = TinyTeacher(tiny_swin.name, tiny_swin.model_kwargs, tmp_path / "loud.safetensors")
    save_file(weights, loud.checkpoint)
    argv = command(*write_tars(tmp_path, 2), teacher=loud)

    assert "--tap-codec f32" in _error(capsys, argv, 2)
    assert open_store(tmp_path / "store").committed.units == []
    shutil.rmtree(tmp_path / "store")
    assert main([*argv, "--tap-codec", "f32", "--logits-codec", "f32"]) == 0
