"""Deploy a model behind the endpoint with the code of this job, and wait until it serves requests.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- python jobs/deploy.py --model s3://bucket/model

A model that is already served under the same name keeps serving until replicas of the new one have started and passed
the gate; if they fail, the configuration of the old one is restored. Another --name adds a model.
"""

import copy
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field

from mellow_platform import job
from mellow_platform.evaluation.gate_config import GateSection
from mellow_platform.failure import cause_in
from mellow_platform.settings import File, Input, Metavar, Name, Section

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

ENDPOINT, TEMPLATE = "endpoint", "mellow"  # applications in the Serve configuration file
TIMEOUT = 600.0  # seconds; a large model is downloaded from object storage first

Application = dict[str, Any]


class DeployConfig(Section):
    """Deploy a model behind the HTTP endpoint of the running cluster."""

    serve: File = Field(
        "serve/config.yaml", description="Ray Serve configuration file, relative to the working directory"
    )
    model: Input = Field(description="folder of the trained model")
    name: Name = Field(
        "mellow",
        pattern=r"^[\w.-]+$",
        description="name of the model in requests (`model`); a name that is already served gets a new version",
    )
    gate: GateSection = GateSection()
    host: Annotated[str, Metavar("ADDRESS")] = Field(
        "127.0.0.1",
        description="address to listen on, fixed by the first deployment; 0.0.0.0 for all addresses, which requires "
        "API keys",
    )
    port: int = Field(8000, ge=1, le=65535, description="HTTP port, fixed by the first deployment")


class Rollout:
    """Deployment of one model to a cluster; other models stay.

    Raises:
        SystemExit: the name of the model is reserved.
    """

    def __init__(self, config: DeployConfig, client: "ServeSubmissionClient", environment: dict[str, Any]):
        if config.name == ENDPOINT:
            raise SystemExit(f"--name {ENDPOINT} is the name of the HTTP application: choose another name")
        self._config, self._client, self._environment = config, client, environment
        self._file = yaml.safe_load(Path(config.serve).read_text())
        self._file["http_options"] = {"host": config.host, "port": config.port}
        self._templates = {application["name"]: application for application in self._file["applications"]}
        running = client.get_serve_details()["applications"]
        self._previous: dict[str, Application] = {
            name: details["deployed_app_config"] for name, details in running.items() if details["deployed_app_config"]
        }

    def run(self) -> dict[str, str]:
        """Deploy; return the state of the endpoint and of the model.

        Raises:
            ChildProcessError: the model did not start or failed the gate; the previous models are still served.
        """
        name = self._config.name
        served = _models(self._previous[ENDPOINT]) if ENDPOINT in self._previous else [name]
        applications = self._previous | {name: self._model()}
        # A running endpoint gets a new name only after the model's replicas have passed the gate.
        for models in [served] if name in served else [served, [*served, name]]:
            states = self._deploy(applications | {ENDPOINT: self._endpoint(models)}, (ENDPOINT, name))
            if "DEPLOY_FAILED" in states.values():
                reasons = self._reasons(states)
                self._restore()
                causes = "; ".join(f"{application}: {cause_in(text)}" for application, text in reasons.items())
                message = f"{self._config.model} is not served as {name!r}: {causes}"
                raise ChildProcessError(message) from RuntimeError("\n".join(reasons.values()))
        return states

    def _model(self) -> Application:
        application = copy.deepcopy(self._templates.get(self._config.name, self._templates[TEMPLATE]))
        arguments = application.setdefault("args", {})
        arguments["folder"] = self._config.model
        if self._config.gate.records:
            arguments["gate"] = self._config.gate.model_dump()
        return self._with_code(application | {"name": self._config.name})

    def _endpoint(self, models: list[str]) -> Application:
        application = copy.deepcopy(self._templates[ENDPOINT])
        application["deployments"][0]["user_config"]["models"] = models
        return self._with_code(application)

    def _with_code(self, application: Application) -> Application:
        """Return an application with the submitted code and both the file's and the job's environment variables."""
        variables = application.get("runtime_env", {}).get("env_vars", {})
        variables = variables | self._environment.get("env_vars", {})
        return application | {"runtime_env": self._environment | {"env_vars": variables}}

    def _deploy(self, applications: dict[str, Application], awaited: tuple[str, ...]) -> dict[str, str]:
        """Deploy applications; return the states of the `awaited` ones when all run, one failed, or after `TIMEOUT`."""
        self._client.deploy_applications(self._file | {"applications": list(applications.values())})
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            details = self._client.get_serve_details()["applications"]
            states = {name: details[name]["status"] if name in details else "NOT_STARTED" for name in awaited}
            if "DEPLOY_FAILED" in states.values() or set(states.values()) == {"RUNNING"}:
                return states
            time.sleep(0.5)
        return dict.fromkeys(awaited, "DEPLOY_FAILED")

    def _reasons(self, states: dict[str, str]) -> dict[str, str]:
        """Return Serve's message for each application that did not start."""
        details = self._client.get_serve_details()["applications"]
        reasons = {}
        for name in states:
            deployments = details.get(name, {}).get("deployments", {}).values()
            messages = [deployment["message"] for deployment in deployments if deployment["message"]]
            if states[name] != "RUNNING":
                reasons[name] = " ".join(messages) or details.get(name, {}).get("message", "not started")
        return reasons

    def _restore(self) -> None:
        """Restore the previous configuration, so that Serve replaces lost replicas with replicas of the old model."""
        if ENDPOINT in self._previous:
            self._deploy(self._previous, tuple(self._previous))


def _models(endpoint: Application) -> list[str]:
    return endpoint["deployments"][0]["user_config"]["models"]


def deploy(config: DeployConfig) -> None:
    import ray
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    context = ray.init()
    # Contains URIs of the job's packages, so that replicas import the submitted code.
    environment = dict(ray.get_runtime_context().runtime_env)
    client = ServeSubmissionClient(f"http://{context.dashboard_url}")
    states = Rollout(config, client, environment).run()
    http = {"host": config.host, "port": config.port}
    print(json.dumps({"applications": states, "http": http, "model": config.model}))


if __name__ == "__main__":
    job.run(DeployConfig, deploy)
