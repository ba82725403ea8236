"""Bytes of files that the kernel hands to the socket, without passing through this process.

An application sends them by the message ``{"type": FILES, "spans": [...]}`` where ``scope["extensions"]`` has FILES: as
ASGI's zero copy send, but many spans at once, since a row is small for a message of its own.
"""

import asyncio
import os
from collections.abc import Sequence

from feature_store.read.page_cache import FileSpan

FILES = "http.response.files"


async def send_spans(connection: int, spans: Sequence[FileSpan], gone: asyncio.Future[None]) -> None:
    """Send them in order, at the socket's pace.

    Args:
        connection: Descriptor of a socket that does not block.
        spans: What to send.
        gone: Done when nobody is there any more; what is left is not sent then.

    Raises:
        ConnectionError: The peer has left.
        EOFError: A file ends before its span.
    """
    for file, offset, nbytes in spans:
        end = offset + nbytes
        while offset < end:
            try:
                sent = os.sendfile(connection, file.descriptor, offset, end - offset)
            except BlockingIOError:
                await _writable(connection, gone)
                if gone.done():
                    return
                continue
            if not sent:
                raise EOFError(f"a file ends at byte {offset}, expected {end}")
            offset += sent


async def _writable(connection: int, gone: asyncio.Future[None]) -> None:
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()
    loop.add_writer(connection, _finish, writable)
    try:
        await asyncio.wait((writable, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_writer(connection)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():  # a socket may be writable twice before it is looked at
        future.set_result(None)
