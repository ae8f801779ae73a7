"""Turn audio and question-answer records into Parquet shards.

Submitted again after it was killed, it goes on with the shards that are not written; when it is done, it does nothing.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/preprocess.py --config jobs/configs/preprocess.yaml --corpus s3://bucket/corpus --output s3://bucket/shards
"""

import json

from mellow_platform.config import PreprocessConfig, load
from mellow_platform.features.preprocess import preprocess


def main() -> None:
    config = load(PreprocessConfig)
    manifest = preprocess(config)
    print(
        json.dumps(
            {"shards": manifest.configuration["output"], "content_hash": manifest.content_hash, **manifest.counts}
        )
    )


if __name__ == "__main__":
    main()
