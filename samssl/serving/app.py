"""The server as an ASGI application.

    POST /predict    a scan (.nii, .nii.gz, PNG) as the body or the one file of a form -> its mask
    GET /labels      class id to name, and the limits
    GET /health      whether it answers
    GET /            the page that shows both

`?volume=` and `?modality=` of `/predict` are those of `samssl predict`. Where classes overlap, the answer is
a zip of one mask a class. The header `Samssl-Prediction` holds, as JSON, warnings, uncertainty and volumes.
Refusals are JSON: `{"error": sentence}`. Nothing is logged of a request but which error in this program
ended it.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from samssl.config import ConfigError, overridden
from samssl.data.classes import Classes
from samssl.serving.segmenting import Answer, unexpected
from samssl.serving.settings import ServeConfig
from samssl.serving.uploads import Refusal, receive_scan

Segment = Callable[[Path, ServeConfig], Awaitable[Answer]]
"""As `samssl.serving.segmenting.Segmenter.segment`, here or elsewhere."""

FOLDER = Path(__file__).parent
PAGES = {
    "/": "page.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/niivue.js": "niivue.js",
    "/niivue.licence.txt": "niivue.licence.txt",
}
CHOICES = ("volume", "modality")
"""Settings that a request may choose."""
ABOUT = "Samssl-Prediction"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(segment: Segment, classes: Classes, config: ServeConfig, folder: Path) -> Starlette:
    """The application; uploads lie below `folder` until they are answered."""
    places = threading.BoundedSemaphore(config.max_requests)

    async def predict(request: Request) -> Response:
        with _place(places), TemporaryDirectory(dir=folder) as own:
            return _mask(await _predict(request, segment, config, Path(own)))

    async def labels(request: Request) -> Response:
        limits = {
            "max_megabytes": config.max_megabytes,
            "max_megavoxels": config.max_megavoxels,
            "timeout_s": config.timeout_s,
        }
        return JSONResponse({"labels": classes.names, "overlapping": classes.overlapping, "limits": limits})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def page(request: Request) -> Response:
        return FileResponse(FOLDER / PAGES[request.url.path])

    return Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/labels", labels),
            Route("/health", health),
            *(Route(path, page) for path in PAGES),
        ],
        exception_handlers={Refusal: _refuse, HTTPException: _refuse_as_starlette},
        middleware=[Middleware(Guard, hosts=_hosts(config))],
    )


@contextmanager
def _place(places: threading.BoundedSemaphore) -> Iterator[None]:
    if not places.acquire(blocking=False):
        raise Refusal(503, "The server has as many scans as it takes at once. Try again in a moment.")
    try:
        yield
    finally:
        places.release()


async def _predict(request: Request, segment: Segment, config: ServeConfig, folder: Path) -> Answer:
    settings = _chosen(request, config)
    path = None
    try:
        async with asyncio.timeout(config.timeout_s):
            path = await receive_scan(request, folder, config.max_bytes)
            return await _while_connected(request, segment(path, settings))
    except TimeoutError:
        late = "Segmenting the scan, and those before it," if path else "The upload"
        raise Refusal(
            503 if path else 408, f"{late} took longer than the {config.timeout_s:g} s that are allowed."
        ) from None
    except Refusal:
        raise
    except Exception as error:
        raise unexpected(error) from None


async def _while_connected(request: Request, answer: Awaitable[Answer]) -> Answer:
    """The answer, unless whoever asked has gone."""
    asked = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())  # after the body nothing else comes
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise Refusal(400, "The request was given up.")
        return asked.result()
    finally:
        asked.cancel()
        gone.cancel()


def _chosen(request: Request, config: ServeConfig) -> ServeConfig:
    unknown = [name for name in request.query_params if name not in CHOICES]
    if unknown:
        raise Refusal(400, f"A request can choose {' and '.join(CHOICES)}, and nothing else.")
    try:
        return overridden(config, dict(request.query_params), "the request")
    except ConfigError as error:
        raise Refusal(400, str(error)) from None


def _mask(answer: Answer) -> Response:
    headers = {
        "Content-Disposition": f'attachment; filename="{answer.name}"',
        ABOUT: json.dumps(answer.about),
    }
    return Response(answer.content, media_type=answer.media, headers=headers)


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    again = {"Retry-After": "5"} if error.status == 503 else None
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=again)


def _refuse_as_starlette(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    known = "POST /predict, GET /labels, GET /health, GET /"
    sentence = f"{error.detail}. This server has {known}."
    return JSONResponse({"error": sentence}, status_code=error.status_code, headers=error.headers)


def _hosts(config: ServeConfig) -> frozenset[str] | None:
    """Names by which the server may be called; None: any, where others are to reach it.

    A page elsewhere whose name is made to lead to this machine calls the server by that other name.
    """
    return frozenset({"127.0.0.1", "localhost", "::1", config.host}) if config.local else None


class Guard:
    """Refuses what other sites' pages send, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        foreign = self._foreign(Request(scope))
        answer = JSONResponse({"error": foreign}, status_code=403) if foreign else self.app
        await answer(scope, receive, with_headers)

    def _foreign(self, request: Request) -> str | None:
        """What is wrong with where a request says that it goes to and comes from."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
            return "The server answers to this machine's own names only: call it by 127.0.0.1 or localhost."
        if origin is not None and urlsplit(origin).netloc != host:
            return "Pages of other sites may not use this server."
        return None
