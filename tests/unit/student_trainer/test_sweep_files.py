from pathlib import Path

import pytest

from feature_store.errors import InputError
from student_trainer.recipes import PRESETS
from student_trainer.sweeps.file import PACKAGED, read_sweep
from student_trainer.teachers.config import StoreTeacher

BASE = ["store=s", "tars=a.tar", "val_tars=v.tar", "student=test_resnet"]
OUT = Path("out")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.yaml"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_sweep_gives_every_setting_with_every_seed_when_read(file):
    settings = "{plain: {method: none}, FD: {method: fd, optim: {opt: lamb}}}"
    text = f"{{base: {{epochs: 3, optim: {{lr: 0.5}}}}, seeds: [4, 7], settings: {settings}}}"
    sweep = read_sweep(file(text), OUT, BASE)
    assert [(run.setting, run.seed) for run in sweep.runs] == [("plain", 4), ("FD", 4), ("plain", 7), ("FD", 7)]
    assert (sweep.title, sweep.baseline, sweep.score) == ("my", "plain", "last")
    config = sweep.runs[3].config
    assert (config.run, config.seed, config.resume) == (Path("out/runs/fd-seed7"), 7, True)
    assert (config.method, config.epochs, config.optim.lr, config.optim.opt) == ("fd", 3, 0.5, "lamb")
    assert sweep.runs[0].config.optim.opt == "adamw"


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_sweep_runs_on_any_store_when_named(path):
    sweep = read_sweep(Path(path.stem), OUT, BASE)
    assert len(sweep.runs) == 3 * len(sweep.settings)
    assert sweep.baseline in sweep.settings
    assert len({str({**vars(run.config), "run": None}) for run in sweep.runs}) == len(sweep.runs)  # no two alike


def test_ablation_adds_one_part_after_the_other_when_read():
    first = {run.setting: run.config for run in read_sweep(Path("ablation"), OUT, BASE, [0]).runs}
    parts = [(c.method, c.scalekd.dual_view, c.scalekd.tpp, c.scalekd.kd_alpha) for c in list(first.values())[1:]]
    assert parts == [
        ("scalekd", False, False, None), ("scalekd", True, False, None), ("scalekd", True, True, None),
        ("scalekd", True, True, 0.5),
    ]  # fmt: skip


def test_beta_weights_keep_their_sum_when_swept():
    for run in read_sweep(Path("beta"), OUT, BASE).runs:
        beta = float(run.setting.split()[0])
        weights = run.config.scalekd.weights()
        for stage in ("stage3", "stage4"):
            original, alternative = (weights.get(f"{stage}_{view}", 0.0) for view in ("original", "alternative"))
            assert original + alternative == pytest.approx(0.14)
            assert original == pytest.approx(0.14 * beta, abs=0.001)


def test_preset_is_none_when_a_setting_takes_it_back(file):
    base = ["preset=trad-swin_l-resnet50", *BASE]
    own, preset = read_sweep(file("{settings: {own: {preset: null, epochs: 2}, preset: {}}}"), OUT, base, [0]).runs
    assert (own.config.optim.opt, preset.config.optim.opt) == ("adamw", "momentum")


def test_store_may_be_a_url_when_set():
    (config, *_) = (run.config for run in read_sweep(Path("baselines"), OUT, [*BASE, "store=s3://bucket/store"]).runs)
    assert config.teacher == StoreTeacher("s3://bucket/store")


def test_preset_gives_the_schedule_when_the_base_names_one():
    name, preset = next(iter(PRESETS.items()))
    changes = ["preset=" + name, "store=s", "tars=a.tar", "val_tars=v.tar", "epochs=7"]
    config = read_sweep(Path("baselines"), OUT, changes, seeds=[3]).runs[0].config
    assert (config.student, config.epochs, config.seed) == (preset.student, 7, 3)
    assert config.optim == preset.schedule.optim


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{settings: {}}", "settings is empty"),
        ("{settings: {a: {}}, seeds: []}", "seeds is empty"),
        ("{settings: {a: {}}, seeds: [1, 1]}", "each seed once"),
        ("{settings: {a: 3}}", "a is 3, expected a mapping"),
        ("{settings: {0.5: {}}}", "settings has the name 0.5, expected text; put it in quotes"),
        ("{settings: {a: {}}, baseline: b}", "baseline is 'b', expected one of a"),
        ("{settings: {a b: {}, a-b: {}}}", "two settings share a folder name"),
        ("{settings: {a: {seed: 3}}}", "a: seed is chosen by the sweep"),
        ("{settings: {a: {run: x}}}", "a: run is chosen by the sweep"),
        ("{settings: {a: {val_tars: []}}}", "a: val_tars is missing"),
        ("{settings: {a: {epoch: 3}}}", "a: epoch is unknown; did you mean epochs"),
        ("{setting: {a: {}}}", "setting is unknown; did you mean settings"),
        ("{settings: {a: {epochs: 0}}}", "--epochs is 0"),
        ("{settings: {a: {preset: nope}}}", "there is no preset 'nope'"),
    ],
)
def test_sweep_is_refused_when_it_cannot_be_run(file, text, message):
    with pytest.raises(InputError, match=message):
        read_sweep(file(text), OUT, BASE)


def test_sweep_names_the_ready_ones_when_the_file_is_missing():
    with pytest.raises(InputError, match=r"sweep file nope.yaml does not exist; .*ablation, alpha, baselines, beta"):
        read_sweep(Path("nope.yaml"), OUT)
