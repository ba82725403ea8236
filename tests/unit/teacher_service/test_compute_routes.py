"""The live teacher's routes: features of images and of views, refusals, and readiness."""

import asyncio
import io
import threading

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from tiny_jobs import encode_image, noise

from feature_store.client import frames
from feature_store.errors import ResourceError
from feature_store.teacher.model import load_teacher
from feature_store.views import apply_view, draw_view, view_policy
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.live.batcher import DeviceFaultError
from teacher_service.serve.live.teacher import Batching, LiveTeacher, TeacherModel
from teacher_service.serve.routes.compute import compute_router
from teacher_service.serve.service import Service

FRAME = {"content-type": frames.MEDIA_TYPE}


@pytest.fixture(scope="module")
def teacher(tiny_vit):
    return load_teacher(tiny_vit.name, checkpoint=tiny_vit.checkpoint, model_kwargs=tiny_vit.model_kwargs)


@pytest.fixture
def live(teacher):
    live = LiveTeacher(lambda: teacher, Batching(max_rows=4, max_wait=0.0, queue_rows=16)).start(wait=True)
    yield live
    live.close(10)


@pytest.fixture
def client(live):
    app = FastAPI()
    app.include_router(compute_router(live, max_pixels=10_000))
    return TestClient(app)


def frame(**arrays: np.ndarray) -> bytes:
    return b"".join(frames.encode(arrays).chunks())


def views(count: int, size: int = 32) -> np.ndarray:
    return np.stack([noise(size, size, seed) for seed in range(count)])


def test_features_are_the_teachers_when_views_are_sent(client, teacher):
    pixels = views(6)
    answer = client.post("/v1/features:compute?dtype=f32", content=frame(pixels=pixels), headers=FRAME)
    arrays, metadata = frames.decode(answer.content)
    expected = teacher(torch.from_numpy(pixels))
    assert arrays.keys() == {"stage4", "stage3_prefix", "logits"}
    for name, tap in (*((n, expected.taps[n]) for n in ("stage4", "stage3_prefix")), ("logits", expected.logits)):
        np.testing.assert_allclose(arrays[name], tap.numpy(), rtol=1e-3, atol=1e-4)
    assert metadata["teacher"] == teacher.info.weights_sha256
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_features_are_half_precision_and_of_one_tap_when_asked_so(client):
    answer = client.post("/v1/features:compute?taps=stage4", content=frame(pixels=views(1)), headers=FRAME)
    arrays, _ = frames.decode(answer.content)
    assert {name: array.dtype for name, array in arrays.items()} == {"stage4": np.float16, "logits": np.float16}


@pytest.mark.parametrize(
    ("query", "change"),
    [("", {}), ("&flip=true", {"flip": True}), ("&crop=3,5,20,30", {"crop": (3, 5, 20, 30)})],
)
def test_view_is_the_middle_or_the_one_asked_for_when_an_image_is_sent(client, teacher, query, change):
    pixels = noise(40, 48)
    image = Image.fromarray(pixels)
    params = draw_view(view_policy("center", 32), 0, "", 0, image.size)
    view = apply_view(image, type(params)(**{**params.__dict__, **change}), 32)
    answer = client.post(
        f"/v1/features:compute?dtype=f32{query}", content=encode_image(pixels), headers={"content-type": "image/png"}
    )
    arrays, _ = frames.decode(answer.content)
    expected = teacher(torch.from_numpy(view[None]))
    np.testing.assert_allclose(arrays["stage4"], expected.taps["stage4"].numpy(), rtol=1e-3, atol=1e-4)


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (2000, 2000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("query", "body", "headers", "reason"),
    [
        ("", bomb(), {"content-type": "image/png"}, "at most 10,000 are accepted"),
        ("", b"hello", {"content-type": "image/jpeg"}, "not an image"),
        ("", frame(other=views(1)), FRAME, "the frame holds other"),
        ("", frame(pixels=views(1, 31)), FRAME, r"got uint8 \[1, 31, 31, 3\]"),
        ("", frame(pixels=views(1).astype(np.float32)), FRAME, "got float32"),
        ("", frame(pixels=views(17)), FRAME, "at most 16 are taken at once"),
        ("?crop=0,0,5,5", frame(pixels=views(1)), FRAME, "crop and flip are of images"),
        ("?flip=true", frame(pixels=views(1)), FRAME, "crop and flip are of images"),
        ("?crop=0,0,4000,3", encode_image(noise(40, 48)), {"content-type": "image/png"}, "does not fit an image"),
    ],
)
def test_request_is_refused_when_its_body_cannot_be_used(client, query, body, headers, reason):
    with pytest.raises(Exception, match=reason) as refused:
        client.post(f"/v1/features:compute{query}", content=body, headers=headers)
    assert refused.type.__module__ == "feature_store.errors"


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {}])
def test_request_is_refused_when_its_body_has_another_type(client, headers):
    answer = client.post("/v1/features:compute", content=b"hello", headers=headers)
    assert answer.status_code == 415
    assert "expected an image or a frame" in answer.text


def test_request_is_refused_when_its_tap_is_unknown(client):
    answer = client.post("/v1/features:compute?taps=stage9", content=frame(pixels=views(1)), headers=FRAME)
    assert answer.status_code == 404
    assert "no tap 'stage9'; it has: stage4, stage3_prefix" in answer.text


def test_smallest_image_is_computed_when_it_has_one_pixel(client):
    body = encode_image(np.zeros((1, 1, 3), np.uint8))
    answer = client.post("/v1/features:compute", content=body, headers={"content-type": "image/png"})
    assert np.isfinite(frames.decode(answer.content)[0]["logits"]).all()


def test_teacher_is_described_when_asked(client, teacher):
    answer = client.get("/v1/teacher").json()
    assert answer["teacher"]["weights_sha256"] == teacher.info.weights_sha256
    assert answer["taps"]["stage4"] == list(teacher.tap_shapes["stage4"])
    assert answer["max_rows"] == 16


def test_live_teacher_says_why_when_it_is_not_ready(teacher):
    gate = threading.Event()

    def load():
        assert gate.wait(10)
        return teacher

    live = LiveTeacher(load).start()
    assert live.not_ready == "the teacher is loading"
    with pytest.raises(ResourceError, match="the teacher is loading; try again later"):
        live.batcher  # noqa: B018
    gate.set()
    live._thread.join(10)
    assert live.not_ready == ""
    live.close(10)


@pytest.mark.parametrize("error", [ResourceError("no weights"), ValueError("no weights")])
def test_live_teacher_says_why_when_it_cannot_be_loaded(error):
    def load():
        raise error

    live = LiveTeacher(load).start(wait=True)
    assert "the teacher cannot be loaded" in live.not_ready
    assert "no weights" in live.not_ready
    assert live.close()


def test_service_ends_at_once_when_told_so_while_its_teacher_loads():
    may_end = threading.Event()
    live = LiveTeacher(lambda: may_end.wait(30))
    service = Service(ServeConfig(store="nowhere"), live)
    service.load = lambda: None

    async def told_to_end() -> None:
        task = asyncio.create_task(service.run(lambda: None))
        while not live.loading:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(told_to_end())  # which waits for its threads
    assert live.loading
    may_end.set()


class Lost(torch.nn.Module):
    """A teacher whose device fails at every call."""

    def __init__(self, teacher) -> None:
        super().__init__()
        self.split, self.tap_shapes, self.weight = teacher.split, teacher.tap_shapes, torch.nn.Parameter()

    def forward(self, pixels, taps=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with...")


def test_device_is_called_lost_only_when_it_fails_again(teacher, monkeypatch):
    model = TeacherModel(Lost(teacher))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        model(views(1))
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: model.teacher(None))
    with pytest.raises(DeviceFaultError, match=r"cpu is lost \(CUDA error: an illegal memory access .*; restart"):
        model(views(1))


def test_out_of_memory_is_no_fault_when_the_batch_was_too_large(teacher, monkeypatch):
    model = TeacherModel(Lost(teacher))

    def forward(pixels, taps):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(model.teacher, "forward", forward)
    with pytest.raises(ResourceError, match="ran out of memory for 1 views") as error:
        model(views(1))
    assert not isinstance(error.value, DeviceFaultError)
