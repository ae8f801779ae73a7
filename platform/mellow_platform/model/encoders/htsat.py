"""HTSAT, the published audio encoder: a Swin transformer that tags every frame of a clip."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import ClapAudioConfig, ClapAudioModel
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .contract import AudioEncoderOutput, FrontEnd
from .spec_augment import SpecAugmentedNorm


@strict
class HTSATConfig(ClapAudioConfig):
    r"""
    HTSAT (arXiv 2202.00874), the sound tagger that is Mellow's frozen audio encoder. The defaults are the published
    ones. The other fields are those of `ClapAudioConfig`, which describes the same Swin network.

    labels (`list[str]`, *optional*):
        Names of the `num_classes` tags, in order; empty if unknown.
    spec_augment_stripes (`int`, *optional*, defaults to 2):
        Stripes masked in training along each axis of the spectrogram (SpecAugment).
    """

    model_type = "mellow_htsat"

    labels: list[str] | tuple[str, ...] = ()
    spec_augment_stripes: int = 2
    drop_path_rate: float | int = 0.1
    hidden_dropout_prob: float | int = 0.0

    def __post_init__(self, **kwargs):
        self.hidden_size = int(self.patch_embeds_hidden_size * 2 ** (len(self.depths) - 1))
        super().__post_init__(**kwargs)

    @property
    def final_grid(self) -> int:
        """Height and width of the last stage's feature map."""
        return self.spec_size // self.patch_stride[0] // 2 ** (len(self.depths) - 1)

    @property
    def fold(self) -> int:
        """Number of time blocks stacked along frequency to form the square image."""
        return self.spec_size // self.num_mel_bins

    @property
    def num_frames(self) -> int:
        """Number of distinct time frames per clip (32 as published)."""
        return self.final_grid * self.fold

    @property
    def frame_size(self) -> int:
        """Width of a frame: one probability per tag."""
        return self.num_classes

    @property
    def front_end(self) -> FrontEnd:
        """The published spectrogram; a smaller image has a longer hop and window."""
        hop_length = 320 * 1024 // (self.spec_size * self.fold)
        n_fft = max(1024, 2 ** (hop_length - 1).bit_length())
        return FrontEnd(feature_size=self.num_mel_bins, n_fft=n_fft, hop_length=hop_length)

    @classmethod
    def tiny(cls) -> "HTSATConfig":
        """Return HTSAT on a 128 x 128 image: 256 frames of 64 bands folded in two, 16 distinct frames."""
        return cls(
            spec_size=128,
            patch_embeds_hidden_size=32,
            depths=[2, 2, 2],
            num_attention_heads=[2, 4, 8],
            num_classes=64,
            num_hidden_layers=3,
            drop_path_rate=0.0,
            spec_augment_stripes=0,
            # Weights near 1/sqrt(fan-in): at this width the default is too small to start learning.
            initializer_factor=3.0,
        )


class HTSATEncoder(PreTrainedModel):
    """HTSAT: a Swin transformer over the folded log-mel spectrogram, with tags per frame.

    Frames are tag probabilities; the latent is the mean of the final feature map. The Swin network is transformers'
    `ClapAudioModel`; the tag head is HTSAT's.
    """

    config_class = HTSATConfig
    base_model_prefix = "htsat"
    main_input_name = "input_features"

    def __init__(self, config: HTSATConfig):
        super().__init__(config)
        self.swin = ClapAudioModel(config)
        self.swin.audio_encoder.batch_norm = SpecAugmentedNorm(config.num_mel_bins, config.spec_augment_stripes)
        bins = config.final_grid // config.fold
        self.tscam_conv = nn.Conv2d(config.hidden_size, config.num_classes, (bins, 3), padding=(0, 1))
        # Published checkpoints contain this layer; no output depends on it.
        self.head = nn.Linear(config.num_classes, config.num_classes).requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, input_features: torch.Tensor, **kwargs) -> AudioEncoderOutput:
        """Encode log-mel spectrograms [clips, frames, bands] in dB."""
        features = self.swin(input_features=input_features[:, None])
        logits = self.tscam_conv(features.last_hidden_state).squeeze(2)
        return AudioEncoderOutput(
            frames=logits.sigmoid().transpose(1, 2), latent=features.pooler_output, logits=logits.mean(dim=2)
        )
