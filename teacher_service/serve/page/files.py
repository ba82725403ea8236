"""Static files of the page at ``/``."""

from importlib import resources

from fastapi.responses import Response

from teacher_service.serve.routing import Routes

FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript", "/icon.svg": "image/svg+xml"}
"""Public: they hold nothing of the store, which the page requests from the API with the visitor's token."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router() -> Routes:
    """The routes."""
    router = Routes()
    for path, kind in FILES.items():
        router.declare("GET", path, None, include_in_schema=False, response_class=Response)(_answer(path, kind))
    return router


def _answer(path: str, kind: str):
    name = path.removeprefix("/") or "index.html"
    content = (resources.files("teacher_service.serve.page") / "static" / name).read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer
