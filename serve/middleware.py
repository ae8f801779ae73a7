"""Admission of requests before the application parses them: requests in flight, API key, size and time of the body."""

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.error_responses import RequestError, queue_full
from serve.keys import KeyFile
from serve.limits import RequestLimits, current_limits
from serve.monitoring import EndpointMetrics

GUARDED = "/v1/"  # the page and the probes need no key
LOOPBACK = ("127.", "::1", "::ffff:127.")


class AdmissionMiddleware:
    """ASGI middleware around the endpoint's application."""

    def __init__(
        self,
        application: ASGIApp,
        limits: RequestLimits,
        keys: KeyFile | None,
        allow_anonymous: bool,
        metrics: EndpointMetrics,
    ):
        self._application = application
        self._limits, self._keys, self._allow_anonymous, self._metrics = limits, keys, allow_anonymous, metrics
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        current_limits.set(self._limits)
        # `root_path` is the application's route_prefix.
        if scope["type"] != "http" or not scope["path"].removeprefix(scope.get("root_path", "")).startswith(GUARDED):
            await self._application(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # status if the client disconnects

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._count(1)
        try:
            try:
                if self.in_flight > self._limits.max_in_flight:
                    raise queue_full()
                self._check_key(scope)
                body = await self._body(scope, receive)
            except RequestError as error:
                await error.response()(scope, receive, note)
                return
            if body is None:
                return
            await self._application(scope, _replay(body, receive), note)
        finally:
            self._count(-1)
            # The route, not the path, so that a scanner's thousand paths are one time series.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.request(route, status, time.monotonic() - start)

    def _count(self, change: int) -> None:
        self.in_flight += change
        self._metrics.in_flight(self.in_flight)

    def _check_key(self, scope: Scope) -> None:
        if self._keys:
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            scheme, _, key = given.partition(" ")
            if scheme.lower() != "bearer" or not self._keys.holder(key.strip()):
                message = "no valid API key; send one as `Authorization: Bearer KEY`"
                raise RequestError(message, None, 401, "invalid_api_key")
        elif not self._allow_anonymous and not (scope.get("client") or ("",))[0].startswith(LOOPBACK):
            message = "without API keys only requests over loopback are answered; set api_keys_file or allow_anonymous"
            raise RequestError(message, None, 401, "no_api_keys")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client disconnects before its end."""
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
            reason = f"the body did not arrive within {self._limits.body_seconds:g} s"
            raise RequestError(reason, None, 408, "slow_client") from error
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body, which is read already, and then the client's further messages."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
