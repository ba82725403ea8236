import base64
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tar_files import tar_bytes, write
from tiny_store import SAMPLES, tiny_manifest, tiny_store, unit_data

from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId
from feature_store.format.manifest import SplitInfo, TapInfo, TarInfo
from feature_store.inputs.tar import Tar
from feature_store.store import Store
from feature_store.tools.cli import main
from feature_store.tools.features import channel_profile, frequency_energy, principal_colours, replay_views
from feature_store.tools.plot import plot
from feature_store.views import apply_view, decode_image, pixel_crc

PNG = b"\x89PNG\r\n\x1a\n"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tar(tmp_path) -> Tar:
    members = []
    for position in range(SAMPLES[0]):
        members += [(f"key/0-{position}.png", png(position)), (f"key/0-{position}.cls", b"1")]
    return Tar.open(write(tmp_path / "tar-0.tar", tar_bytes(members)))


@pytest.fixture
def store(tmp_path, tar) -> Store:
    """A store of one tar of real images, with the CRCs of its real views."""
    manifest = replace(
        tiny_manifest(codec="f32"),
        tars=(TarInfo(tar.name, len(tar), tar.header_sha256),),
        capacity=len(tar),
    )
    data = unit_data(manifest, 0, quarantined={2: "unreadable"})
    for view, params in enumerate(data.params):
        for position, drawn in enumerate(params):
            if drawn is not None:
                pixels = apply_view(decode_image(tar.read(position).image), drawn, manifest.policy.size)
                data.pixel_crc[view, position] = pixel_crc(pixels)
    store = tiny_store(tmp_path / "s", manifest, units=())
    store.write_unit(0, 0, data)
    return store


def test_energy_is_all_in_one_frequency_when_maps_are_one_cosine():
    height, width, u, v = 5, 6, 2, 3
    y, x = np.mgrid[:height, :width]
    wave = np.cos(np.pi * u * (y + 0.5) / height) * np.cos(np.pi * v * (x + 0.5) / width)
    features = np.stack([wave.reshape(-1, 1) * [1.0, -3.0]])
    energy = frequency_energy(features, (height, width))
    expected = np.zeros((height, width))
    expected[u, v] = 2 * np.linalg.norm(wave)  # mean of 1 and 3
    assert np.allclose(energy, expected, atol=1e-12)


def test_direct_component_is_the_channel_mean():
    features = np.random.default_rng(0).standard_normal((7, 12, 5))
    energy = frequency_energy(features, (3, 4))
    assert np.isclose(energy[0, 0], np.abs(features.mean(axis=1)).mean() * np.sqrt(12))


def test_outliers_are_the_channels_far_beyond_the_median():
    features = np.random.default_rng(0).standard_normal((40, 4, 20))
    features[..., 3] += 60
    features[..., 8] *= 30
    profile = channel_profile(features)
    assert set(profile.outliers) == {3, 8}
    assert profile.mean[3] == pytest.approx(60, abs=0.3)
    assert profile.std[8] == pytest.approx(30, rel=0.2)
    assert channel_profile(np.ones((2, 3, 4))).outliers.size == 0


def test_colours_tell_two_kinds_of_tokens_apart():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, (30, 4))
    features = rng.standard_normal((30, 4, 8)) * 0.1 + np.where(kind[..., None], 1, -1) * rng.standard_normal(8)
    red = principal_colours(features, (2, 2), features)[..., 0].reshape(30, 4)
    assert abs(red[kind == 1].mean() - red[kind == 0].mean()) > 0.8


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colours_are_finite_when_features_are_constant_or_few(channels):
    features = np.ones((3, 4, channels))
    colours = principal_colours(features, (2, 2), features)
    assert colours.shape == (3, 2, 2, 3)
    assert np.isfinite(colours).all()


def test_replayed_views_are_those_the_teacher_saw(store, tar):
    rows = [RowId(0, 4, 1), RowId(0, 0, 0)]
    pixels = replay_views(store, [tar], np.array(rows))
    assert [pixel_crc(view) for view in pixels] == [store.pixel_crcs(0, r.view)[r.position] for r in rows]


def test_replay_refuses_when_the_tar_is_missing_or_another(store, tmp_path):
    with pytest.raises(InputError, match=r"tar tar-0.tar is not among those given \(none\)"):
        replay_views(store, [], np.array([[0, 0, 0]]))
    (tmp_path / "b").mkdir()
    other = write(tmp_path / "b" / "tar-0.tar", tar_bytes([("key/0-0.png", png(9)), ("key/0-0.cls", b"1")]))
    with pytest.raises(MismatchError, match=r"tars\[tar-0.tar\].samples differs"):
        replay_views(store, [Tar.open(other)], np.array([[0, 0, 0]]))


def test_replay_refuses_when_pixels_are_not_those_of_the_store(store, tar, monkeypatch):
    monkeypatch.setattr("feature_store.tools.features.replay_view", lambda *_: np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(MismatchError, match="pixels of sample 'key/0-0', view 0"):
        replay_views(store, [tar], np.array([[0, 0, 0]]))


def test_plot_writes_pictures_and_one_page_that_holds_them(store, tar, tmp_path):
    files = plot(store, tmp_path / "out", [tar.url], thumbnails=3)
    assert [file.name for file in files] == ["frequency.png", "channels.png", "views.png", "index.html"]
    assert all(file.read_bytes().startswith(PNG) for file in files[:3])
    page = files[-1].read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(picture) for picture in embedded] == [file.read_bytes() for file in files[:3]]
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "test_vit" in page
    assert "{" not in re.sub(r"<style>.*</style>", "", page, flags=re.S)


def test_plot_is_the_same_when_repeated(store, tar, tmp_path):
    first, again = (plot(store, tmp_path / name, [tar.url]) for name in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]


def test_plot_leaves_the_views_out_when_there_are_no_tars(store, tmp_path):
    files = plot(store, tmp_path / "out")
    assert [file.name for file in files] == ["frequency.png", "channels.png", "index.html"]


def test_plot_refuses_when_the_tars_are_others(store, tmp_path):
    other = write(tmp_path / "else.tar", tar_bytes([("key/9.png", png(9)), ("key/9.cls", b"1")]))
    with pytest.raises(InputError, match=r"none of the rows drawn is in the tars given \(else.tar\).*tar-0.tar"):
        plot(store, tmp_path / "out", [other])


def test_plot_refuses_when_the_tap_has_no_grid(tmp_path):
    manifest = replace(
        tiny_manifest(),
        taps={"stage4": TapInfo(4, 6, "f16"), "stage3_prefix": TapInfo(1, 6, "f16")},
        split=SplitInfo("vit", 1, 6, (2, 2), 6, (2, 2), 1, "cached"),
    )
    store = tiny_store(tmp_path / "p", manifest, units=())
    with pytest.raises(InputError, match="tap 'stage3_prefix' cannot be drawn: the store has stage4 on a grid"):
        plot(store, tmp_path / "out", tap="stage3_prefix")


@pytest.mark.parametrize("library", ["matplotlib", "scipy.fft"])
def test_plot_names_the_extra_when_a_library_is_missing(store, tmp_path, monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["plot", str(store.path), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'scalekd-cache[plot]'" in capsys.readouterr().err


def test_command_line_lists_the_files(store, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["plot", str(store.path), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        str(out / n) for n in ("frequency.png", "channels.png", "index.html")
    ]
