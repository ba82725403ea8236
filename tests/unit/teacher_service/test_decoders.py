"""Clients' images are decoded in processes: bounded in processor time, ended with their request, small ones first."""

import asyncio
import io
import os

import numpy as np
import pytest
from PIL import Image
from tiny_jobs import encode_image, noise

from feature_store.errors import ImageError, InputError, ResourceError
from feature_store.views import decode_image, decoding_work
from teacher_service.serve.live.decoders import ImageDecoders, Worker, view_of_image

IMAGE = encode_image(noise(40, 48))


def view(decoders, body=IMAGE, crop=None):
    return decoders.view(body, (32, 32), max_pixels=64_000_000, crop=crop, flip=False)


def large_image():
    """63 Mpx, a second of a processor."""
    file = io.BytesIO()
    Image.new("RGB", (8000, 7900)).save(file, "JPEG", progressive=True, quality=1)
    return file.getvalue()


def test_view_is_the_one_decoded_here_when_a_process_decodes():
    async def run():
        decoders = ImageDecoders(2)
        return await asyncio.gather(*(view(decoders, crop=crop) for crop in (None, "3,5,20,30")))

    for got, crop in zip(asyncio.run(run()), (None, "3,5,20,30"), strict=True):
        np.testing.assert_array_equal(got, view_of_image(IMAGE, (32, 32), 64_000_000, crop, False))


def test_process_goes_on_when_an_image_cannot_be_decoded():
    async def run():
        decoders = ImageDecoders(1)
        with pytest.raises(ImageError, match="image is empty"):
            await view(decoders, b"")
        with pytest.raises(InputError):
            await view(decoders, crop="300,300,5,5")
        return await view(decoders)

    assert asyncio.run(run()).shape == (1, 32, 32, 3)


def test_call_is_an_image_error_when_it_takes_more_processor_time_than_it_may():
    worker = Worker(sum, 0.5)
    assert worker(range(10)) == 45
    with pytest.raises(ImageError, match=r"more than 0\.5 s of a processor to decode"):
        worker(range(10**12))
    assert worker.ended


def test_call_may_take_its_time_again_when_the_ones_before_took_theirs():
    worker = Worker(sum, 2)
    for _ in range(12):
        worker(range(10_000_000))  # 0.2 to 0.4 s


def test_call_is_a_resource_error_when_its_process_dies():
    worker = Worker(os._exit, 10)
    with pytest.raises(ResourceError, match="ended with code 9"):
        worker(9)
    assert worker.ended


def test_process_is_ended_and_its_place_free_when_the_request_is_cancelled():
    async def run():
        decoders = ImageDecoders(2)  # of which one may be large
        large = large_image()
        for _ in range(3):
            decoding = asyncio.ensure_future(view(decoders, large))
            await asyncio.sleep(0.2)
            decoding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await decoding
        return await view(decoders)

    assert asyncio.run(run()).shape == (1, 32, 32, 3)


def test_small_images_do_not_wait_when_large_ones_are_decoded():
    async def run():
        decoders = ImageDecoders(2)
        large = large_image()
        waiting = [asyncio.ensure_future(view(decoders, large)) for _ in range(4)]
        await asyncio.sleep(0.2)
        small = await view(decoders)
        done = sum(each.done() for each in waiting)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return small, done

    small, done = asyncio.run(run())
    assert small.shape == (1, 32, 32, 3)
    assert done < 4


def test_work_counts_the_scans_of_a_progressive_jpeg():
    file = io.BytesIO()
    Image.new("RGB", (100, 50)).save(file, "JPEG", progressive=True)
    assert decoding_work(file.getvalue()) == 5000 * file.getvalue().count(b"\xff\xda")
    assert decoding_work(IMAGE) == 40 * 48 == np.prod(decode_image(IMAGE).size)
    assert decoding_work(b"no image") == 0
