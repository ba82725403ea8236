"""A cache job into a bucket, through a network that fails now and then."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import FlakyProxy, s3_server
from tiny_jobs import TinyTeacher, cache_config, store_files, write_tars

from feature_store.backends.open import open_objects
from feature_store.errors import ResourceError
from teacher_service.cache.job import cache
from teacher_service.cli import main
from teacher_service.plan.sizes import plan


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_server() as make:
        yield make()


def _objects(url: str) -> dict[str, bytes]:
    objects = open_objects(url)
    return {path: objects.get(path).tobytes() for path in objects.list()}


def test_cache_writes_the_same_objects_when_a_bucket_answers_every_fifth_request_wrongly(
    tmp_path: Path, bucket: str, tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = write_tars(tmp_path, 3, 2)
    local = cache_config(tars, tiny_swin, tmp_path / "store", tap_codec="int8")
    cache(local)

    with FlakyProxy(os.environ["AWS_ENDPOINT_URL"], every=5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        summary = cache(cache_config(tars, tiny_swin, f"{bucket}/some/store", tap_codec="int8"))
        assert _objects(f"{bucket}/some/store") == store_files(tmp_path / "store")

    assert summary.units_left == 0
    assert proxy.failed > 10


def test_cache_goes_on_with_a_bucket_when_units_are_missing(
    tmp_path: Path, bucket: str, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = write_tars(tmp_path, 3, 2)
    url = f"{bucket}/store"
    argv = ["cache", *tars, *tiny_swin.arguments, "--checkpoint", str(tiny_swin.checkpoint), "--workers", "0",
            "--store", url]  # fmt: skip
    assert main(argv) == 0
    whole = _objects(url)
    assert plan(cache_config(tars, tiny_swin, url, tap_codec="int8")).remaining_bytes == 0
    open_objects(url).delete("commits/u00001-v0-0.json")
    capsys.readouterr()

    assert main(argv) == 0

    assert "1 units written, 1 already committed" in capsys.readouterr().out
    assert _objects(url) == whole
    assert main(["verify", *tars, "--store", url, "--checkpoint", str(tiny_swin.checkpoint), "--workers", "1"]) == 0


def test_plan_says_that_a_bucket_has_no_known_limit(
    tmp_path: Path, bucket: str, tiny_swin: TinyTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *write_tars(tmp_path, 2), *tiny_swin.arguments, "--store", f"{bucket}/store"]) == 0

    assert "a bucket has no limit known here" in capsys.readouterr().out


def test_cache_says_what_to_check_when_the_bucket_cannot_be_reached(
    tmp_path: Path, bucket: str, tiny_swin: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.backends.bucket._RETRY", {"max_retries": 1})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(ResourceError, match="check network, credentials, URL"):
        cache(cache_config(write_tars(tmp_path, 2), tiny_swin, f"{bucket}/store"))
