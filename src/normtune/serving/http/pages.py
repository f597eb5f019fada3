"""Serves the web page, from files of the package, and the review pages, from a folder."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response

from normtune.serving.http.openapi import ReviewList
from normtune.serving.http.paths import review_names, review_page
from normtune.serving.http.state import Service

# Content-Security-Policy of the web page: its own files and images that it created; nothing from other hosts.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A review page contains all it needs, so that a sandbox can keep its scripts away from the server.
REVIEW_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# URL path: (file in serving/page, media type)
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/viewer.js": ("viewer.js", "text/javascript"),
}


def add_pages(app: FastAPI, service: Service) -> None:
    """Add the routes of the web page at `/` and of the review pages below `/reviews`."""
    for path, (name, media_type) in _FILES.items():
        app.add_api_route(path, _file(name, media_type), include_in_schema=False)
    folder = service.settings.reviews

    @app.get("/v1/reviews", response_model=ReviewList)
    async def list_reviews() -> dict[str, Any]:
        """List the names of the review pages."""
        return {"object": "list", "data": review_names(folder)}

    @app.get("/reviews/{name}", include_in_schema=False)
    async def review(name: str) -> Response:
        content = review_page(folder, name).read_bytes()
        return Response(content, media_type="text/html", headers={"content-security-policy": REVIEW_POLICY})


def _file(name: str, media_type: str) -> Any:
    content = files("normtune.serving").joinpath("page", name).read_bytes()

    async def page() -> Response:
        headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
        return Response(content, media_type=media_type, headers=headers)

    return page
