"""What routes are handed by the framework, which runs a plain function on a thread: all of them are coroutines."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.api.services import Services


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


TheServices = Annotated[Services, Depends(_services)]
