"""What every audio encoder gives the rest of the platform, and the front end it hears."""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers.utils import ModelOutput

from mellow_platform.data.log_mel import FrontEnd


@dataclass
class AudioEncoderOutput(ModelOutput):
    """What an audio encoder says of a clip.

    frames [clips, num_frames, frame_size]: the clip in time; only distinct frames, no copies.
    latent [clips, hidden_size]: the whole clip.
    logits [clips, num_classes]: of each tag in the whole clip; None where the encoder has no tags.
    """

    frames: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class AudioEncoderConfig(Protocol):
    """What the configuration of an encoder must have, besides being a `PreTrainedConfig`.

    Without arguments it is the published size; `tiny()` is one that trains on two cores in minutes.
    An encoder with tags takes `num_classes` and `labels`, their names in order, as fields.
    """

    model_type: str
    num_classes: int  # tags; 0 where the encoder has none
    labels: list[str] | tuple[str, ...]

    @property
    def num_frames(self) -> int: ...

    @property
    def frame_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def front_end(self) -> FrontEnd: ...

    @classmethod
    def tiny(cls) -> "AudioEncoderConfig": ...


class AudioEncoder(Protocol):
    """What an encoder must have, besides being a `PreTrainedModel` built from its configuration alone."""

    config: AudioEncoderConfig

    def forward(self, input_features: torch.Tensor) -> AudioEncoderOutput:
        """Encode log-mel spectrograms [clips, frames, bands] in dB, made by the configuration's front end."""
        ...
