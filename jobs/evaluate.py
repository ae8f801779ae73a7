"""Answer a split with a trained model and score it by question family.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/evaluate.py --model s3://bucket/model --shards s3://bucket/features --output s3://bucket/evaluation
"""

import json

from mellow_platform.config import EvaluateConfig, load
from mellow_platform.evaluation.evaluate import evaluate, markdown


def main() -> None:
    config = load(EvaluateConfig)
    report = evaluate(config)
    print(markdown(report))
    print(json.dumps({"report": config.output, "overall": report["overall"]}))


if __name__ == "__main__":
    main()
