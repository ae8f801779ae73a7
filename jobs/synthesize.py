"""Write questions in ReasonAQA's format from captions, check them, and mix a corpus for jobs/preprocess.py.

Submitted again, a killed job resumes with unanswered requests; a finished job returns its report.
OPENAI_BASE_URL, OPENAI_MODEL and OPENAI_API_KEY in the environment of the driver set the language model.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/synthesize.py --captions s3://bucket/audiocaps/train.csv --writer endpoint --output s3://bucket/questions
"""

import json

from mellow_platform import job
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig

TOTALS = ("requested", "accepted", "rejected", "failed", "cost_usd", "seconds")


def synthesize(config: SynthesizeConfig) -> None:
    from mellow_platform.synthesis import synthesize_job
    from mellow_platform.synthesis.synthesis_report import markdown

    report = synthesize_job.synthesize(config)
    print(markdown(report))
    print(json.dumps({"corpus": config.output} | {name: report[name] for name in TOTALS}))


if __name__ == "__main__":
    job.run(SynthesizeConfig, synthesize)
