"""Train and score every point of a grid with several seeds, and write one table with a plot.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/ablate.py --config jobs/configs/ablation.yaml --output s3://bucket/ablation

If runs fail, the others finish, the table is written, and the job fails. When submitted again, it trains only the
missing runs.
"""

import json

from mellow_platform import job, storage
from mellow_platform.training.ablation_config import AblationConfig


def ablate(config: AblationConfig) -> None:
    from mellow_platform.training.ablation import run_ablation
    from mellow_platform.training.ablation_report import markdown

    report = run_ablation(config)
    print(markdown(report))
    failed = [item["run"] for point in report["points"] for item in point["failed"]]
    table = storage.join(config.output, "table.md")
    print(json.dumps({"table": table, "failed": failed}))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; their reasons are in {table}. Submit the job again to retry them")


if __name__ == "__main__":
    job.run(AblationConfig, ablate)
