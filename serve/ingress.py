"""The HTTP endpoint: checks, decodes and resamples on CPUs, and asks the models' replicas.

python jobs/deploy.py --model /data/model          # deploys serve/config.yaml on the running cluster
"""

import asyncio
import contextlib
import logging
import os
import time

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from serve.api import create_app
from serve.audio_input import ClipLimits, ClipReader
from serve.backend import Backend
from serve.keys import KeyFile
from serve.middleware import RequestLimits
from serve.monitoring import EndpointMetrics
from serve.placement import preferably_on
from serve.schema import RequestError

READY_SECONDS = 5.0  # that a model has for the question which tells whether it answers
logger = logging.getLogger("ray.serve")


class EndpointArguments(BaseModel):
    """`args` of the endpoint's application in the Serve configuration file."""

    model_config = ConfigDict(extra="forbid")

    api_keys_file: str | None = Field(
        default_factory=lambda: os.environ.get("MELLOW_API_KEYS_FILE") or None,
        description="file of `serve.keys` with who may ask; default: environment variable MELLOW_API_KEYS_FILE",
    )
    allow_anonymous: bool = Field(
        False, description="without keys, answer other machines too; else only requests over loopback are answered"
    )
    requests: RequestLimits = RequestLimits()
    clips: ClipLimits = ClipLimits()


class Models(BaseModel):
    """`user_config` of the endpoint's deployment, which may be changed while it runs."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] = Field(min_length=1, description="applications of models, by the name that requests use")


@serve.deployment
@serve.ingress()
class Endpoint:
    """A replica of the endpoint: the state that its routes (serve/api.py) share."""

    def __init__(self, arguments: EndpointArguments):
        self.created = int(time.time())
        self.limits, self.allow_anonymous = arguments.requests, arguments.allow_anonymous
        self.keys = KeyFile(arguments.api_keys_file) if arguments.api_keys_file else None
        self.metrics = EndpointMetrics()
        self.clips = ClipReader(arguments.clips)
        self.backends: dict[str, Backend] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self)

    def reconfigure(self, user_config: dict) -> None:
        """Take over the models of `user_config`; called by Serve at the start and on every change."""
        names = Models(**user_config).models
        self.backends = {name: self.backends.get(name) or Backend(name, self.metrics) for name in names}

    def backend(self, model: str) -> Backend:
        """Return the replicas of a model.

        Raises:
            RequestError: it is not served.
        """
        if model not in self.backends:
            served = " and ".join(repr(name) for name in self.backends)
            raise RequestError(
                f"model {model!r} is not served here; {served} {'is' if len(self.backends) == 1 else 'are'}",
                "model",
                404,
                "model_not_found",
            )
        return self.backends[model]

    def first_model(self) -> str:
        """Return the model of requests that name none."""
        return next(iter(self.backends))

    async def check_health(self) -> None:
        """Called by Serve, through the loop that answers requests; first at the end of the start.

        Raises:
            RuntimeError: there is no model to ask.
        """
        if not self.backends:
            raise RuntimeError("no model is served: name one in the `user_config` of the deployment Endpoint")
        self.metrics.refresh()

    async def check_ready(self) -> None:
        """Make sure that a model answers; one whose last call was answered is not asked again.

        Raises:
            RequestError: none does.
        """
        if any(backend.answered for backend in self.backends.values()):
            return
        asked = [asyncio.create_task(backend.probe()) for backend in self.backends.values()]
        try:
            async with asyncio.timeout(READY_SECONDS):
                for answered in asyncio.as_completed(asked):
                    with contextlib.suppress(Exception):
                        await answered
                        return
        except TimeoutError:
            pass
        finally:
            for task in asked:
                task.cancel()
        raise RequestError("no model answers yet: try again", None, 503, "not_ready", 1)

    def log_failure(self, error: Exception) -> None:
        logger.error("an answer failed", exc_info=error)


def build(arguments: EndpointArguments) -> serve.Application:
    """Build the endpoint's application; what `import_path` in the Serve configuration file names."""
    options = {"num_cpus": 1} | preferably_on("cpu")
    return Endpoint.options(ray_actor_options=options).bind(arguments)  # type: ignore[attr-defined]  # of the decorator
