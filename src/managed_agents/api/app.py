"""The application factory.

The framework serves as router only: its generated documentation, redirects and error bodies are off, so that
whatever leaves the server is ours. Lifespan belongs to `processes/`, which builds the services before and
disposes of them after.
"""

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from managed_agents.api import health, reference
from managed_agents.resources.agents.routes import router as agents
from managed_agents.resources.environments.routes import router as environments
from managed_agents.resources.files.routes import router as files
from managed_agents.resources.keys.routes import router as keys
from managed_agents.resources.organizations.routes import router as organizations
from managed_agents.resources.rate_limits.routes import router as rate_limits
from managed_agents.resources.services import Services
from managed_agents.resources.sessions.routes import router as sessions
from managed_agents.web.edge import Edge, http_exception_response

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    reference.router,
    agents,
    environments,
    sessions,
    files,
    keys,
    organizations,
    rate_limits,
)


def create_app(services: Services) -> FastAPI:
    """Return the application that serves the API with `services`."""
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Edge)],
        exception_handlers={HTTPException: http_exception_response},
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    return app
