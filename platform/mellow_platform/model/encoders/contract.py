"""Interface of audio encoders: configuration, input and output."""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers.utils import ModelOutput

from mellow_platform.data.log_mel import FrontEnd


@dataclass
class AudioEncoderOutput(ModelOutput):
    """Outputs of an audio encoder.

    frames [clips, num_frames, frame_size]: features over time, without copies.
    latent [clips, hidden_size]: features of the whole clip.
    logits [clips, num_classes]: logit of each tag in the whole clip; None if the encoder has no tags.
    """

    frames: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class AudioEncoderConfig(Protocol):
    """Configuration of an encoder, a `PreTrainedConfig` with these members.

    Without arguments it is the published size; `tiny()` trains on two cores in minutes. An encoder with tags has the
    fields `num_classes` and `labels`, the names of the tags in order.
    """

    model_type: str
    num_classes: int  # tags; 0 if the encoder has none
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
    """An encoder, a `PreTrainedModel` whose constructor takes only its configuration."""

    config: AudioEncoderConfig

    def forward(self, input_features: torch.Tensor) -> AudioEncoderOutput:
        """Encode log-mel spectrograms [clips, frames, bands] in dB by the configuration's front end."""
        ...
