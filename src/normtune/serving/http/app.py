"""The HTTP application: OpenAI's routes, adapters, uploads, metrics, and the web page.

    app = make_app(engine, Settings(base="nano"))

Requests pass `normtune.serving.http.middleware` first; `normtune.serving.http.server` runs the application.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, File, Form, Query, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Match, Route
from starlette.types import Scope

from normtune import __version__
from normtune.adapters.info import NOTICE
from normtune.errors import InputError, did_you_mean
from normtune.serving.engine.requests import Busy, Closed, NameTaken, UnknownAdapter
from normtune.serving.http import batch, openai_api, openapi, paths
from normtune.serving.http.chat import StreamedResponse, completion_events, submit_request, wait_for_reply
from normtune.serving.http.errors import RequestRefused, remove_paths, to_refusal
from normtune.serving.http.middleware import COOKIE, RequestGate
from normtune.serving.http.openapi import error_responses
from normtune.serving.http.prometheus import CONTENT_TYPE, ServerMetrics
from normtune.serving.http.state import Service, Settings
from normtune.serving.http.uploads import Upload, png_bytes, read_upload, render

if TYPE_CHECKING:
    from normtune.data.images.dicom import GreyFrame
    from normtune.serving.engine.engine import Engine

_PURPOSES = ("vision", "user_data", "assistants")  # OpenAI's upload purposes that are accepted
_HTTP_MESSAGES = {404: "this URL does not exist.", 405: "this URL does not support that method."}
# Content-Security-Policy of the web page: its own files and images that it created; nothing from other hosts.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A review page contains all it needs, so that a sandbox can keep its scripts away from the server.
_REVIEW_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# URL path: (file in serving/page, media type)
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/viewer.js": ("viewer.js", "text/javascript"),
    "/example.png": ("example.png", "image/png"),
}


def make_app(engine: Engine, settings: Settings) -> RequestGate:
    """Return the ASGI application of an engine.

    At shutdown it answers all accepted requests and closes the engine.
    """
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = openapi.DocumentedApp(
        keys=bool(settings.keys),
        title="Normtune",
        description=NOTICE,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages would load scripts from a CDN
        redoc_url=None,
    )
    metrics = ServerMetrics(service)
    _add_error_handlers(app)
    _add_models(app, service)
    _add_chat(app, service)
    _add_files(app, service)
    _add_adapters(app, service)
    _add_status(app, service, metrics)
    _add_pages(app, service)
    return RequestGate(app, service, metrics)


def _owner(request: HttpRequest) -> str:
    return str(request.state.owner)


def _allowed_methods(app: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of all routes that match a path; Starlette returns the methods of the first route only."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    partial = [route for route in routes if route.matches(scope)[0] is Match.PARTIAL]
    methods = {method for route in partial for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)  # `RequestGate` passes HEAD on as GET


def _add_error_handlers(app: FastAPI) -> None:
    """Convert every exception to OpenAI's error object with one sentence."""

    async def known(_: HttpRequest, error: Exception) -> Response:
        return to_refusal(error).response()

    async def invalid(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if any(detail["type"] == "json_invalid" for detail in error.errors()):
            return RequestRefused(400, "the body is not JSON.").response()
        field, sentence = openai_api.validation_message(error.errors(), skip=1)
        return RequestRefused(400, sentence, param=field or None).response()

    async def http(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        allow = {"Allow": ", ".join(_allowed_methods(app, request.scope))} if status == 405 else {}
        return RequestRefused(status, _HTTP_MESSAGES.get(status, "the request is malformed.")).response(**allow)

    async def unknown(_: HttpRequest, __: Exception) -> Response:
        return RequestRefused(500, "the server failed on this request. See its log.").response()

    for kind in (RequestRefused, InputError, Busy, Closed, TimeoutError, ClientDisconnect):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)  # RequestGate logs it


def _add_models(app: FastAPI, service: Service) -> None:
    base = service.settings.base

    def entries() -> dict[str, dict[str, Any]]:
        adapters = {
            adapter.name: openai_api.model_entry(adapter.name, service.started, adapter)
            for adapter in service.engine.adapters()
        }
        return {base: openai_api.model_entry(base, service.started), **adapters}

    @app.get("/v1/models", response_model=openapi.ModelList, response_model_exclude_none=True)
    async def list_models() -> dict[str, Any]:
        """List the base and its adapters as models."""
        return {"object": "list", "data": list(entries().values())}

    @app.get(
        "/v1/models/{model:path}",
        response_model=openapi.ModelEntry,
        response_model_exclude_none=True,
        responses=error_responses(404),
    )
    async def get_model(model: str) -> dict[str, Any]:
        """Return one model."""
        entry = entries().get(model)
        if entry is None:
            raise RequestRefused(404, "no such model.", code="model_not_found", param="model")
        return entry


def _add_chat(app: FastAPI, service: Service) -> None:
    seconds = service.limits.request_s

    def check_model(name: str) -> None:
        if service.serves(name):
            return
        known = [service.settings.base, *(adapter.name for adapter in service.engine.adapters())]
        raise RequestRefused(
            404,
            f"no such model{did_you_mean(name, known) or '.'} /v1/models lists all models.",
            code="model_not_found",
            param="model",
        )

    @app.post("/v1/chat/completions", responses=openapi.COMPLETION_RESPONSE | error_responses(400, 404, 503, 504))
    async def chat(body: openai_api.ChatRequest, request: HttpRequest) -> Response:
        """Answer a question about the images of a study; without a question, write a report."""
        check_model(body.model)
        async with AsyncExitStack() as stack:
            question = await stack.enter_async_context(submit_request(service, _owner(request), body))
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                chunks = completion_events(question, usage=usage, seconds=seconds)
                return StreamedResponse(chunks, "text/event-stream", stack.pop_all())
            reply = await wait_for_reply(question, request.receive, seconds)
            return JSONResponse(openai_api.completion(question.id, question.model, reply, question.windows))

    @app.post(
        "/v1/batch",
        response_class=Response,
        responses=openapi.BATCH_RESPONSE | error_responses(400, 404),
        openapi_extra=openapi.BATCH_REQUEST,
    )
    async def answer_batch(request: HttpRequest) -> Response:
        """Answer a JSONL of questions: one line for each, in their order, streamed."""
        data = await request.body()
        rows = await service.run_in_decoder(batch.read_rows, data, service.limits.batch_rows)
        for name in sorted({row.body.model for row in rows}):
            check_model(name)
        return StreamedResponse(batch.answer_rows(service, _owner(request), rows), "application/jsonl")


def _file_entry(upload: Upload) -> dict[str, Any]:
    created_at = int(upload.created_at)
    entry = {"id": upload.id, "object": "file", "bytes": len(upload.png), "created_at": created_at}
    size = {"width": upload.width, "height": upload.height}
    grey = {"window": upload.grey.window, "value_range": upload.grey.range} if upload.grey else {}
    return entry | {"filename": "image.png", "purpose": "vision", "status": "processed"} | size | grey


def _add_files(app: FastAPI, service: Service) -> None:
    def decode(data: bytes) -> tuple[bytes, int, int, GreyFrame | None]:
        image, grey = read_upload(data, max_pixels=service.limits.pixels)
        return png_bytes(image), image.width, image.height, grey

    @app.post(
        "/v1/files",
        response_model=openapi.FileEntry,
        responses=error_responses(400),
        openapi_extra=openapi.UPLOAD_REQUEST,
    )
    async def upload_file(
        request: HttpRequest,
        file: Annotated[UploadFile, File(description="PNG, JPEG, WebP or DICOM.")],
        purpose: Annotated[str, Form(max_length=64, json_schema_extra={"enum": [*_PURPOSES, ""]})] = "vision",
    ) -> dict[str, Any]:
        """Upload an image for later questions. Only its pixels are stored, and not its name."""
        if purpose not in _PURPOSES:
            raise RequestRefused(400, "only images can be uploaded: set purpose=vision.", param="purpose")
        decoded = await service.run_in_decoder(decode, await file.read())
        return _file_entry(service.uploads.add(_owner(request), *decoded))

    @app.get("/v1/files", response_model=openapi.FileList)
    async def list_files(request: HttpRequest) -> dict[str, Any]:
        """List the images that were uploaded with this key."""
        data = [_file_entry(upload) for upload in service.uploads.list_for(_owner(request))]
        # Without has_more, OpenAI's client would request another page.
        return {"object": "list", "data": data, "has_more": False}

    @app.get("/v1/files/{id}", response_model=openapi.FileEntry, responses=error_responses(404))
    async def get_file(id: str, request: HttpRequest) -> dict[str, Any]:
        """Return the description of an uploaded image."""
        return _file_entry(service.uploads.get(_owner(request), id))

    @app.get(
        "/v1/files/{id}/content", response_class=Response, responses=openapi.PNG_RESPONSE | error_responses(400, 404)
    )
    async def get_file_content(
        id: str, request: HttpRequest, window: Annotated[openai_api.Window | None, Query()] = None
    ) -> Response:
        """Return an uploaded image as PNG, with the pixels that the model sees; of DICOM, with a window."""
        upload = service.uploads.get(_owner(request), id)
        if window is None:
            return Response(upload.png, media_type="image/png")
        png = await service.run_in_decoder(lambda: png_bytes(render(upload.grey, (window[0], window[1]))))
        return Response(png, media_type="image/png")

    @app.delete("/v1/files/{id}", response_model=openapi.Deleted, responses=error_responses(404))
    async def delete_file(id: str, request: HttpRequest) -> dict[str, Any]:
        """Delete an uploaded image."""
        service.uploads.remove(_owner(request), id)
        return {"id": id, "object": "file", "deleted": True}


def _add_adapters(app: FastAPI, service: Service) -> None:
    root = service.settings.adapter_root

    @app.get("/v1/adapters", response_model=openapi.AdapterList)
    async def list_adapters() -> dict[str, Any]:
        """List the registered adapters."""
        return {"object": "list", "data": [openai_api.adapter_entry(adapter) for adapter in service.engine.adapters()]}

    @app.post(
        "/v1/adapters",
        status_code=201,
        response_model=openapi.AdapterEntry,
        responses=openapi.REPLACED_RESPONSE | error_responses(400, 403, 404, 409),
    )
    async def register_adapter(body: openai_api.Registration, response: Response) -> dict[str, Any]:
        """Register an adapter from a folder below the adapter root, or one with changed files again (200)."""
        folder = paths.adapter_folder(root, body.folder or body.name)
        if body.name == service.settings.base:
            raise RequestRefused(409, "the base has that name. Choose another name.")
        response.status_code = 200 if service.engine.has_adapter(body.name) else 201
        try:
            info = await service.run_in_decoder(service.engine.register, body.name, folder)
        except NameTaken:
            raise
        except InputError as error:
            raise RequestRefused(400, remove_paths(str(error), [folder] + ([root] if root else []))) from None
        return openai_api.adapter_entry(info)

    @app.delete("/v1/adapters/{name}", response_model=openapi.Deleted, responses=error_responses(403, 404))
    async def remove_adapter(name: str) -> dict[str, Any]:
        """Remove an adapter. Its files stay, and requests that were accepted before are still answered."""
        if root is None:
            raise RequestRefused(403, "this server does not remove adapters. Start it with --adapter-root.")
        try:
            await service.run_in_decoder(service.engine.remove, name)
        except UnknownAdapter:
            raise RequestRefused(404, "no such adapter.", code="model_not_found") from None
        return {"id": name, "object": "adapter", "deleted": True}


def _add_status(app: FastAPI, service: Service, server_metrics: ServerMetrics) -> None:
    @app.get("/healthz", response_model=openapi.Health, responses=error_responses(503))
    async def healthz() -> dict[str, Any]:
        """Check that the server can answer requests."""
        if service.engine.failed:
            raise RequestRefused(503, "the accelerator failed. The server must be started again.", retry_after=30)
        return {"status": "ok", "model": service.settings.base, "notice": NOTICE}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return counts, sizes and durations in Prometheus' format."""
        return Response(server_metrics.text(), media_type=CONTENT_TYPE)

    @app.post("/v1/session", status_code=204)
    async def open_session(request: HttpRequest) -> Response:
        """Set a cookie with which a browser can open links to review pages, and nothing else."""
        response = Response(status_code=204)
        key = request.headers.get("authorization", "").partition(" ")[2].strip()
        if service.settings.keys:
            response.set_cookie(
                COOKIE,
                service.settings.keys.cookie(key),
                path="/reviews",
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
            )
        return response


def _add_pages(app: FastAPI, service: Service) -> None:
    """Add the routes of the web page at `/` and of the review pages below `/reviews`."""
    for path, (name, media_type) in _FILES.items():
        app.add_api_route(path, _page_file(name, media_type), include_in_schema=False)
    folder = service.settings.reviews

    @app.get("/v1/reviews", response_model=openapi.ReviewList)
    async def list_reviews() -> dict[str, Any]:
        """List the names of the review pages."""
        return {"object": "list", "data": paths.review_names(folder)}

    @app.get("/reviews/{name}", include_in_schema=False)
    async def review(name: str) -> Response:
        content = paths.review_page(folder, name).read_bytes()
        return Response(content, media_type="text/html", headers={"content-security-policy": _REVIEW_POLICY})


def _page_file(name: str, media_type: str) -> Any:
    content = files("normtune.serving").joinpath("page", name).read_bytes()

    async def page() -> Response:
        headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
        return Response(content, media_type=media_type, headers=headers)

    return page
