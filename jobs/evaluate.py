"""Answer the questions of benchmarks with a model, and score the answers.

A killed job, submitted again, answers only the missing questions. With `--against`, the output of another evaluation,
the job fails if a score is significantly lower.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/evaluate.py --benchmark all --model s3://bucket/model --shards s3://bucket/features \
    --output s3://bucket/evaluation
"""

import json

from mellow_platform import job
from mellow_platform.evaluation.evaluate_config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> None:
    from mellow_platform.evaluation import evaluate_job
    from mellow_platform.evaluation.evaluation_report import main_score, markdown

    report = evaluate_job.evaluate(config)
    print(markdown(report))
    scored = {name: each for name, each in report["benchmarks"].items() if "scores" in each}
    scores = {name: {c: round(s["value"], 4) for c, s in main_score(each).items()} for name, each in scored.items()}
    lower = report.get("comparison", {}).get("lower", [])
    print(json.dumps({"report": config.output, "scores": scores, "lower": lower}))
    if lower:
        raise SystemExit(f"scores are significantly lower than in {config.against}: {', '.join(lower)}")


if __name__ == "__main__":
    job.run(EvaluateConfig, evaluate)
