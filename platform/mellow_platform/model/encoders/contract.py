"""What every audio encoder gives the rest of the platform, and the front end it hears."""

from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class FrontEnd:
    """The log-mel spectrogram that an encoder hears; the defaults are Mellow's published ones.

    Attributes:
        feature_size: number of Slaney mel bands.
        sampling_rate: of the waveforms, in Hz.
        clip_seconds: length every clip is brought to.
        n_fft: samples in a periodic Hann window.
        hop_length: samples between frames.
        min_frequency, max_frequency: of the bands, in Hz.
    """

    feature_size: int = 64
    sampling_rate: int = 32_000
    clip_seconds: float = 10.0
    n_fft: int = 1024
    hop_length: int = 320
    min_frequency: float = 50.0
    max_frequency: float = 14_000.0

    @property
    def num_frames(self) -> int:
        """Frames of one clip's spectrogram (1001 as published)."""
        return 1 + round(self.clip_seconds * self.sampling_rate) // self.hop_length

    def differences(self, other: "FrontEnd") -> str:
        """Return the values in which `other` is another front end, for an error message; empty where it is the same."""
        theirs = asdict(other)
        return ", ".join(
            f"{name} {value:g} against {theirs[name]:g}"
            for name, value in asdict(self).items()
            if value != theirs[name]
        )


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
