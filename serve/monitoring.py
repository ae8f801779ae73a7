"""What Prometheus sees of the endpoint and of the models' replicas, through Ray's metrics.

Ray adds `ray_` to every name, and tags for application, deployment and replica.
"""

from ray.serve import metrics

from mellow_platform.inference.request import Answer

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class EndpointMetrics:
    """Requests as clients see them."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "mellow_requests", description="requests answered, by route and HTTP status", tag_keys=("route", "status")
        )
        self._seconds = metrics.Histogram(
            "mellow_request_seconds",
            description="from the first byte of a request to the last of its answer",
            boundaries=SECONDS,
            tag_keys=("route",),
        )
        self._in_flight = metrics.Gauge("mellow_in_flight", description="requests being answered now")
        self._in_flight_now = 0
        self._retries = metrics.Counter(
            "mellow_retries", description="calls repeated on another replica, by model", tag_keys=("model",)
        )

    def in_flight(self, count: int) -> None:
        self._in_flight_now = count
        self.refresh()

    def refresh(self) -> None:
        """Set what Prometheus would lose sight of: Ray drops a gauge that was not set for two of its intervals."""
        self._in_flight.set(self._in_flight_now)

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def retry(self, model: str) -> None:
        self._retries.inc(tags={"model": model})


class ModelMetrics:
    """What a replica's engine does."""

    def __init__(self) -> None:
        self._first_token = metrics.Histogram(
            "mellow_first_token_seconds",
            description="from a request's arrival at its replica to the first token",
            boundaries=SECONDS,
        )
        self._tokens = metrics.Counter(
            "mellow_tokens", description="tokens read of questions and written of answers", tag_keys=("kind",)
        )
        self._batch = metrics.Gauge("mellow_batch_size", description="answers being written at once")
        self._queue = metrics.Gauge("mellow_queue", description="requests that wait for a slot")
        self._cache = metrics.Counter(
            "mellow_cache", description="look-ups of clips and prefixes", tag_keys=("cache", "outcome")
        )
        self._cache_bytes = metrics.Gauge("mellow_cache_bytes", description="held in a cache", tag_keys=("cache",))
        self._counted: dict[str, int] = {}

    def answered(self, answer: Answer, first_token_seconds: float, stats: dict[str, int]) -> None:
        self._first_token.observe(first_token_seconds)
        self._tokens.inc(answer.prompt_tokens, tags={"kind": "prompt"})
        self._tokens.inc(len(answer.tokens), tags={"kind": "completion"})
        self.watch(stats)

    def watch(self, stats: dict[str, int]) -> None:
        """Report an engine's `stats` as they are now."""
        self._batch.set(stats["active"])
        self._queue.set(stats["waiting"])
        for cache in ("clip", "prefix"):
            self._cache_bytes.set(stats[f"{cache}_bytes"], tags={"cache": cache})
            for counted, outcome in ((f"{cache}_hits", "hit"), (f"{cache}_misses", "miss")):
                new = stats[counted] - self._counted.get(counted, 0)
                self._counted[counted] = stats[counted]
                if new:
                    self._cache.inc(new, tags={"cache": cache, "outcome": outcome})
