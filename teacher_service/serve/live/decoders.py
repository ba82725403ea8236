"""Decodes clients' images in processes that can be ended."""

import asyncio
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import anyio.to_thread
import numpy as np

from feature_store.errors import ImageError, ResourceError, UserError
from feature_store.processes import become_loader_worker, shielded_forkserver, usable_cpus
from feature_store.views import ViewParams, apply_view, decode_image, decoding_work, draw_view, view_policy

# The most work an image may be (64 Mpx, 20 scans, 64 MiB) takes some 4 s of a core.
CPU_SECONDS = 10.0
# Pixels an image is decoded at in a tenth of a second: small ones never wait for a larger one.
SMALL = 16_000_000


def view_of_image(body: bytes, size: tuple[int, int], max_pixels: int, crop: str | None, flip: bool) -> np.ndarray:
    """One view [1, H, W, 3]: the middle of the image as in evaluation, or the crop asked for."""
    image = decode_image(body, max_pixels=max_pixels)
    policy = view_policy("center", size)
    params = draw_view(policy, 0, "", 0, image.size)
    if crop is not None:
        params = ViewParams(_box(crop), False, (), (), params.erase, 0, policy.interpolation)
    if flip:
        params = ViewParams(params.crop, True, (), (), params.erase, 0, policy.interpolation)
    return apply_view(image, params, size)[None]


def _box(crop: str) -> tuple[int, int, int, int]:
    left, top, width, height = map(int, crop.split(","))
    return left, top, width, height


class ImageDecoders:
    """As many images at once as there are cores, and half as many large ones beside them, each in a process.

    A process is ended when its image takes too long or its request is cancelled; the next image gets a new one.

    Args:
        cores: Small images decoded at once; default the usable cores.
        cpu_seconds: Processor time an image may take.
    """

    def __init__(self, cores: int | None = None, cpu_seconds: float = CPU_SECONDS) -> None:
        cores = cores or usable_cpus()
        self._small, self._large = asyncio.Semaphore(cores), asyncio.Semaphore(max(1, cores // 2))
        self._cpu_seconds = cpu_seconds
        self._idle: list[Worker] = []

    async def view(
        self, body: bytes, size: tuple[int, int], *, max_pixels: int, crop: str | None, flip: bool
    ) -> np.ndarray:
        """See view_of_image; cancelling it ends the process that decodes.

        Raises:
            ImageError: It cannot be decoded, or not in the time an image may take.
            InputError: The crop is outside of the image.
            ResourceError: The process died.
        """
        work = await anyio.to_thread.run_sync(decoding_work, body, max_pixels)
        async with self._small if work <= SMALL else self._large:
            start = partial(Worker, view_of_image, self._cpu_seconds)
            worker = self._idle.pop() if self._idle else await anyio.to_thread.run_sync(start)
            try:
                call = partial(worker, body, size, max_pixels, crop, flip)
                return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
            except asyncio.CancelledError:
                worker.end()
                raise
            finally:
                if not worker.ended:
                    self._idle.append(worker)


class Worker:
    """A process that calls one function repeatedly; it ends with this object, or with the process that made it.

    Args:
        function: A function of a module.
        cpu_seconds: Processor time a call may take; the process ends when it takes more.

    Attributes:
        ended: Whether it cannot be called again.
    """

    def __init__(self, function: Callable[..., np.ndarray], cpu_seconds: float) -> None:
        context = shielded_forkserver([__name__])
        self.ended, self._seconds = False, cpu_seconds
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, function, cpu_seconds), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *arguments: object) -> np.ndarray:
        """Call the function.

        Raises:
            ImageError: It took too much processor time.
            ResourceError: The process died.
            UserError: The function's error.
        """
        try:
            self._connection.send(arguments)
            result = self._connection.recv()
        except (EOFError, OSError) as error:
            self.ended = True
            self._connection.close()
            self._process.join()
            if self._process.exitcode == -signal.SIGPROF:
                raise ImageError(f"image takes more than {self._seconds:g} s of a processor to decode") from error
            raise ResourceError(
                f"the process that decoded the image ended with code {self._process.exitcode}; usually memory ran out: "
                "try again, or send fewer images at once"
            ) from error
        if isinstance(result, UserError):
            raise result
        return result

    def end(self) -> None:
        """End the process now; a call under way ends with an error."""
        self.ended = True
        self._process.kill()


def _work(calls: Connection, function: Callable[..., np.ndarray], cpu_seconds: float) -> None:
    become_loader_worker()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, in the middle of a decoder too
    while True:
        try:
            arguments = calls.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            result = function(*arguments)
        except UserError as error:
            result = error
        except MemoryError:
            result = ResourceError("memory ran out while the image was decoded; send fewer images at once")
        signal.setitimer(signal.ITIMER_PROF, 0)
        calls.send(result)
