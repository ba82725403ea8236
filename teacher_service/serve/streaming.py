"""Answers of known length whose bytes are read while they are sent."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import aclosing
from traceback import clear_frames
from typing import Any, TypeAlias, TypeVar

from anyio.to_thread import current_default_thread_limiter
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from feature_store.client.frames import CHUNK_BYTES
from feature_store.errors import UserError
from feature_store.read.page_cache import FileSpan
from teacher_service.serve.sendfile import FILES

_logger = logging.getLogger(__name__)

T = TypeVar("T")
Reader: TypeAlias = Callable[[], memoryview]
Piece: TypeAlias = memoryview | list[FileSpan]
"""Bytes, or where files have them; those only for a server that sends files, see FILES."""


def nothing() -> None:
    """Does nothing."""


class StreamedResponse(Response):
    """Pieces of an answer, sent as they come.

    If one fails to come, the answer ends before its Content-Length and the connection is closed: no client can take
    what it got for the whole.

    Args:
        pieces: The bytes in order.
        status: HTTP status.
        headers: Content-Length among them.
        media_type: Content-Type.
        failed: Called if a piece failed to come.
        close: Called in the end, whatever happened.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[Piece],
        *,
        status: int = 200,
        headers: Mapping[str, str],
        media_type: str,
        failed: Callable[[], None] = nothing,
        close: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(None, status, headers, media_type)
        self._pieces, self._failed, self._close = pieces, failed, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them at the socket's pace, as long as somebody is there; a HEAD gets none."""
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if not scope.get("state", {}).get("head"):
                async with aclosing(self._pieces) as pieces:
                    async for piece in pieces:
                        for message in _messages(piece):
                            await send(message)
                        await asyncio.sleep(0)  # a socket that takes all there is would keep others waiting
                        if gone.done():
                            return
            await send({"type": "http.response.body", "body": b""})
        except (UserError, OSError, EOFError) as error:
            _logger.warning("request %s was cut short: %s", scope.get("state", {}).get("request_id"), error)
            clear_frames(error.__traceback__)  # they hold the piece, in a circle only the garbage collector would break
            self._failed()
        finally:
            gone.cancel()
            self._close()


def _messages(piece: Piece) -> Iterator[Message]:
    if isinstance(piece, list):
        yield {"type": FILES, "spans": piece}
        return
    for start in range(0, len(piece), CHUNK_BYTES):
        yield {"type": "http.response.body", "body": piece[start : start + CHUNK_BYTES], "more_body": True}


async def read_ahead(readers: Iterable[Reader]) -> AsyncGenerator[memoryview]:
    """Pieces from functions that block, each called in a thread while the piece before is sent."""
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
            await asyncio.wait([coming])  # it reads from what is closed next


async def in_thread(receive: Receive, function: Callable[..., T], *args: Any) -> T:
    """What a function gives that blocks; not called if the client leaves before a thread is free.

    Raises:
        ClientDisconnect: It has left.
    """
    work = run_in_threadpool(function, *args)
    free = (
        current_default_thread_limiter().available_tokens > 0
    )  # then there is nothing to watch: threads run to an end
    return await (work if free else unless_gone(receive, work))


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; cancels it when the client leaves.

    Raises:
        ClientDisconnect: It has left.
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
