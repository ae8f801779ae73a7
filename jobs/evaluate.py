"""Answer the questions of benchmarks with a model, and score the answers.

Submitted again after it was killed, it goes on with the answers that are not written. With `--against`, the output of
another evaluation, it fails where a score is significantly lower.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/evaluate.py --benchmark all --model s3://bucket/model --shards s3://bucket/features \
    --output s3://bucket/evaluation
"""

import json

from mellow_platform.config import EvaluateConfig, load
from mellow_platform.evaluation.evaluate import evaluate
from mellow_platform.evaluation.report import markdown, of_main


def main() -> None:
    config = load(EvaluateConfig)
    report = evaluate(config)
    print(markdown(report))
    scored = {name: each for name, each in report["benchmarks"].items() if "scores" in each}
    scores = {name: {c: round(s["value"], 4) for c, s in of_main(each).items()} for name, each in scored.items()}
    lower = report.get("comparison", {}).get("lower", [])
    print(json.dumps({"report": config.output, "scores": scores, "lower": lower}))
    if lower:
        raise SystemExit(f"significantly lower than {config.against}: {', '.join(lower)}")


if __name__ == "__main__":
    main()
