"""Training against a running service is training against its store, and its live teacher is a live teacher."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import ROWS
from service_process import running_service
from stopped_runs import killed_at_update
from training_world import World, changed, shared_world, train_config

from feature_store.client.connection import connect, read_token
from feature_store.errors import InputError, MismatchError, ResourceError
from feature_store.store import open_store
from student_trainer.config import OptimConfig, TrainConfig
from student_trainer.data.loader import BatchLoader
from student_trainer.engine.metrics import read_metrics
from student_trainer.plan import resolve
from student_trainer.teachers.config import LiveOptions
from student_trainer.train import train


@pytest.fixture(scope="module")
def world() -> World:
    return shared_world("vit")


@pytest.fixture(scope="module")
def url(world):
    with running_service(
        world.store, "--teacher", world.teacher[0], "--checkpoint", str(world.checkpoint), "--device", "cpu",
        "--max-wait", "0",
    ) as running:  # fmt: skip
        yield running.url


def config(world: World, run: Path, source: str, **changes) -> TrainConfig:
    return train_config(run, world, **{"store": None, "source": source, "epochs": 2, "device": "cpu", **changes})


def losses(run: Path) -> list[dict[str, float]]:
    """Every loss term of every step, without times."""
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]


def test_losses_are_the_same_to_the_bit_when_rows_come_over_http(world, url, tmp_path):
    local = train(config(world, tmp_path / "local", "store", store=world.store))
    remote = train(config(world, tmp_path / "remote", url))
    assert len(losses(local.run)) == 6
    assert {"task", "stage3_original", "stage4_alternative", "kd", "total"} <= losses(local.run)[0].keys()
    assert losses(remote.run) == losses(local.run)


def test_run_goes_on_over_http_when_it_began_with_the_store_and_not_with_another_kind_of_features(world, url, tmp_path):
    run = tmp_path / "run"
    whole = train(config(world, tmp_path / "whole", "store", store=world.store))
    with killed_at_update(3):
        train(config(world, run, "store", store=world.store, checkpoint_every=1))
    train(config(world, run, url, resume=True))
    assert losses(run) == losses(whole.run)
    with pytest.raises(MismatchError, match=r"inputs.features differs: the run has 'cached', got 'live, by a service'"):
        train(config(world, run, f"live+{url}", resume=True))


def test_losses_agree_when_the_teacher_lives_in_the_service(world, url, tmp_path):
    teacher = LiveOptions(checkpoint=world.checkpoint)
    optim = OptimConfig("momentum", lr=1e-3)  # the service may compute other batches, whose rounding Adam would enlarge
    local = train(config(world, tmp_path / "local", "live", store=world.store, teacher=teacher, optim=optim))
    remote = train(config(world, tmp_path / "remote", f"live+{url}", optim=optim))
    for near, far in zip(losses(local.run), losses(remote.run), strict=True):
        assert near.keys() == far.keys()
        np.testing.assert_allclose(list(near.values()), list(far.values()), rtol=1e-3)


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_losses_are_the_same_when_workers_read_over_http(world, url, tmp_path, start_method):
    local = resolve(config(world, tmp_path, "store", store=world.store))
    parts = resolve(config(world, tmp_path, url))
    (source,) = parts.dataset.sources
    source.read(ROWS)  # the parent's connection must not be its children's
    by_workers = BatchLoader(parts.dataset, parts.sampler, workers=1, start_method=start_method)
    for near, far in zip(BatchLoader(local.dataset, local.sampler), by_workers, strict=True):
        assert torch.equal(near.rows, far.rows)
        (near_raw,), (far_raw,) = near.features, far.features
        near, far = near_raw, far_raw
        assert torch.equal(near.logits, far.logits)
        assert near.taps.keys() == far.taps.keys()
        assert all(
            torch.equal(part, far.taps[tap][name]) for tap, some in near.taps.items() for name, part in some.items()
        )
    source.read(ROWS)


def test_training_is_refused_when_the_service_has_no_teacher(world, tmp_path):
    with running_service(world.store) as running, pytest.raises(InputError, match="teacher"):
        resolve(config(world, tmp_path, f"live+{running.url}"))


@pytest.mark.parametrize("how", ["variable", "file"])
def test_training_reads_with_a_token_when_the_service_needs_one(world, tmp_path, how, monkeypatch, capfd):
    from feature_store.tools.cli import main as store_tool
    from teacher_service.cli import main

    tokens = tmp_path / "tokens.jsonl"
    assert main(["token", "create", "--name", "trainer", "--file", str(tokens)]) == 0
    token = capfd.readouterr().out.strip()
    with running_service(world.store, "--tokens", str(tokens)) as running:
        asked = config(world, tmp_path / "run", running.url, epochs=1)
        with pytest.raises(InputError, match="refuses: .*; set FEATURE_STORE_TOKEN to a token"):
            resolve(asked)
        if how == "file":
            (tmp_path / "token").write_text(token + "\n")
            asked = changed(asked, token_file=tmp_path / "token")
        else:
            assert store_tool(["info", f"{running.url}/v1/zarr"]) == 3
            assert "needs a token in FEATURE_STORE_TOKEN" in capfd.readouterr().err
            monkeypatch.setenv("FEATURE_STORE_TOKEN", f" {token}\n")
            assert store_tool(["info", f"{running.url}/v1/zarr"]) == 0
        result = train(asked)
    assert result.steps == 3
    files = [path for path in result.run.rglob("*") if path.is_file()]
    assert json.loads((result.run / "config.json").read_text())
    assert not any(token.encode() in path.read_bytes() for path in files)
    output = capfd.readouterr()
    assert token not in output.out + output.err


def test_training_gives_up_with_a_clear_word_when_nobody_listens(world, tmp_path, monkeypatch):
    monkeypatch.setattr("feature_store.client.connection._FIRST_SECONDS", 0.2)
    with pytest.raises(ResourceError, match=r"127.0.0.1:1/v1/manifest: the connection failed .*is the service running"):
        resolve(config(world, tmp_path, "http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "ftp://host"}, "--source is 'ftp://host', expected store, live, http"),
        ({"source": "http://host", "store": Path("s")}, "--source http://host brings its own store"),
        ({"source": "store", "store": Path("s"), "token_file": Path("t")}, "--token-file is for --source http"),
        ({"source": "live+http://host", "method": "none"}, "uses no teacher; leave out --source live"),
        ({"source": "http://host", "teacher": LiveOptions(name="x")}, "--teacher options are for --source live"),
    ],
)
def test_options_are_refused_when_they_contradict_the_source(world, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        config(world, tmp_path, **changes)


@pytest.mark.parametrize("content", [None, " \n"])
def test_token_file_is_refused_when_it_holds_none(tmp_path, content):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match="the token file"):
        read_token(file)


def test_rows_go_on_when_the_service_is_started_again(world, tmp_path):
    with running_service(world.store) as first:
        port = first.url.rpartition(":")[2]
        source = connect(first.url).source()
        expected = source.read(ROWS).logits
    with running_service(world.store, "--port", port):
        np.testing.assert_array_equal(source.read(ROWS).logits, expected)
    np.testing.assert_array_equal(open_store(world.store).source().read(ROWS).logits, expected)
