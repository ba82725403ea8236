"""apply_view and the pixel CRC: the same bytes everywhere, and nothing changes them unnoticed."""

import dataclasses
import json
import multiprocessing
import random
import subprocess
import sys

import numpy as np
import PIL
import pytest
import view_digests
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feature_store.errors import InputError, MismatchError
from feature_store.views import (
    POLICIES,
    ViewParams,
    apply_view,
    check_pixels,
    draw_view,
    pixel_crc,
    view_policy,
)
from feature_store.views.augment import Op
from feature_store.views.draws import NO_BOX

SIDES = st.integers(1, 64)
NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8))
PLAIN = ViewParams((0, 0, 48, 48), False, (), (), NO_BOX, 0, "bicubic")


@pytest.fixture(scope="module")
def digests():
    crcs = [view_digests.digest(task) for task in view_digests.TASKS]
    assert len(set(crcs)) > 60  # else equality below would prove little
    return crcs


def test_views_are_the_same_bytes_when_made_by_another_process(digests):
    command = [sys.executable, view_digests.__file__]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == digests


@pytest.mark.parametrize("workers", [1, 3])
def test_views_are_the_same_bytes_when_worker_count_and_order_change(workers, digests):
    order = list(range(len(digests)))
    random.Random(workers).shuffle(order)
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:
        crcs = pool.map(view_digests.digest, [view_digests.TASKS[i] for i in order], chunksize=5)
        pool.close()  # not by SIGTERM, which is blocked if an earlier test started a shielded fork server
        pool.join()
    assert dict(zip(order, crcs, strict=True)) == dict(enumerate(digests))


def test_views_ignore_and_keep_global_random_state_when_made(digests):
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tobytes()
    assert [view_digests.digest(task) for task in view_digests.TASKS[:9]] == digests[:9]
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states


@given(
    name=st.sampled_from(sorted(POLICIES)), width=SIDES, height=SIDES, size=st.tuples(SIDES, SIDES),
    view=st.integers(0, 99), strongest=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_apply_view_gives_uint8_hwc_when_image_and_view_have_any_size(name, width, height, size, view, strongest):
    extra = {"num_ops": 3, "op_probability": 1.0, "level": 8.0, "max_level": 8.0, "erase": 1.0} if strongest else {}
    policy = view_policy(name, size, **extra)
    image = view_digests.source(width, height)
    pixels = apply_view(image, draw_view(policy, 0, "k", view, image.size), size)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (*size, 3))


def test_apply_view_takes_steps_in_order_when_all_are_on():
    erase, seed = (3, 2, 5, 6), 9
    params = ViewParams((5, 6, 30, 36), True, (Op.INVERT, Op.SHEAR_X), (0.0, 0.25), erase, seed, "bilinear")
    view = NOISE.crop((5, 6, 35, 42)).resize((20, 24), Image.Resampling.BILINEAR)
    view = Image.fromarray(255 - np.asarray(view)[:, ::-1])
    view = view.transform(
        view.size, Image.Transform.AFFINE, (1, 0.25, 0, 0, 1, 0), Image.Resampling.BILINEAR, fillcolor=(124, 116, 104)
    )
    got = apply_view(NOISE, params, (24, 20))
    outside = np.ones((24, 20), bool)
    outside[2:8, 3:8] = False
    np.testing.assert_array_equal(got[outside], np.asarray(view)[outside])
    assert (got[~outside] != np.asarray(view)[~outside]).mean() > 0.9


def test_apply_view_copies_pixels_when_crop_has_the_views_size():
    params = dataclasses.replace(PLAIN, crop=(10, 4, 24, 16))
    np.testing.assert_array_equal(apply_view(NOISE, params, (16, 24)), np.asarray(NOISE)[4:20, 10:34])


def test_apply_view_overwrites_all_of_the_memory_it_is_given_when_a_box_is_erased():
    params = dataclasses.replace(PLAIN, flip=True, erase=(2, 3, 5, 6), noise_seed=4)
    memory = np.full((2, 16, 24, 3), 77, np.uint8)
    assert apply_view(NOISE, params, (16, 24), out=memory[1]).base is memory
    np.testing.assert_array_equal(memory[1], apply_view(NOISE, params, (16, 24)))
    assert (memory[0] == 77).all()


def test_apply_view_ignores_pixels_outside_when_cropping():
    changed = np.asarray(NOISE).copy()
    changed[:, 30:] = 0
    params = dataclasses.replace(PLAIN, crop=(2, 2, 28, 40))
    np.testing.assert_array_equal(apply_view(NOISE, params, 12), apply_view(Image.fromarray(changed), params, 12))


def test_noise_is_pinned_when_erasing_on_any_platform():
    pixels = apply_view(NOISE, dataclasses.replace(PLAIN, erase=(0, 0, 40, 40), noise_seed=2**64 - 1), 48)
    assert pixels[0, :3].tolist() == [[127, 136, 95], [168, 114, 93], [119, 96, 134]]
    assert pixel_crc(pixels[:40, :40]) == 3569149535


def test_noise_has_imagenet_statistics_when_erasing():
    erased = apply_view(NOISE.resize((256, 256)), PLAIN_256, 256)[:255, :255].reshape(-1, 3)
    np.testing.assert_allclose(erased.mean(0), [124, 116, 104], atol=1)
    np.testing.assert_allclose(erased.std(0), [56.8, 56.3, 55.4], atol=1)  # 58.4, 57.1, 57.4 before clipping
    assert abs(np.corrcoef(erased.T) - np.eye(3)).max() < 0.02


PLAIN_256 = ViewParams((0, 0, 256, 256), False, (), (), (0, 0, 255, 255), 5, "bicubic")


@st.composite
def rich_params(draw):
    left, top = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    op = draw(st.sampled_from([Op.ROTATE, Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHEAR_X, Op.TRANSLATE_Y]))
    magnitude = {Op.ROTATE: 20.0, Op.TRANSLATE_Y: 0.25, Op.SHEAR_X: 0.25}.get(op, 0.5)
    return ViewParams(
        crop=(left, top, draw(st.integers(20, 36)), draw(st.integers(20, 36))),
        flip=draw(st.booleans()),
        ops=(op, draw(st.sampled_from([Op.NONE, Op.INVERT]))),
        magnitudes=(draw(st.sampled_from([-magnitude, magnitude])), 0.0),
        erase=(draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(2, 7)), draw(st.integers(2, 7))),
        noise_seed=draw(st.integers(0, 2**64 - 1)),
        interpolation=draw(st.sampled_from(["bilinear", "bicubic"])),
    )


def single_changes(params):
    """Every way to change one number of the parameters by the least that means something."""
    for field in ("crop", "erase"):
        for place in range(4):
            box = list(getattr(params, field))
            box[place] -= 1
            yield f"{field}[{place}]", {field: tuple(box)}
    yield "flip", {"flip": not params.flip}
    yield "ops[0]", {"ops": (Op.SOLARIZE_ADD, params.ops[1])}
    yield "ops[1]", {"ops": (params.ops[0], Op.NONE if params.ops[1] else Op.INVERT)}
    yield "order of ops", {"ops": params.ops[::-1], "magnitudes": params.magnitudes[::-1]}
    yield "sign", {"magnitudes": (-params.magnitudes[0], 0.0)}
    yield "erase off", {"erase": NO_BOX}
    yield "noise_seed", {"noise_seed": params.noise_seed ^ 1}
    yield "interpolation", {"interpolation": {"bilinear": "bicubic", "bicubic": "bilinear"}[params.interpolation]}


@given(params=rich_params())
@settings(max_examples=60, deadline=None)
def test_crc_changes_when_any_single_parameter_is_flipped(params):
    crc = pixel_crc(apply_view(NOISE, params, 16))
    for name, change in single_changes(params):
        commutes = name == "order of ops" and (params.ops[1] == Op.NONE or params.ops[0] not in GEOMETRIC)
        if commutes:
            continue
        assert pixel_crc(apply_view(NOISE, dataclasses.replace(params, **change), 16)) != crc, name


GEOMETRIC = (Op.ROTATE, Op.SHEAR_X, Op.TRANSLATE_Y)  # their fill colour tells whether inversion came before


def test_apply_view_gives_same_bytes_when_parameters_come_from_stored_arrays():
    params = ViewParams((3, 250, 200, 40), True, (Op.CONTRAST, Op.ROTATE), (np.float32(0.63).item(), -7.5),
                        (1, 2, 5, 6), 2**63 + 5, "bicubic")  # fmt: skip
    stored = dataclasses.replace(
        params,
        crop=tuple(np.array(params.crop, np.uint8)),  # left + width would overflow
        flip=np.bool_(params.flip),
        ops=tuple(np.array(params.ops, np.uint8)),
        magnitudes=tuple(np.array(params.magnitudes, np.float32)),
        erase=tuple(np.array(params.erase, np.uint8)),
        noise_seed=np.uint64(params.noise_seed),
    )
    image = view_digests.source(210, 300)
    np.testing.assert_array_equal(apply_view(image, params, 32), apply_view(image, stored, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (1, 0, 48, 48)}, r"crop .* does not fit an image of \(48, 48\)"),
        ({"crop": (0, 0, 0, 4)}, "does not fit"),
        ({"crop": (0, 0, 4, 0)}, "does not fit"),
        ({"crop": (-1, 0, 4, 4)}, "does not fit"),
        ({"crop": (0, -1, 4, 4)}, "does not fit"),
        ({"crop": (0, 1, 48, 48)}, "does not fit"),
        ({"erase": (10, 0, 7, 4)}, r"erased box .* does not fit a view of \(16, 16\)"),
        ({"erase": (0, 10, 4, 7)}, "does not fit a view"),
        ({"erase": (0, -1, 4, 4)}, "does not fit a view"),
        ({"erase": (0, 0, 4, -4)}, "does not fit a view"),
        ({"ops": (99,), "magnitudes": (0.0,)}, "number 99 is unknown"),
        ({"interpolation": "lanczos"}, "'lanczos', expected one of bilinear, bicubic"),
    ],
)
def test_apply_view_refuses_when_parameters_do_not_fit(change, message):
    with pytest.raises(InputError, match=message):
        apply_view(NOISE, dataclasses.replace(PLAIN, **change), 16)


def test_apply_view_takes_boxes_that_reach_the_edges():
    params = dataclasses.replace(PLAIN, crop=(40, 44, 8, 4), erase=(23, 15, 1, 1), noise_seed=1)
    pixels = apply_view(NOISE, params, (16, 24))
    whole = np.asarray(Image.fromarray(np.asarray(NOISE)[44:, 40:]).resize((24, 16), Image.Resampling.BICUBIC))
    assert np.argwhere((pixels != whole).any(axis=2)).tolist() == [[15, 23]]
    assert apply_view(NOISE, dataclasses.replace(PLAIN, erase=(0, 0, 24, 16)), (16, 24)).shape == (16, 24, 3)


def test_apply_view_refuses_when_operations_and_magnitudes_differ_in_number():
    with pytest.raises(ValueError, match="longer|shorter"):
        apply_view(NOISE, dataclasses.replace(PLAIN, ops=(1, 2), magnitudes=(0.0,)), 16)


def test_apply_view_refuses_when_image_is_not_rgb():
    with pytest.raises(InputError, match="mode L, expected RGB"):
        apply_view(NOISE.convert("L"), PLAIN, 16)


def test_check_pixels_passes_when_replay_is_exact():
    pixels = apply_view(NOISE, PLAIN, 16)
    check_pixels(pixels, pixel_crc(pixels), "k", 0, PIL.__version__)
    check_pixels(pixels[:, ::-1][:, ::-1], pixel_crc(pixels), "k", 0, PIL.__version__)  # layout does not matter


def test_check_pixels_names_versions_and_remedy_when_pillow_resizes_differently(monkeypatch):
    stored = pixel_crc(apply_view(NOISE, PLAIN, 16))
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, _resample: resize(self, size, Image.Resampling.LANCZOS)
    )
    with pytest.raises(MismatchError) as caught:
        check_pixels(apply_view(NOISE, PLAIN, 16), stored, "n01440764/n01440764_10026", 3, "9.5.0")
    message = str(caught.value)
    for part in ("'n01440764/n01440764_10026'", "view 3", f"{stored:08x} by Pillow 9.5.0",
                 f"by Pillow {PIL.__version__}", "install pillow==9.5.0", "materialised views"):  # fmt: skip
        assert part in message


def test_check_pixels_points_at_the_source_when_pillow_is_the_same():
    pixels = apply_view(NOISE, PLAIN, 16)
    with pytest.raises(MismatchError, match="source image or its decoding libraries changed"):
        check_pixels(pixels, pixel_crc(pixels) ^ 1, "k", 0, PIL.__version__)


def test_check_pixels_names_no_version_to_install_when_none_is_known():
    pixels = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(MismatchError, match="by Pillow of unknown version.*use the tars and environment") as caught:
        check_pixels(pixels, pixel_crc(pixels) ^ 1, "k", 0, None)
    assert "pillow==" not in str(caught.value)
