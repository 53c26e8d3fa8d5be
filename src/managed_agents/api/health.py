"""Whether the process lives and whether it can serve; public on purpose."""

import logging

import anyio
from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from managed_agents.db.engine import Database
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

log = logging.getLogger(__name__)

READY_SECONDS_MAX = 3.0

router = APIRouter()


@router.get("/healthz")
async def healthz() -> Response:
    """The process lives."""
    return Json({"status": "ok"})


@router.get("/readyz")
async def readyz(db: Db) -> Response:
    """The process can serve."""
    return await readiness(db)


async def readiness(db: Database) -> Response:
    """Answer 200 when the database is reachable and migrated, else 503."""
    reason = await unready_reason(db)
    if reason is None:
        return Json({"status": "ready"})
    return Json({"status": "unready", "reason": reason}, status_code=503)


async def unready_reason(db: Database) -> str | None:
    """Say why this process cannot serve, None when it can."""
    try:
        with anyio.fail_after(READY_SECONDS_MAX):
            async with db.transaction() as tx:
                migrated = await tx.scalar(text("select to_regclass('api_keys') is not null"))
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        log.warning("not ready", extra={"cause": repr(error)})
        return "database unreachable"
    return None if migrated else "database schema missing"


def metrics_response() -> Response:
    """Return this process's metrics in the Prometheus text format, for the metrics port."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def operations_app(db: Database) -> FastAPI:
    """The application of a worker's metrics port: liveness, readiness, metrics."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.get("/healthz")
    async def live() -> Response:  # pyright: ignore[reportUnusedFunction]
        return await healthz()

    @app.get("/readyz")
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        return await readiness(db)

    @app.get("/metrics")
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        return metrics_response()

    return app
