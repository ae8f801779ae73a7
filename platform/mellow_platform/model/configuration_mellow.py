"""Configuration of the Mellow network and its audio encoder, in Hugging Face form."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, ClapAudioConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

SIZES = ("mellow-v0", "mellow-tiny")


@strict
class HTSATConfig(ClapAudioConfig):
    r"""
    HTSAT (arXiv 2202.00874), the sound tagger that Mellow freezes as its audio encoder. The defaults are the
    published ones; all fields but the tags are those of `ClapAudioConfig`, which describes the same Swin network.

    labels (`list[str]`, *optional*):
        Names of the `num_classes` tags, in order; empty where they are unknown.
    spec_augment_stripes (`int`, *optional*, defaults to 2):
        Stripes blanked in training along each axis of the spectrogram (SpecAugment).
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
        """Number of blocks of time stacked along frequency to make the square image."""
        return self.spec_size // self.num_mel_bins

    @property
    def num_frames(self) -> int:
        """Number of distinct time frames that the encoder gives a clip (32 as published)."""
        return self.final_grid * self.fold


@strict
class MellowConfig(PreTrainedConfig):
    r"""
    Mellow (arXiv 2503.08540): audio encoder, projection, and a Llama decoder that reads
    `[audio 1][separator][audio 2][separator][prompt]` and writes the answer.

    frame_repeat (`int`, *optional*, defaults to 32):
        How often HTSAT repeats each distinct frame.
    pool_size (`int`, *optional*, defaults to 8):
        How many repeated frames are averaged into one audio token.
    projection_dropout (`float`, *optional*, defaults to 0.5):
        Dropout inside the projection.
    separator_token_id (`int`, *optional*, defaults to 0):
        Token whose embedding separates the clips and the prompt.
    """

    model_type = "mellow"
    sub_configs_defaults = {  # noqa: RUF012 (the form transformers reads)
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="mellow_htsat"),
    }

    audio_config: Any = None  # an HTSATConfig, or its dictionary
    text_config: Any = None  # the decoder's configuration, or its dictionary
    frame_repeat: int = 32
    pool_size: int = 8
    projection_dropout: float | int = 0.5
    separator_token_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.frame_repeat % self.pool_size:
            raise ValueError(
                f"frame_repeat {self.frame_repeat} is not a multiple of pool_size {self.pool_size}: "
                "an audio token would mix two frames; choose a multiple"
            )
        self.pad_token_id = self.text_config.pad_token_id
        self.eos_token_id = self.text_config.eos_token_id

    @property
    def num_audio_tokens(self) -> int:
        """Positions that one clip takes in the decoder's sequence (129 as published)."""
        return 1 + self.audio_config.num_frames * self.frame_repeat // self.pool_size

    @classmethod
    def from_size(
        cls,
        size: str,
        *,
        vocab_size: int | None = None,
        audio_config: HTSATConfig | None = None,
        text_config: LlamaConfig | None = None,
    ) -> "MellowConfig":
        """Return the configuration of a named size.

        Args:
            size: `mellow-v0` (as published) or `mellow-tiny` (the same code at about 2 M parameters).
            vocab_size: number of tokens of the tiny size's own tokenizer.
            audio_config: of a trained encoder, in place of the size's own.
            text_config: of a trained decoder, in place of the size's own.

        Raises:
            ValueError: no such size.
        """
        if size == "mellow-v0":
            return cls(
                audio_config=audio_config or HTSATConfig(),
                text_config=text_config or smollm2_135m_config(),
            )
        if size == "mellow-tiny":
            return cls(
                audio_config=audio_config or tiny_encoder_config(),
                text_config=text_config or tiny_decoder_config(vocab_size or 1024),
                frame_repeat=8,
                projection_dropout=0.0,
            )
        raise ValueError(f"model size {size!r} does not exist; choose one of {', '.join(SIZES)}")


def encoder_config(size: str, labels: list[str] | None = None) -> HTSATConfig:
    """Return the audio encoder's configuration of a named size, with the tags `labels` when given."""
    config = MellowConfig.from_size(size).audio_config
    if labels:
        config.num_classes = len(labels)
        config.labels = list(labels)
    return config


def smollm2_135m_config() -> LlamaConfig:
    """The base SmolLM2-135M, with Mellow's end and padding tokens."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=17,
    )


def tiny_encoder_config() -> HTSATConfig:
    """HTSAT on a 128 x 128 image: 256 frames of 64 bands folded in two, 16 distinct frames."""
    return HTSATConfig(
        spec_size=128,
        patch_embeds_hidden_size=32,
        depths=[2, 2, 2],
        num_attention_heads=[2, 4, 8],
        num_classes=64,
        num_hidden_layers=3,
        drop_path_rate=0.0,
        spec_augment_stripes=0,
        # Weights near 1/sqrt(fan-in): at widths this small the default is too quiet to start learning.
        initializer_factor=3.0,
    )


def tiny_decoder_config(vocab_size: int) -> LlamaConfig:
    """A Llama decoder small enough to train on two cores in minutes."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # Untrained attention at this width has to be sharp enough to be told apart from an average, or a model of
        # this size needs many times the steps to learn which letter stands before which choice.
        initializer_range=0.14,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
