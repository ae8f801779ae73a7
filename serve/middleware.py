"""What every request passes before the application reads it: keys, room, size and pace of its body.

All of it is decided from the first lines of a request and the bytes as they arrive; nothing is parsed here.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve.keys import KeyFile
from serve.monitoring import EndpointMetrics
from serve.schema import RequestError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

GUARDED = "/v1/"  # the page and the probes are open to everyone
LOOPBACK = ("127.", "::1", "::ffff:127.")


class RequestLimits(BaseModel):
    """What a request may take."""

    model_config = ConfigDict(extra="forbid")

    max_body_bytes: int = Field(48 << 20, gt=0, description="413 past it")
    body_seconds: float = Field(30.0, gt=0, description="to send the body in; 408 past it")
    answer_seconds: float = Field(120.0, gt=0, description="from the body's end to the answer's; 504 past it")
    max_answers: int = Field(64, ge=1, description="choices of one request: `n` for every window; 400 past it")
    max_in_flight: int = Field(256, ge=1, description="requests that a replica of the endpoint holds; 429 past it")


class AdmissionMiddleware:
    """ASGI middleware around the endpoint's application."""

    def __init__(
        self,
        application: Application,
        limits: RequestLimits,
        keys: KeyFile | None,
        allow_anonymous: bool,
        metrics: EndpointMetrics,
    ):
        self._application = application
        self._limits, self._keys, self._allow_anonymous, self._metrics = limits, keys, allow_anonymous, metrics
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Where the application has a route_prefix, that is the path's `root_path`.
        if scope["type"] != "http" or not scope["path"].removeprefix(scope.get("root_path", "")).startswith(GUARDED):
            await self._application(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # the client went away

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._count(1)
        try:
            try:
                self._check_room()
                self._check_key(scope)
                body = await self._body(scope, receive)
            except RequestError as error:
                await _respond(error, note)
                return
            if body is None:
                return
            await self._application(scope, _replay(body, receive), note)
        finally:
            self._count(-1)
            # The route, not the path: a scanner's thousand paths are one series.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.request(route, status, time.monotonic() - start)

    def _count(self, change: int) -> None:
        self.in_flight += change
        self._metrics.in_flight(self.in_flight)

    def _check_room(self) -> None:
        limit = self._limits.max_in_flight
        if self.in_flight > limit:
            raise RequestError(f"{limit} requests are being answered already: try again", None, 429, "queue_full", 1)

    def _check_key(self, scope: Scope) -> None:
        if self._keys:
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            scheme, _, key = given.partition(" ")
            if scheme.lower() != "bearer" or not self._keys.holder(key.strip()):
                raise RequestError(
                    "no valid API key: send one as `Authorization: Bearer KEY`", None, 401, "invalid_api_key"
                )
        elif not self._allow_anonymous and not (scope.get("client") or ("",))[0].startswith(LOOPBACK):
            raise RequestError(
                "this endpoint has no API keys and answers this machine alone: give it an api_keys_file, or "
                "allow_anonymous",
                None,
                401,
                "no_api_keys",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body; None where the client went away before its end."""
        limit = self._limits.max_body_bytes
        too_large = RequestError(f"the body has more than {limit} bytes", None, 413, "body_too_large")
        promised = dict(scope["headers"]).get(b"content-length", b"0")
        if not promised.isdigit() or int(promised) > limit:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise RequestError(
                f"the body did not arrive within {self._limits.body_seconds:g} s", None, 408, "slow_client"
            ) from error
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, which was read already, and then what else the client does."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _respond(error: RequestError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
