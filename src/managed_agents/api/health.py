"""Whether the process lives and whether it can serve; public on purpose."""

import logging

import anyio
from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError
from starlette.responses import Response

from managed_agents.db.engine import Database
from managed_agents.db.revisions import revisions
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

log = logging.getLogger(__name__)

READY_SECONDS_MAX = 3.0
_REVISION = text("SELECT version_num FROM alembic_version")

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
    """Say why this process cannot serve and what to do, None when it can.

    A database of a newer release is served: migrations only add until no older process is left, and the old processes
    must go on while the new ones start.
    """
    try:
        with anyio.fail_after(READY_SECONDS_MAX):
            async with db.transaction() as tx:
                revision = await tx.scalar(_REVISION)
    except ProgrammingError:  # no such table
        revision = None
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        log.warning("not ready", extra={"cause": repr(error)})
        return "database unreachable: check that Postgres runs and that MANAGED_AGENTS_DATABASE_URL is right"
    ours = revisions()
    if revision is None:
        return "database schema missing: run `managed-agents migrate`"
    if revision != ours.head and revision in ours.known:
        return f"database schema is at revision {revision}, this release needs {ours.head}: run `managed-agents migrate`"
    return None


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
