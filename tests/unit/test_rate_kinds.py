"""Every route is sorted: a new one has to be looked at."""

import pytest
from fastapi.routing import APIRoute

from managed_agents.api.app import ROUTERS
from managed_agents.web.actor import RateKind
from managed_agents.web.rate_limits import kind_of

# Last parts of paths on which POST makes no new object.
NOT_COUNTED = {"archive", "events"}


@pytest.mark.requirement("ORG-021")
def test_every_route_is_counted_or_not_on_purpose() -> None:
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            for method in route.methods:
                last = route.path.rpartition("/")[2]
                kind = kind_of(method, route.path)
                match method:
                    case "GET":
                        assert kind is RateKind.READ
                    case "POST" if not last.startswith("{") and last not in NOT_COUNTED:
                        assert kind is RateKind.CREATE, f"{route.path}: is it a create?"
                    case _:
                        assert kind is None
