"""Convert audio and question-answer records to Parquet shards.

A resubmitted job resumes with the missing shards; a finished job does nothing.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/preprocess.py --config jobs/configs/mellow-v0/preprocess.yaml --corpus s3://bucket/corpus \
    --output s3://bucket/shards
"""

import json

from mellow_platform import job
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig


def preprocess(config: PreprocessConfig) -> None:
    from mellow_platform.preprocessing import preprocess_job

    manifest = preprocess_job.preprocess(config)
    shards = manifest.configuration["output"]
    print(json.dumps({"shards": shards, "content_hash": manifest.content_hash, **manifest.counts}))


if __name__ == "__main__":
    job.run(PreprocessConfig, preprocess)
