"""Answer questions about a folder or a table of clips.

Submitted again after it was killed, it goes on with the answers that are not written; when it is done, it does nothing.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/predict.py --model s3://bucket/model --clips s3://bucket/recordings --question "caption the audio." \
    --output s3://bucket/captions
"""

import json

from mellow_platform.config import PredictConfig, load
from mellow_platform.inference.predict import predict


def main() -> None:
    config = load(PredictConfig)
    print(json.dumps(predict(config), ensure_ascii=False))


if __name__ == "__main__":
    main()
