"""Fine-tune Mellow on questions with answers, with Ray Train and DeepSpeed.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/train.py --config jobs/configs/recipes/published.yaml --shards s3://bucket/features ...
"""

import json
import time

from mellow_platform import job
from mellow_platform.training.train_config import TrainConfig


def train(config: TrainConfig) -> None:
    from mellow_platform.training.dry_run import describe, report
    from mellow_platform.training.finetune import finetune, load_examples
    from mellow_platform.training.trainer import summary

    if config.dry_run:
        plan = describe(config, load_examples(config))
        print(report(plan))
        print(json.dumps(plan))
        return
    start = time.monotonic()
    result = finetune(config)
    print(json.dumps({"model": config.output} | summary(result, time.monotonic() - start)))


if __name__ == "__main__":
    job.run(TrainConfig, train)
