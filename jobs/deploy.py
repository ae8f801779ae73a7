"""Deploy the Serve application with the code of this job, and wait until it answers.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- python jobs/deploy.py --model s3://bucket/model
"""

import json
import time
from pathlib import Path

import ray
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from mellow_platform.config import DeployConfig, load

TIMEOUT = 300.0  # seconds


def main() -> None:
    config = load(DeployConfig)
    serve_config = yaml.safe_load(Path(config.serve).read_text())
    context = ray.init()
    # The job's packages, by the URIs it was submitted with: replicas import what was submitted.
    environment = dict(ray.get_runtime_context().runtime_env)
    names = []
    for application in serve_config["applications"]:
        application.setdefault("args", {})["model"] = config.model
        application["runtime_env"] = environment
        names.append(application["name"])
    if config.port:
        serve_config["http_options"]["port"] = config.port
    client = ServeSubmissionClient(f"http://{context.dashboard_url}")
    client.deploy_applications(serve_config)
    start = time.monotonic()
    while True:
        details = client.get_serve_details()["applications"]
        states = {name: details[name]["status"] for name in names if name in details}
        if list(states.values()) == ["RUNNING"] * len(names):
            break
        if "DEPLOY_FAILED" in states.values() or time.monotonic() - start > TIMEOUT:
            raise SystemExit(
                f"deployment failed after {time.monotonic() - start:.0f} s: {json.dumps(details, default=str)}"
            )
        time.sleep(0.5)
    print(json.dumps({"applications": states, "http": serve_config["http_options"], "model": config.model}))


if __name__ == "__main__":
    main()
