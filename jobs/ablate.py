"""Train and score every point of a grid with several seeds, and write one table with a picture.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/ablate.py --config jobs/configs/ablation.yaml --output s3://bucket/ablation

The job fails when a run did, after the others are done and the table is written; submitted again, it trains those
that are missing alone.
"""

import json

from mellow_platform import storage
from mellow_platform.config import AblationConfig, load
from mellow_platform.training.ablation import run_ablation
from mellow_platform.training.ablation_report import markdown


def main() -> None:
    config = load(AblationConfig)
    report = run_ablation(config)
    print(markdown(report))
    failed = [item["run"] for point in report["points"] for item in point["failed"]]
    print(json.dumps({"table": storage.join(config.output, "table.md"), "failed": failed}))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; the reasons stand above")


if __name__ == "__main__":
    main()
