import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_store import tiny_manifest, tiny_store

from feature_store.errors import InputError
from feature_store.format.codecs.bound import calibrated
from feature_store.format.manifest import TapInfo
from feature_store.tools.bench import bench_codecs, stand_ins
from feature_store.tools.cli import main


@pytest.fixture
def store(tmp_path):
    return tiny_store(tmp_path / "s", tiny_manifest(codec="f32"))


def test_bench_orders_the_codecs_by_error_and_size(store):
    codecs = {c["codec"]: c for c in bench_codecs(store)["taps"]["stage4"]["codecs"]}
    assert len(codecs) == 14
    names = ["f32", "f16", "bf16", "int8", "int6", "int4"]
    for measure in (
        lambda c: c["relative_error"],
        lambda c: c["relative_error_without_mean"],
        lambda c: max(errors["gradient"] for terms in c["terms"].values() for errors in terms.values()),
    ):
        values = [measure(codecs[name]) for name in names]
        assert values == sorted(values)
        assert values[0] == 0 < values[1]
    assert codecs["f32"]["bytes_per_view"] == 4 * 24 == 2 * codecs["f16"]["bytes_per_view"]
    assert codecs["int8"]["bytes_per_view"] == 24 + 2 * 4
    assert codecs["int4"]["bytes_per_view"] == 4 * (3 + 1 + 2)
    assert all(c["of_stated"] <= 1 for c in codecs.values())
    assert all(codecs[name + "+zstd"]["relative_error"] == codecs[name]["relative_error"] for name in names)


def test_bench_measures_both_view_paths_and_the_logits(store):
    report = bench_codecs(store, ["int8"], rows=5)
    (int8,) = report["taps"]["stage4"]["codecs"]
    assert {kind: set(terms) for kind, terms in int8["terms"].items()} == {
        "early": {"original", "alternative"},
        "late": {"original", "alternative"},
    }
    assert [c["codec"] for c in report["logits"]["codecs"]] == ["f32", "f16", "bf16"]  # three classes: no top-k
    assert report["rows"] == 5
    json.dumps(report)


def test_bench_calibrates_on_rows_it_does_not_measure(store):
    report = bench_codecs(store, ["int8"], rows=10_000)
    assert report["calibration_rows"] == 5  # all of the first unit and view
    assert report["rows"] == 2 * (5 + 3 + 4) - 5


def test_bench_refuses_when_the_store_is_quantised(tmp_path):
    manifest = replace(tiny_manifest(), taps={"stage4": TapInfo(4, 6, "int8")})
    manifest = calibrated(manifest, {"stage4": np.random.default_rng(0).standard_normal((5, 4, 6))})
    with pytest.raises(InputError, match=r"tap stage4 of .* is stored as int8.*--tap-codec f32"):
        bench_codecs(tiny_store(tmp_path / "q", manifest))


def test_bench_refuses_when_nothing_is_committed(tmp_path):
    with pytest.raises(InputError, match="no committed rows"):
        bench_codecs(tiny_store(tmp_path / "e", units=()))


def test_late_stand_in_is_nearer_to_the_teacher_than_the_early_one():
    values = np.random.default_rng(0).standard_normal((50, 4, 6)).astype(np.float32) + 1
    near = {
        kind: (p * values).sum() / np.linalg.norm(p) / np.linalg.norm(values)
        for kind, p in stand_ins(values, np.random.default_rng(1)).items()
    }
    assert abs(near["early"]) < 0.1 < 0.7 < near["late"] < 0.95


def test_command_line_prints_a_table_or_json(store, capsys):
    assert main(["bench", str(store.path), "--codecs", "int8", "--rows", "4"]) == 0
    assert "int8" in capsys.readouterr().out
    assert main(["bench", str(store.path), "--codecs", "--json", "--rows", "4"]) == 0
    assert len(json.loads(capsys.readouterr().out)["taps"]["stage4"]["codecs"]) == 14


def test_command_line_says_what_to_add_when_nothing_is_to_be_measured(store, capsys):
    assert main(["bench", str(store.path)]) == 2
    assert "--codecs" in capsys.readouterr().err
