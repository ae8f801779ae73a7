"""Prometheus metrics of the endpoint and of the models' replicas, through Ray.

Ray prefixes every name with `ray_` and adds tags for application, deployment and replica.
"""

from ray.serve import metrics

from mellow_platform.inference.request import Answer

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class EndpointMetrics:
    """Metrics of an endpoint replica: requests and retries."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "mellow_requests", description="requests answered, by route and HTTP status", tag_keys=("route", "status")
        )
        self._seconds = metrics.Histogram(
            "mellow_request_seconds",
            description="seconds from the first byte of a request to the last byte of its response",
            boundaries=SECONDS,
            tag_keys=("route",),
        )
        self._in_flight = metrics.Gauge("mellow_in_flight", description="requests that are being answered")
        self._in_flight_now = 0
        self._retries = metrics.Counter(
            "mellow_retries", description="calls retried on another replica, by model", tag_keys=("model",)
        )

    def in_flight(self, count: int) -> None:
        self._in_flight_now = count
        self.refresh()

    def refresh(self) -> None:
        """Set the gauge again: Ray drops a gauge that was not set for two report intervals."""
        self._in_flight.set(self._in_flight_now)

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def retry(self, model: str) -> None:
        self._retries.inc(tags={"model": model})


class ModelMetrics:
    """Metrics of a model replica: tokens, batch, queue and caches of its engine."""

    def __init__(self) -> None:
        self._first_token = metrics.Histogram(
            "mellow_first_token_seconds",
            description="seconds from a request's arrival at the replica to its first token",
            boundaries=SECONDS,
        )
        self._tokens = metrics.Counter(
            "mellow_tokens", description="tokens of prompts and completions", tag_keys=("kind",)
        )
        self._batch = metrics.Gauge("mellow_batch_size", description="answers that are being written")
        self._queue = metrics.Gauge("mellow_queue", description="requests that wait for a slot")
        self._cache = metrics.Counter(
            "mellow_cache", description="cache look-ups, by cache and outcome", tag_keys=("cache", "outcome")
        )
        self._cache_bytes = metrics.Gauge("mellow_cache_bytes", description="bytes in a cache", tag_keys=("cache",))
        self._counted: dict[str, int] = {}

    def answered(self, answer: Answer, first_token_seconds: float, stats: dict[str, int]) -> None:
        self._first_token.observe(first_token_seconds)
        self._tokens.inc(answer.prompt_tokens, tags={"kind": "prompt"})
        self._tokens.inc(len(answer.tokens), tags={"kind": "completion"})
        self.watch(stats)

    def watch(self, stats: dict[str, int]) -> None:
        """Report an engine's current `stats`."""
        self._batch.set(stats["active"])
        self._queue.set(stats["waiting"])
        for cache in ("clip", "prefix"):
            self._cache_bytes.set(stats[f"{cache}_bytes"], tags={"cache": cache})
            for counted, outcome in ((f"{cache}_hits", "hit"), (f"{cache}_misses", "miss")):
                new = stats[counted] - self._counted.get(counted, 0)
                self._counted[counted] = stats[counted]
                if new:
                    self._cache.inc(new, tags={"cache": cache, "outcome": outcome})
