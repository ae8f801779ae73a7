"""Options of jobs/make_corpus.py."""

from typing import Literal

from pydantic import Field, model_validator

from mellow_platform.settings import (
    Input,
    Output,
    Section,
)


class CorpusConfig(Section):
    """Write a corpus for jobs/preprocess.py without a download: synthetic scenes, or labelled recordings."""

    source: Literal["scenes", "recordings"] = Field(
        "scenes", description="clips of the corpus: synthetic scenes, or the recordings in --recordings"
    )
    recordings: Input | None = Field(
        None, description="folder of labelled recordings (docs/guides/recordings.md); required for --source recordings"
    )
    output: Output = Field(description="folder to write the corpus to")
    seed: int = Field(0, description="seed of the corpus; the same seed gives the same bytes")
    train_clips: int = Field(1200, ge=1, description="number of scenes in the train split")
    val_clips: int = Field(40, ge=1, description="number of scenes in the val split")
    test_clips: int = Field(240, ge=1, description="number of scenes in the test split")
    rounds: int | None = Field(
        None,
        ge=1,
        description="questions of each family per training clip (default: 3 for scenes; for recordings the number "
        "that gives 12,000 questions, 40 at most)",
    )

    @model_validator(mode="after")
    def _recordings_need_a_folder(self) -> "CorpusConfig":
        if self.source == "recordings" and not self.recordings:
            raise ValueError("source: recordings needs `recordings`, a folder of labelled recordings")
        return self
