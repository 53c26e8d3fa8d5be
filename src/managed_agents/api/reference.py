"""The API's document and a page to read it with; public on purpose.

The document is the committed file (`api/openapi.py`). The page's script and style come from a library that bundles them: it
loads nothing from elsewhere, which its content security policy enforces.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.responses import FileResponse, HTMLResponse, Response

from managed_agents.core.errors import NotFound

router = APIRouter()

ASSETS: Final = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}
HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Managed Agents API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon.png">
</head>
<body>
<div id="reference"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Without `validatorUrl` the page would send its address to a service on the internet.
START: Final = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#reference",
  validatorUrl: null,
  docExpansion: "none",
  defaultModelsExpandDepth: 0,
  deepLinking: true,
});
"""


def document_path() -> Path:
    """Where the document is: inside the package in a wheel, below docs in a checkout."""
    installed = Path(__file__).with_name("openapi.json")
    return installed if installed.is_file() else Path(__file__).parents[3] / "docs" / "api" / "openapi.json"


@cache
def _document() -> bytes:
    return document_path().read_bytes()


@router.get("/openapi.json")
async def document() -> Response:
    """The API's OpenAPI document."""
    return Response(_document(), media_type="application/json")


@router.get("/docs")
async def page() -> Response:
    """The document as a page."""
    return HTMLResponse(PAGE, headers=HEADERS)


@router.get("/docs/start.js")
async def start() -> Response:
    """What the page runs."""
    return Response(START, media_type="text/javascript", headers=HEADERS)


@router.get("/docs/{asset}")
async def asset(asset: str) -> Response:
    """A script, style or image of the page."""
    if asset not in ASSETS:
        raise NotFound
    return FileResponse(str(files("fastapi_offline") / "static" / asset), media_type=ASSETS[asset], headers=HEADERS)
