"""Options of jobs/pretrain_encoder.py."""

from pydantic import Field

from mellow_platform.option_values import Tagger
from mellow_platform.settings import (
    Input,
)
from mellow_platform.training.run_config import RunSection


class TaggerConfig(RunSection):
    """Train the audio encoder as a sound tagger."""

    labels: Input = Field(description="labels.json, or AudioSet segment list (*.csv), with the tags of each clip")
    encoder_name: Tagger = Field("htsat", description="audio encoder to train")
    init_from: Input | None = Field(None, description="folder of an encoder to start from (default: fresh weights)")
