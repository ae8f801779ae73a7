"""A served tiny model for benchmarks and fuzzing, on a local cluster."""

import base64
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml

from mellow_platform.authentication import read_token
from mellow_platform.data.audio import encode
from mellow_platform.local_ray import LocalRay
from tests.conftest import REPOSITORY
from tests.tiny_model import write_tiny_model

RATE = 32_000
Change = Callable[[dict[str, Any], dict[str, Any]], None]  # edits the endpoint's and the model's application


class ServedModel(contextlib.AbstractContextManager):
    """serve/config.yaml deployed with a random tiny model named `mellow`, until the end of the `with` block.

    Args:
        folder: folder for the model and the cluster's log.
        change: edits the two applications before they are deployed; default: no change.
        cpus: logical CPUs of the cluster.
    """

    def __init__(self, folder: Path, change: Change | None = None, cpus: int = 8):
        self._ray = LocalRay(folder, cpus)
        self._stack = contextlib.ExitStack()
        self._change = change
        self.url = f"http://127.0.0.1:{self._ray.port}"
        self.model = self._ray.uri("model")

    def __enter__(self) -> "ServedModel":
        self._stack.enter_context(self._ray.running())
        try:
            write_tiny_model(self.model)
            config = yaml.safe_load((REPOSITORY / "serve/config.yaml").read_text())
            if self._change:
                self._change(*config["applications"])
            file = Path(self._ray.uri("serve.yaml"))
            file.write_text(yaml.safe_dump(config))
            port = str(self._ray.port)
            self._ray.submit("deploy", "--model", self.model, "--port", port, "--serve", str(file))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def replicas(self, application: str) -> list[dict[str, Any]]:
        """Return the running replicas of an application."""
        return replicas_of(serve_details(self._ray.dashboard), application)

    def processes(self) -> dict[int, psutil.Process]:
        """Return the processes that handle requests, by id: the proxy and all replicas."""
        raylet = psutil.Process(self.replicas("endpoint")[0]["pid"]).parent()
        assert raylet
        titles = {child: child.cmdline()[:1] for child in raylet.children()}
        parts = ("ray::ServeReplica", "ray::ProxyActor")
        return {child.pid: child for child, title in titles.items() if title and title[0].startswith(parts)}


def serve_details(dashboard: str) -> dict[str, Any]:
    """Return the status of Serve on a cluster: controller, proxies, applications with their replicas."""
    headers = {"Authorization": f"Bearer {read_token()}"}
    response = httpx.get(f"{dashboard}/api/serve/applications/", headers=headers, timeout=30)
    response.raise_for_status()
    return response.json()


def replicas_of(details: dict[str, Any], application: str) -> list[dict[str, Any]]:
    """Return the running replicas of an application."""
    deployments = details["applications"][application]["deployments"].values()
    return [replica for one in deployments for replica in one["replicas"] if replica["state"] == "RUNNING"]


def clip(seed: int = 0, seconds: float = 10.0) -> bytes:
    """Return a WAV file of noise."""
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    return encode(noise, RATE, "WAV")


def question(sound: bytes, text: str = "what is heard?", **fields: Any) -> bytes:
    """Return the body of a chat completion about one clip."""
    container = "flac" if sound.startswith(b"fLaC") else "wav"
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": container}}
    message = {"role": "user", "content": [{"type": "text", "text": text}, audio]}
    return json.dumps({"model": "mellow", "messages": [message], "max_tokens": 16} | fields).encode()
