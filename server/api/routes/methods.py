"""`GET /v1/methods`: the methods that adapters may have here."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.api.answers import json_response
from server.api.auth import GuardedRoute, needs
from server.api.routes import examples
from server.api.routes.dependencies import TheServices

router = APIRouter(tags=["methods"], route_class=GuardedRoute)


@router.get(
    "/v1/methods",
    summary="List the methods that adapters may have",
    responses=examples.answers({"object": "list", "data": [examples.METHOD]}),
)
@needs("invoke")
async def list_methods(services: TheServices) -> Response:
    """Each with its mechanism, the checkpoints that are read, its parameters per layer and what it costs while served.

    `h` is the base's hidden size, `r` a rank, `T` the number of virtual tokens, `in` and `out` a module's widths.
    """
    methods = services.require_base().facts.methods
    data = [
        {
            "method": method.name,
            "mechanism": method.mechanism,
            "formats": method.formats,
            "parameters_per_layer": method.parameters,
            "cost": method.cost,
        }
        for method in methods
    ]
    return json_response({"object": "list", "data": data})
