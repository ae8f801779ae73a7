"""The HTTP endpoint's application: it checks requests, decodes clips on CPUs, and calls the models' replicas.

python jobs/deploy.py --model /data/model          # deploys serve/config.yaml on the running cluster
"""

import os

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from serve.api import create_app
from serve.audio_input import ClipLimits
from serve.endpoint_state import EndpointState
from serve.keys import KeyFile
from serve.limits import RequestLimits
from serve.placement import preferably_on


class EndpointArguments(BaseModel):
    """`args` of the endpoint's application in the Serve configuration file."""

    model_config = ConfigDict(extra="forbid")

    api_keys_file: str | None = Field(
        default_factory=lambda: os.environ.get("MELLOW_API_KEYS_FILE") or None,
        description="file with API keys, as `python -m serve.keys` writes them; default: environment variable "
        "MELLOW_API_KEYS_FILE, else no keys",
    )
    allow_anonymous: bool = Field(
        False, description="without API keys, answer requests from other machines; default: only over loopback"
    )
    requests: RequestLimits = RequestLimits()
    clips: ClipLimits = ClipLimits()


class ServedModels(BaseModel):
    """`user_config` of the endpoint's deployment; changes take effect without a restart."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] = Field(min_length=1, description="applications of models, named as requests name the model")


@serve.deployment
@serve.ingress()
class Endpoint:
    """An endpoint replica."""

    def __init__(self, arguments: EndpointArguments):
        self._state = EndpointState(arguments.requests, arguments.clips)
        self._keys = KeyFile(arguments.api_keys_file) if arguments.api_keys_file else None
        self._allow_anonymous = arguments.allow_anonymous

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._state, self._keys, self._allow_anonymous)

    def reconfigure(self, user_config: dict) -> None:
        """Serve the models of `user_config`; called by Serve at the start and after every change."""
        self._state.serve(ServedModels(**user_config).models)

    async def check_health(self) -> None:
        """Called by Serve on the event loop that answers requests, first at the end of the start.

        Raises:
            RuntimeError: there is no model to serve.
        """
        if not self._state.backends:
            raise RuntimeError("no model is served; name one in `user_config` of the deployment Endpoint")
        self._state.metrics.refresh()


def build(arguments: EndpointArguments) -> serve.Application:
    """Build the endpoint's application; `import_path` in the Serve configuration file names this function."""
    options = {"num_cpus": 1} | preferably_on("cpu")
    return Endpoint.options(ray_actor_options=options).bind(arguments)  # type: ignore[attr-defined]  # of the decorator
