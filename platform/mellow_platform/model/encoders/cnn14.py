"""Cnn14 of PANNs (arXiv 1912.10211): a convolutional sound tagger."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .contract import AudioEncoderOutput, FrontEnd
from .spec_augment import SpecAugmentedNorm

BLOCKS = 6
HALVINGS = 5  # the last block keeps the resolution


@strict
class Cnn14Config(PreTrainedConfig):
    r"""
    Cnn14 of PANNs (arXiv 1912.10211). The defaults are the published ones, with Mellow's published front end.

    width (`int`, *optional*, defaults to 64):
        Channels of the first block; every block doubles them (2048 in the sixth).
    num_classes (`int`, *optional*, defaults to 527):
        Number of tags.
    labels (`list[str]`, *optional*):
        Names of the tags, in order; empty if unknown.
    num_mel_bins, n_fft, hop_length (`int`, *optional*, default to 64, 1024 and 320):
        Bands, window and step of the spectrogram; samples at 32 kHz.
    spec_augment_stripes (`int`, *optional*, defaults to 2):
        Stripes masked in training along each axis of the spectrogram (SpecAugment).
    block_dropout, classifier_dropout (`float`, *optional*, default to 0.2 and 0.5):
        Dropout after each block, and around the embedding.
    """

    model_type = "mellow_cnn14"

    width: int = 64
    num_classes: int = 527
    labels: list[str] | tuple[str, ...] = ()
    num_mel_bins: int = 64
    n_fft: int = 1024
    hop_length: int = 320
    spec_augment_stripes: int = 2
    block_dropout: float | int = 0.2
    classifier_dropout: float | int = 0.5

    @property
    def hidden_size(self) -> int:
        """Width of the embedding (2048 as published)."""
        return self.width * 2 ** (BLOCKS - 1)

    @property
    def frame_size(self) -> int:
        """Width of a frame: the channels of the last block."""
        return self.hidden_size

    @property
    def num_frames(self) -> int:
        """Frames of a clip after pooling (31 of the spectrogram's 1001 as published)."""
        return self.front_end.num_frames // 2**HALVINGS

    @property
    def front_end(self) -> FrontEnd:
        return FrontEnd(feature_size=self.num_mel_bins, n_fft=self.n_fft, hop_length=self.hop_length)

    @classmethod
    def tiny(cls) -> "Cnn14Config":
        """Return Cnn14 at an eighth of the width on the tiny front end: 7 frames."""
        return cls(
            width=8,
            num_classes=64,
            n_fft=2048,
            hop_length=1280,
            spec_augment_stripes=0,
            block_dropout=0.0,
            classifier_dropout=0.0,
        )


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map [clips, inputs, frames, bands] to [clips, outputs, frames, bands]."""
        image = torch.relu(self.bn1(self.conv1(image)))
        return torch.relu(self.bn2(self.conv2(image)))


class Cnn14Encoder(PreTrainedModel):
    """Cnn14: six blocks of convolutions over the log-mel spectrogram, halved after each of the first five.

    Frames are the last block's channels, averaged over frequency; the latent is PANNs' embedding of the clip. Layers
    have the names of PANNs' checkpoints.
    """

    config_class = Cnn14Config
    base_model_prefix = "cnn14"
    main_input_name = "input_features"

    def __init__(self, config: Cnn14Config):
        super().__init__(config)
        self.bn0 = SpecAugmentedNorm(config.num_mel_bins, config.spec_augment_stripes)
        widths = [1] + [config.width * 2**number for number in range(BLOCKS)]
        for number in range(BLOCKS):
            self.add_module(f"conv_block{number + 1}", ConvBlock(widths[number], widths[number + 1]))
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc_audioset = nn.Linear(config.hidden_size, config.num_classes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, input_features: torch.Tensor, **kwargs) -> AudioEncoderOutput:
        """Encode log-mel spectrograms [clips, frames, bands] in dB."""
        image = self.bn0(input_features[:, None].transpose(1, 3)).transpose(1, 3)
        for number in range(BLOCKS):
            image = self.get_submodule(f"conv_block{number + 1}")(image)
            if number < HALVINGS:
                image = nn.functional.avg_pool2d(image, 2)
            image = nn.functional.dropout(image, self.config.block_dropout, self.training)
        frames = image.mean(dim=3).transpose(1, 2)
        summary = frames.amax(dim=1) + frames.mean(dim=1)
        latent = torch.relu(self.fc1(self._drop(summary)))
        return AudioEncoderOutput(frames=frames, latent=latent, logits=self.fc_audioset(self._drop(latent)))

    def _drop(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(features, self.config.classifier_dropout, self.training)
