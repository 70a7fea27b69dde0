"""What the port answers over plain HTTP."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from streamsink.auth import REFUSAL_BODY, REFUSAL_HEADERS, Refusal, TokenBook
from streamsink.endpoint import Endpoint
from streamsink.errors import BadMessage
from streamsink.metrics import merged
from streamsink.status import parse

if TYPE_CHECKING:
    from starlette.requests import Request

log = structlog.get_logger(__name__)


class Web:
    """The HTTP side of an endpoint.

    Args:
        endpoint: Whose health, metrics and streams these are.
        admin: Who may see metrics.
        status_secret: The last part of the status webhook's path.
    """

    def __init__(self, endpoint: Endpoint, admin: TokenBook, status_secret: str) -> None:
        self._endpoint = endpoint
        self._admin = admin
        self._status_secret = status_secret.encode()

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/healthz", self.healthz),
                Route("/readyz", self.readyz),
                Route("/metrics", self.metrics),
                Route("/status/{secret}", self.status, methods=["GET", "POST"]),
                # Kept for a dashboard and an API: who has the token learns that there is nothing yet.
                Route("/", self.reserved),
                Route("/api/v1/{rest:path}", self.reserved, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            ]
        )

    async def healthz(self, request: Request) -> Response:
        """200 while the process lives."""
        return PlainTextResponse("ok\n")

    async def readyz(self, request: Request) -> Response:
        """200, or 503 while draining or full."""
        if self._endpoint.draining:
            return PlainTextResponse("draining\n", 503)
        if self._endpoint.full:
            return PlainTextResponse("full\n", 503)
        return PlainTextResponse("ready\n")

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format, for the admin token."""
        if not self._is_admin(request):
            return self._unauthorized()
        body, content_type = self._endpoint.metrics.render()
        siblings = self._endpoint.siblings
        if siblings is not None:
            body = merged({siblings.number: body, **await siblings.ask("metrics")})
        return Response(body, headers={"Content-Type": content_type})

    async def status(self, request: Request) -> Response:
        """A status webhook, GET or POST, in both of the platform's shapes."""
        secret = request.path_params["secret"].encode("utf-8", "replace")
        if not hmac.compare_digest(secret, self._status_secret):
            return PlainTextResponse("Not Found", 404)
        try:
            event = parse(request.headers.get("content-type", ""), request.scope["query_string"], await request.body())
        except ClientDisconnect:
            # Refused by then, or gone: this goes nowhere.
            return Response(status_code=400)
        except BadMessage as error:
            self._endpoint.metrics.bad_message(error.reason)
            log.warning("status webhook refused", cause=str(error))
            return PlainTextResponse(f"{error}\n", 400)
        known = self._endpoint.status(event)
        if not known and self._endpoint.siblings is not None:
            known = any((await self._endpoint.siblings.ask("status", event)).values())
        log.info(
            "stream status",
            event_name=event.event,
            stream=event.stream_sid,
            call=event.call_sid,
            name=event.name,
            error=event.error,
            live=known,
        )
        return Response(status_code=204)

    async def reserved(self, request: Request) -> Response:
        """Nothing yet, for the admin token; nothing at all without it."""
        if not self._is_admin(request):
            return self._unauthorized()
        return PlainTextResponse("Not Found", 404)

    def _is_admin(self, request: Request) -> bool:
        return not isinstance(self._admin.match(request.headers.getlist("authorization")), Refusal)

    @staticmethod
    def _unauthorized() -> Response:
        return Response(REFUSAL_BODY, 401, dict(REFUSAL_HEADERS))
