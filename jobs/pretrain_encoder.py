"""Train the audio encoder as a multi-label sound tagger; Mellow then freezes it.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/pretrain_encoder.py --config jobs/configs/mellow-v0/pretrain_encoder.yaml \
    --shards s3://bucket/log-mel ...
"""

import json
import time

from mellow_platform.config import EncoderConfig, load
from mellow_platform.model.encoders import encoder_parts
from mellow_platform.training.loop import summary
from mellow_platform.training.tagger import pretrain


def main() -> None:
    config = load(EncoderConfig)
    encoder_parts(config.encoder_name)  # an unknown name ends the job here, not on workers that would be retried
    start = time.monotonic()
    result = pretrain(config)
    print(json.dumps({"encoder": config.output} | summary(result, time.monotonic() - start)))


if __name__ == "__main__":
    main()
