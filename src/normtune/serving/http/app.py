"""The HTTP server's application: OpenAI's addresses, adapters, uploads, metrics, and the page.

    app = make_app(engine, Settings(base="nano"))

`normtune.serving.http.middleware` stands before it; `normtune.serving.http.server` runs it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Match, Route
from starlette.types import Scope

from normtune import __version__
from normtune.adapters.info import NOTICE
from normtune.errors import InputError, did_you_mean
from normtune.serving.engine.requests import Busy, Closed, UnknownAdapter
from normtune.serving.http import batch, openai_api, openapi, paths
from normtune.serving.http.chat import events, parse_request, reply_in_time
from normtune.serving.http.errors import ClientGone, RequestRefused, refusal, without_paths
from normtune.serving.http.middleware import COOKIE, RequestGate
from normtune.serving.http.openapi import refusals
from normtune.serving.http.pages import add_pages
from normtune.serving.http.prometheus import CONTENT_TYPE, exposition
from normtune.serving.http.state import EngineProtocol, Service, Settings
from normtune.serving.http.streaming import Streamed
from normtune.serving.http.uploads import Upload, open_upload, png_bytes

_PURPOSES = ("vision", "user_data", "assistants")
_HTTP = {404: "there is no such address.", 405: "this address takes other methods."}


def make_app(engine: EngineProtocol, settings: Settings) -> RequestGate:
    """The ASGI application of one engine, which it closes at its end, after what was accepted is answered."""
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
        docs_url=None,  # these pages load scripts of a CDN
        redoc_url=None,
    )
    gate = RequestGate(
        app, keys=settings.keys, limits=settings.limits, budget=service.budget, hosts=settings.hosts
    )
    _add_faults(app)
    _add_models(app, service)
    _add_chat(app, service)
    _add_files(app, service)
    _add_adapters(app, service)
    _add_state(app, service, gate)
    add_pages(app, service)
    return gate


def _owner(request: HttpRequest) -> str:
    return str(request.state.owner)


def _methods(app: FastAPI, scope: Scope) -> list[str]:
    """The methods that an address takes, of all its routes; Starlette tells those of the first."""
    found = [route for route in app.routes if isinstance(route, Route)]
    partial = [route for route in found if route.matches(scope)[0] is Match.PARTIAL]
    return sorted({method for route in partial for method in route.methods or ()})


def _add_faults(app: FastAPI) -> None:
    """Every error has OpenAI's shape and one sentence."""

    def respond(refused: RequestRefused) -> Response:
        return JSONResponse(refused.body(), refused.status, headers=refused.headers())

    async def known(_: HttpRequest, error: Exception) -> Response:
        return respond(refusal(error))

    async def invalid(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if any(one["type"] == "json_invalid" for one in error.errors()):
            return respond(RequestRefused(400, "the body is not JSON."))
        field, sentence = openai_api.one_sentence(error.errors(), skip=1)
        return respond(RequestRefused(400, sentence, param=field or None))

    async def http(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        refused = RequestRefused(status, _HTTP.get(status, "the request cannot be read."))
        headers = {"Allow": ", ".join(_methods(app, request.scope))} if status == 405 else {}
        return JSONResponse(refused.body(), status, headers=headers)

    async def unknown(_: HttpRequest, __: Exception) -> Response:
        return respond(RequestRefused(500, "the server failed at this request. Its log says where."))

    for kind in (RequestRefused, InputError, Busy, Closed, TimeoutError, ClientGone):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)  # the gate records it


def _add_models(app: FastAPI, service: Service) -> None:
    base = service.settings.base

    def entries() -> dict[str, dict[str, Any]]:
        adapters = {
            one.name: openai_api.model_entry(one.name, service.started, one)
            for one in service.engine.adapters()
        }
        return {base: openai_api.model_entry(base, service.started), **adapters}

    @app.get("/v1/models", response_model=openapi.ModelList, response_model_exclude_none=True)
    async def list_models() -> dict[str, Any]:
        """The base and its adapters, as models."""
        return {"object": "list", "data": list(entries().values())}

    @app.get(
        "/v1/models/{model:path}",
        response_model=openapi.ModelEntry,
        response_model_exclude_none=True,
        responses=refusals(404),
    )
    async def get_model(model: str) -> dict[str, Any]:
        """One model."""
        found = entries().get(model)
        if found is None:
            raise RequestRefused(404, "there is no such model.", code="model_not_found", param="model")
        return found


def _add_chat(app: FastAPI, service: Service) -> None:
    seconds = service.limits.request_s

    def check_model(name: str) -> None:
        if service.serves(name):
            return
        known = [service.settings.base, *(one.name for one in service.engine.adapters())]
        raise RequestRefused(
            404,
            f"there is no such model{did_you_mean(name, known) or '.'} /v1/models lists them.",
            code="model_not_found",
            param="model",
        )

    @app.post("/v1/chat/completions", responses=openapi.COMPLETION | refusals(400, 404, 503, 504))
    async def chat(body: openai_api.ChatRequest, request: HttpRequest) -> Response:
        """Answer one question about an image, or without text write its report."""
        check_model(body.model)
        async with AsyncExitStack() as stack:
            question = await stack.enter_async_context(parse_request(service, _owner(request), body))
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                pieces = events(question, stack.pop_all(), usage=usage, seconds=seconds)
                return Streamed(pieces, "text/event-stream")
            reply = await reply_in_time(question, request.receive, seconds)
            return JSONResponse(openai_api.completion(question.id, question.model, reply, question.limit))

    @app.post(
        "/v1/batch",
        response_class=Response,
        responses=openapi.LINES | refusals(400, 404),
        openapi_extra=openapi.ROWS,
    )
    async def answer_batch(request: HttpRequest) -> Response:
        """Answer a JSONL of questions: one line for each, in their order, as they come."""
        data = await request.body()
        rows = await service.run_in_decoder(batch.read_rows, data, service.limits.batch_rows)
        for name in sorted({row.body.model for row in rows}):
            check_model(name)
        return Streamed(batch.answers(service, _owner(request), rows), "application/jsonl")


def _file_entry(upload: Upload) -> dict[str, Any]:
    told = {"id": upload.id, "object": "file", "bytes": len(upload.png), "created_at": int(upload.made)}
    size = {"width": upload.width, "height": upload.height}
    return told | {"filename": "image.png", "purpose": "vision", "status": "processed"} | size


def _add_files(app: FastAPI, service: Service) -> None:
    def decode(data: bytes) -> tuple[bytes, int, int]:
        image = open_upload(data, max_pixels=service.limits.pixels)
        return png_bytes(image), image.width, image.height

    @app.post(
        "/v1/files",
        response_model=openapi.FileEntry,
        responses=refusals(400),
        openapi_extra=openapi.IMAGES,
    )
    async def upload_file(
        request: HttpRequest,
        file: Annotated[UploadFile, File(description="PNG, JPEG, WebP or DICOM.")],
        purpose: Annotated[str, Form(max_length=64, json_schema_extra={"enum": [*_PURPOSES, ""]})] = "vision",
    ) -> dict[str, Any]:
        """Hold an image for later questions. Its pixels alone are kept, as PNG; its name is not."""
        if purpose not in _PURPOSES:
            raise RequestRefused(400, "files are images for questions: give purpose=vision.", param="purpose")
        png, width, height = await service.run_in_decoder(decode, await file.read())
        return _file_entry(service.uploads.add(_owner(request), png, width, height))

    @app.get("/v1/files", response_model=openapi.FileList)
    async def list_files(request: HttpRequest) -> dict[str, Any]:
        """The images that are held for this key."""
        data = [_file_entry(one) for one in service.uploads.of(_owner(request))]
        return {"object": "list", "data": data, "has_more": False}  # OpenAI's client would ask for more

    @app.get("/v1/files/{id}", response_model=openapi.FileEntry, responses=refusals(404))
    async def get_file(id: str, request: HttpRequest) -> dict[str, Any]:
        """What is known of one image."""
        return _file_entry(service.uploads.get(_owner(request), id))

    @app.get("/v1/files/{id}/content", response_class=Response, responses=openapi.PNG | refusals(404))
    async def get_file_content(id: str, request: HttpRequest) -> Response:
        """The image as PNG, as the model sees it."""
        return Response(service.uploads.get(_owner(request), id).png, media_type="image/png")

    @app.delete("/v1/files/{id}", response_model=openapi.Deleted, responses=refusals(404))
    async def delete_file(id: str, request: HttpRequest) -> dict[str, Any]:
        """Forget an image."""
        service.uploads.remove(_owner(request), id)
        return {"id": id, "object": "file", "deleted": True}


def _add_adapters(app: FastAPI, service: Service) -> None:
    root = service.settings.adapter_root

    @app.get("/v1/adapters", response_model=openapi.AdapterList)
    async def list_adapters() -> dict[str, Any]:
        """The adapters that are registered."""
        return {
            "object": "list",
            "data": [openai_api.adapter_entry(one) for one in service.engine.adapters()],
        }

    @app.post(
        "/v1/adapters",
        status_code=201,
        response_model=openapi.AdapterEntry,
        responses=refusals(400, 403, 404, 409),
    )
    async def register_adapter(body: openai_api.Registration) -> dict[str, Any]:
        """Register an adapter of the adapter root."""
        folder = paths.adapter_folder(root, body.folder or body.name)
        if service.serves(body.name):
            raise RequestRefused(
                409, "a model of that name is served already. Remove it first, or choose another."
            )
        try:
            info = await service.run_in_decoder(service.engine.register, body.name, folder)
        except InputError as error:
            raise RequestRefused(
                400, without_paths(str(error), [folder] + ([root] if root else []))
            ) from None
        return openai_api.adapter_entry(info)

    @app.delete("/v1/adapters/{name}", response_model=openapi.Deleted, responses=refusals(403, 404))
    async def remove_adapter(name: str) -> dict[str, Any]:
        """Forget an adapter; its files stay, and requests that were accepted are answered."""
        if root is None:
            raise RequestRefused(403, "adapters are not removed here. Start the server with --adapter-root.")
        try:
            await service.run_in_decoder(service.engine.remove, name)
        except UnknownAdapter:
            raise RequestRefused(404, "there is no such adapter.", code="model_not_found") from None
        return {"id": name, "object": "adapter", "deleted": True}


def _add_state(app: FastAPI, service: Service, gate: RequestGate) -> None:
    @app.get("/healthz", response_model=openapi.Health)
    async def healthz() -> dict[str, Any]:
        """Whether the server is there."""
        return {"status": "ok", "model": service.settings.base, "notice": NOTICE}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and sizes for Prometheus."""
        text = exposition(service.engine.stats(), gate.counts, service.uploads.size, service.budget.left)
        return Response(text, media_type=CONTENT_TYPE)

    @app.post("/v1/session", status_code=204)
    async def open_session(request: HttpRequest) -> Response:
        """Let a browser that has a key follow links to the pages of reviews: sets a cookie for them alone."""
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
