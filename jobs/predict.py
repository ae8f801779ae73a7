"""Answer questions about a folder or a table of clips.

A resubmitted job resumes with the missing answers; a finished job does nothing.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/predict.py --model s3://bucket/model --clips s3://bucket/recordings --question "caption the audio." \
    --output s3://bucket/captions
"""

import json

from mellow_platform import job
from mellow_platform.inference.predict_config import PredictConfig


def predict(config: PredictConfig) -> None:
    from mellow_platform.inference import predict_job

    print(json.dumps(predict_job.predict(config), ensure_ascii=False))


if __name__ == "__main__":
    job.run(PredictConfig, predict)
