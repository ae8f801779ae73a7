"""Options of jobs/train.py."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mellow_platform.option_values import SYNTHETIC_SUBTYPES, Projection
from mellow_platform.settings import (
    Decoder,
    Input,
    Names,
    Section,
)
from mellow_platform.training.run_config import RunSection

PartnerDraws = Literal["stored", "clip", "question"]


class LoRASection(Section):
    """LoRA adapters on the decoder, whose own weights are then frozen. Published: rank 256, alpha 256, dropout 0.1."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0 trains the whole decoder without adapters")
    alpha: float = Field(256.0, gt=0, description="scale of the adapters: their output is multiplied by alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability of the adapters' input")
    target_modules: Names | None = Field(
        None, description="layers that get adapters (default: q_proj,v_proj, or c_attn for a GPT-2)"
    )

    def peft_fields(self) -> dict[str, Any] | None:
        """Return the fields of peft's `LoraConfig`, or None at rank 0."""
        if not self.rank:
            return None
        fields = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return fields | ({"target_modules": self.target_modules} if self.target_modules else {})


class TrainConfig(RunSection):
    """Fine-tune Mellow on questions with answers."""

    encoder: Input | None = Field(
        None,
        description="folder of the frozen encoder that the shards were made with; required unless --init-from is set"
        " (default: the encoder of --init-from)",
    )
    decoder: Decoder | None = Field(
        None,
        description="hub name, folder or GGUF file of the decoder's weights (default: those of --init-from, else "
        "fresh weights)",
    )
    pretrained: bool = Field(
        True, description="take the weights of --decoder; false takes only its configuration, with fresh weights"
    )
    init_from: Input | None = Field(
        None,
        description="folder of a Mellow model to start from, instead of --encoder and --decoder; required unless "
        "--encoder is set",
    )
    projection: Projection = Field(
        "mellow", description="projection from encoder frames to decoder embeddings; mellow is the published one"
    )
    lora: LoRASection = LoRASection()
    synthetic_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of synthetic questions in training; surplus questions of either kind are left out (default: "
        "all are used)",
    )
    synthetic_subtypes: Names = Field(
        SYNTHETIC_SUBTYPES, description="subtypes of the questions that count as synthetic"
    )
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed ZeRO stage, 0 to 3")
    activation_checkpointing: bool = Field(
        False, description="recompute the decoder's activations in the backward pass, to save memory"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="state that ZeRO keeps in CPU memory: none, optimizer (from stage 1), or parameters too (stage 3)",
    )
    pad_prompts: bool = Field(
        True, description="padding of prompts to the processor's prompt length, without an attention mask"
    )
    partner_draws: PartnerDraws = Field(
        "stored",
        description="second clip of questions about one clip: stored (as in the shards), or drawn in every epoch per"
        " clip or per question (as published); draws need shards with --partner random",
    )
    questions_per_pack: int = Field(
        1, ge=1, description="neighbouring questions on the same clips that share one encoded prefix"
    )
    augment: bool = Field(
        False,
        description="apply SpecAugment and drop path in the frozen encoder, as published; needs shards with "
        "--features logmel or waveform",
    )
    validate_every: int = Field(0, ge=0, description="steps between validations on the val split; 0: no validation")
    validation_examples: int = Field(256, ge=1, description="examples of the val split per validation")
    patience: int = Field(
        0, ge=0, description="validations without a better loss after which the run stops; 0: no early stop"
    )
    publish: Literal["last", "best"] = Field(
        "last", description="weights that are saved to --output: last step, or best validation loss"
    )
    dry_run: bool = Field(False, description="print the plan (steps, memory, checkpoint size, time) and stop")

    @model_validator(mode="after")
    def _check_initial_weights(self) -> "TrainConfig":
        if bool(self.encoder) == bool(self.init_from):
            raise ValueError("set either `encoder` or `init_from`, a model that contains its encoder")
        return self

    @model_validator(mode="after")
    def _check_pretrained(self) -> "TrainConfig":
        if not self.pretrained and not self.decoder:
            raise ValueError(
                "pretrained: false needs `decoder`, whose configuration it takes; set it or remove pretrained"
            )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> "TrainConfig":
        if not self.validate_every and (self.patience or self.publish == "best"):
            raise ValueError("patience and publish: best need validations; set validate_every")
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> "TrainConfig":
        stage = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < stage:
            raise ValueError(f"offload: {self.offload} needs zero_stage {stage} or more, not {self.zero_stage}")
        return self
