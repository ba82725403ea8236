"""HEAD requests, answered as GET without the body."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Asks the application for GET and ends the answer after its headers.

    Args:
        app: The routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        # A copy: the server drops the body by the method in its own scope.
        asked = {**scope, "method": "GET", "state": {**scope["state"], "head": True}}
        try:
            await self._app(asked, receive, send_headers)
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]
