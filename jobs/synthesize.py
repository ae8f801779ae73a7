"""Write questions in ReasonAQA's format from captions, check them, and mix a corpus for jobs/preprocess.py.

Submitted again after it was killed, it goes on with the requests that have no answer; when it is done, it does nothing.
A language model is named by OPENAI_BASE_URL, OPENAI_MODEL and OPENAI_API_KEY in the cluster's environment.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/synthesize.py --captions s3://bucket/audiocaps/train.csv --writer endpoint --output s3://bucket/questions
"""

import json

from mellow_platform.config import SynthesizeConfig, load
from mellow_platform.synthesis.report import markdown
from mellow_platform.synthesis.synthesize import synthesize

TOTALS = ("requested", "accepted", "rejected", "failed", "cost_usd", "seconds")


def main() -> None:
    config = load(SynthesizeConfig)
    report = synthesize(config)
    print(markdown(report))
    print(json.dumps({"corpus": config.output} | {name: report[name] for name in TOTALS}))


if __name__ == "__main__":
    main()
