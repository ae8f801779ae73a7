"""Whisper's encoder (arXiv 2212.04356) on clips of 10 seconds; it was trained on 30."""

import os

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, WhisperConfig, WhisperModel
from transformers.modeling_utils import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .contract import AudioEncoderOutput, FrontEnd


@strict
class WhisperAudioConfig(WhisperConfig):
    r"""
    Whisper's encoder as an audio encoder of Mellow. The defaults are those of `openai/whisper-tiny`. The other fields
    are those of `WhisperConfig`; only the encoder's are used.

    num_frames (`int`, *optional*, defaults to 125):
        Frames per clip: means of neighbouring encoder positions, 500 by default.
    n_fft, hop_length (`int`, *optional*, default to 400 and 160):
        Window and hop of the spectrogram, in samples at 16 kHz.
    """

    model_type = "mellow_whisper"

    num_frames: int = 125
    n_fft: int = 400
    hop_length: int = 160

    # Whisper transcribes; it has no tags.
    num_classes = 0
    labels = ()

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.max_source_positions = (self.front_end.num_frames - 1) // 2
        if self.max_source_positions % self.num_frames:
            raise ValueError(
                f"num_frames {self.num_frames} does not divide the {self.max_source_positions} positions of a clip; "
                "choose a divisor"
            )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs) -> "WhisperAudioConfig":
        """Load the configuration from a folder of this encoder or of a complete Whisper."""
        values, unused = cls.get_config_dict(folder, **kwargs)
        return cls.from_dict(values | {"model_type": cls.model_type}, **unused)

    @property
    def frame_size(self) -> int:
        """Width of a frame."""
        return self.d_model

    @property
    def front_end(self) -> FrontEnd:
        return FrontEnd(
            feature_size=self.num_mel_bins,
            sampling_rate=16_000,
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            min_frequency=0.0,
            max_frequency=8_000.0,
        )

    @classmethod
    def tiny(cls) -> "WhisperAudioConfig":
        """Return two narrow layers over a quarter of Whisper's frames: 25 frames of 125 positions."""
        return cls(
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            hop_length=640,
            n_fft=1024,
            num_frames=25,
        )


class WhisperAudioEncoder(PreTrainedModel):
    """Whisper's encoder; frames are means of neighbouring positions, the latent is the mean of all positions.

    `from_pretrained` takes a folder of this encoder or of a complete Whisper.
    """

    config_class = WhisperAudioConfig
    base_model_prefix = "whisper_audio"
    main_input_name = "input_features"
    _supports_sdpa = True

    def __init__(self, config: WhisperAudioConfig):
        super().__init__(config)
        self.whisper = WhisperEncoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *args, **kwargs) -> "WhisperAudioEncoder":
        """Load `folder`; from a complete Whisper, the encoder with the positions of the first 10 of 30 seconds."""
        if AutoConfig.from_pretrained(folder).model_type != WhisperConfig.model_type:
            return super().from_pretrained(folder, *args, **kwargs)
        encoder = cls(cls.config_class.from_pretrained(folder))
        weights = WhisperModel.from_pretrained(folder, *args, **kwargs).encoder.state_dict()
        positions = "embed_positions.weight"
        weights[positions] = weights[positions][: encoder.config.max_source_positions]
        encoder.whisper.load_state_dict(weights)
        return encoder.to(weights[positions].dtype)

    @staticmethod
    def normalise(decibels: torch.Tensor) -> torch.Tensor:
        """Map log-mel spectrograms [clips, frames, bands] in dB to Whisper's input [clips, bands, frames - 1].

        Whisper drops the last frame, clamps at 80 dB below the maximum of a clip, and scales values to about 1.
        """
        bels = decibels[:, :-1].transpose(1, 2) / 10
        return (torch.maximum(bels, bels.amax(dim=(1, 2), keepdim=True) - 8) + 4) / 4

    def forward(self, input_features: torch.Tensor, **kwargs) -> AudioEncoderOutput:
        """Encode log-mel spectrograms [clips, frames, bands] in dB."""
        hidden = self.whisper(self.normalise(input_features)).last_hidden_state
        frames = hidden.unflatten(1, (self.config.num_frames, -1)).mean(dim=2)
        return AudioEncoderOutput(frames=frames, latent=hidden.mean(dim=1))
