"""Responses sent in pieces, at the pace of the client's socket."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing
from traceback import clear_frames
from typing import Any, TypeVar

from anyio.to_thread import current_default_thread_limiter
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feature_store.client import frames
from feature_store.errors import UserError

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class StreamedResponse(Response):
    """A response of known length, sent piece by piece without copies.

    If a piece cannot be read, the connection is closed before Content-Length bytes were sent, so that no client takes
    what it got for the whole.

    Args:
        pieces: The bytes in order.
        nbytes: Their number, the response's Content-Length.
        status: HTTP status.
        headers: More headers.
        media_type: Content-Type.
        close: Called at the end in any case.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[memoryview],
        nbytes: int,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = frames.MEDIA_TYPE,
        close: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(None, status, {"Content-Length": str(nbytes), **(headers or {})}, media_type)
        self._pieces, self._close = pieces, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces until the client leaves; a HEAD request gets none."""
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if not scope.get("state", {}).get("head"):
                async with aclosing(self._pieces) as pieces:
                    async for piece in pieces:
                        for start in range(0, len(piece), frames.CHUNK_BYTES):
                            stop = start + frames.CHUNK_BYTES
                            await send({"type": "http.response.body", "body": piece[start:stop], "more_body": True})
                        del piece  # what was sent is memory for the next piece
                        await asyncio.sleep(0)  # a fast socket must not keep other requests waiting
                        if gone.done():
                            return
            await send({"type": "http.response.body", "body": b""})
        except (UserError, OSError) as error:
            _logger.warning("request %s was cut short: %s", scope.get("state", {}).get("request_id"), error)
            clear_frames(error.__traceback__)  # they hold the piece, in a cycle only the garbage collector would break
        finally:
            gone.cancel()
            if self._close is not None:
                self._close()


def frame_response(frame: frames.Frame, headers: Mapping[str, str] | None = None) -> StreamedResponse:
    """A frame that is in memory."""

    async def pieces() -> AsyncGenerator[memoryview]:
        for chunk in frame.chunks():
            yield memoryview(chunk)

    return StreamedResponse(pieces(), frame.nbytes, headers=headers)


async def read_ahead(readers: Iterable[Callable[[], memoryview]]) -> AsyncGenerator[memoryview]:
    """Pieces from blocking functions, each called in a thread while the piece before it is sent."""
    coming: asyncio.Task[memoryview] | None = None
    try:
        for reader in readers:
            piece = None if coming is None else await coming
            coming = asyncio.create_task(run_in_threadpool(reader))
            if piece is not None:
                yield piece
        if coming is not None:
            yield await coming
    finally:
        if coming is not None:
            await asyncio.wait([coming])  # what it reads from is closed next


async def in_thread(receive: Receive, function: Callable[..., T], *args: Any) -> T:
    """The result of a blocking function; it is not called if the client leaves before a thread is free.

    Raises:
        ClientDisconnect: The client has left.
    """
    work = run_in_threadpool(function, *args)
    if current_default_thread_limiter().available_tokens > 0:  # it starts at once, and a thread cannot be cancelled
        return await work
    return await unless_gone(receive, work)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: The client has left.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
