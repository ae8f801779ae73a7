"""Configuration of the Mellow network in Hugging Face form, and its named sizes."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .encoders import AudioEncoderConfig, encoder_parts
from .projections import projection_class

SIZES = ("mellow-v0", "mellow-tiny")
# Audio tokens of a clip besides the first; `frame_repeat` is chosen to come close to this number.
PUBLISHED_AUDIO_TOKENS, TINY_AUDIO_TOKENS = 128, 16


@strict
class MellowConfig(PreTrainedConfig):
    r"""
    Mellow (arXiv 2503.08540): audio encoder, projection, and a decoder that reads
    `[audio 1][separator][audio 2][separator][prompt]` and generates the answer. The encoder is one of
    `mellow_platform.model.encoders`; the decoder is any causal language model of Llama's shape, or GPT-2.

    projection (`str`, *optional*, defaults to `"mellow"`):
        Name in `PROJECTIONS` of the projection from encoder frames to decoder embeddings.
    lora (`dict`, *optional*):
        Fields of peft's `LoraConfig` (`r`, `lora_alpha`, `lora_dropout`, `target_modules`) of the decoder's adapters;
        None without adapters.
    frame_repeat (`int`, *optional*, defaults to 32):
        Copies of each encoder frame.
    pool_size (`int`, *optional*, defaults to 8):
        Number of copied frames averaged into one audio token.
    projection_dropout (`float`, *optional*, defaults to 0.5):
        Dropout inside the projection.
    separator_token_id (`int`, *optional*, defaults to 0):
        Token whose embedding separates the clips and the prompt.
    """

    model_type = "mellow"
    sub_configs_defaults = {  # noqa: RUF012 (transformers' form)
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="mellow_htsat"),
    }

    audio_config: Any = None  # the encoder's configuration, or its dictionary
    text_config: Any = None  # the decoder's configuration, or its dictionary
    projection: str = "mellow"
    lora: dict[str, Any] | None = None
    frame_repeat: int = 32
    pool_size: int = 8
    projection_dropout: float | int = 0.5
    separator_token_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        projection_class(self.projection)
        if self.frame_repeat % self.pool_size:
            raise ValueError(
                f"frame_repeat {self.frame_repeat} is not a multiple of pool_size {self.pool_size}, "
                "so an audio token would mix two frames; choose a multiple"
            )
        self.eos_token_id = self.text_config.eos_token_id
        self.pad_token_id = self.text_config.pad_token_id
        if self.pad_token_id is None:  # GPT-2 has none
            self.pad_token_id = self.eos_token_id

    @property
    def num_audio_tokens(self) -> int:
        """Positions of one clip in the decoder's sequence (129 as published)."""
        return 1 + self.audio_config.num_frames * self.frame_repeat // self.pool_size

    @classmethod
    def from_size(
        cls,
        size: str,
        *,
        encoder: str = "htsat",
        projection: str = "mellow",
        vocab_size: int | None = None,
        audio_config: AudioEncoderConfig | None = None,
        text_config: PreTrainedConfig | None = None,
    ) -> "MellowConfig":
        """Return the configuration of a named size.

        Args:
            size: `mellow-v0` (as published) or `mellow-tiny` (the same code at about 2 M parameters).
            encoder: name of the audio encoder.
            projection: name of the projection.
            vocab_size: size of the vocabulary of the tiny size's tokenizer.
            audio_config: configuration of a trained encoder, instead of a new one.
            text_config: configuration of a trained decoder, instead of the size's own; its end token separates clips.

        Raises:
            ValueError: unknown size, encoder or projection.
        """
        audio = audio_config or encoder_config(size, encoder=encoder)
        tiny = size == "mellow-tiny"
        text = text_config or (tiny_decoder_config(vocab_size or 1024) if tiny else smollm2_135m_config())
        pool_size = 8
        copies = max(1, round((TINY_AUDIO_TOKENS if tiny else PUBLISHED_AUDIO_TOKENS) / audio.num_frames))
        return cls(
            audio_config=audio,
            text_config=text,
            projection=projection,
            frame_repeat=pool_size * copies,
            pool_size=pool_size,
            projection_dropout=0.0 if tiny else 0.5,
            separator_token_id=text.eos_token_id,
        )


def encoder_config(size: str, labels: list[str] | None = None, encoder: str = "htsat") -> Any:
    """Return the configuration of an audio encoder at a named size, with the tags `labels` if set.

    Raises:
        ValueError: unknown size or encoder, or labels for an encoder without tags.
    """
    kind, _ = encoder_parts(encoder)
    if size not in SIZES:
        raise ValueError(f"model size {size!r} does not exist; choose one of {', '.join(SIZES)}")
    config = kind.tiny() if size == "mellow-tiny" else kind()
    if labels:
        if not config.num_classes:
            raise ValueError(
                f"audio encoder {encoder} has no tags to train; use pretrained weights, or another encoder"
            )
        config.num_classes = len(labels)
        config.labels = list(labels)
    return config


def smollm2_135m_config() -> LlamaConfig:
    """Return the configuration of base SmolLM2-135M with Mellow's end and padding tokens."""
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


def tiny_decoder_config(vocab_size: int) -> LlamaConfig:
    """Return the configuration of a Llama decoder that trains on two cores in minutes."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # With the default range, untrained attention at this width is nearly uniform, and the model needs many times
        # the steps to learn which letter belongs to which choice.
        initializer_range=0.14,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
