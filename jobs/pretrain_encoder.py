"""Train the audio encoder as a multi-label sound tagger; Mellow then freezes it.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/pretrain_encoder.py --config jobs/configs/mellow-v0/pretrain_encoder.yaml \
    --shards s3://bucket/log-mel ...
"""

import json
import time

from mellow_platform import job
from mellow_platform.training.tagger_config import TaggerConfig


def pretrain(config: TaggerConfig) -> None:
    from mellow_platform.training import tagger
    from mellow_platform.training.trainer import summary

    start = time.monotonic()
    result = tagger.pretrain(config)
    print(json.dumps({"encoder": config.output} | summary(result, time.monotonic() - start)))


if __name__ == "__main__":
    job.run(TaggerConfig, pretrain)
