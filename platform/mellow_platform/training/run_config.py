"""Options that both training jobs have."""

from typing import Literal

from pydantic import Field, model_validator

from mellow_platform.option_values import Size
from mellow_platform.settings import (
    Input,
    Name,
    Output,
    Section,
)


class ScalingSection(Section):
    """Workers of the training run."""

    workers: int = Field(2, ge=1, description="number of training workers")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="fewest workers to continue with after nodes are lost; the run grows again when nodes join "
        "(default: always as many as scaling.workers)",
    )
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs per worker: 0 trains on CPUs (gloo, float32), 1 on GPUs (nccl, bfloat16)"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs that each worker reserves")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads that each worker computes with")
    max_failures: int = Field(3, ge=-1, description="worker failures after which the run stops; -1: no limit")

    @model_validator(mode="after")
    def _check_min_workers(self) -> "ScalingSection":
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is larger than workers {self.workers}; lower it")
        return self


class RunSection(Section):
    """Options of a training run."""

    shards: Input = Field(description="folder of shards that jobs/preprocess.py wrote")
    output: Output = Field(description="folder to save the trained model to")
    storage: Output = Field(description="folder for checkpoints and logs of all runs")
    run: Name = Field(
        pattern=r"^[\w.-]+$", description="name of the run; a run of the same name is resumed from its last checkpoint"
    )
    size: Size = Field("mellow-v0", description="model size")
    seed: int = Field(0, ge=0, description="seed of initial weights, example order and dropout")
    epochs: float = Field(1.0, gt=0, description="number of passes over the train split")
    batch: int = Field(16, ge=1, description="examples per step, over all workers")
    micro_batch: int = Field(
        4, ge=1, description="examples per forward pass; each worker accumulates gradients over its share of the batch"
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="peak learning rate, after the warm-up; a cosine schedule then decreases it to 0"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a growing learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(0.5, gt=0, description="norm that gradients are clipped to")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(
        2, ge=1, description="number of latest checkpoints to keep, besides the best by validation"
    )
    log_every: int = Field(10, ge=1, description="steps between reported losses")
    tracking: Literal["tensorboard", "mlflow"] = Field(
        "tensorboard",
        description="experiment tracker that receives the metrics, besides Ray; mlflow needs the extra `mlflow` and "
        "its own environment variables",
    )
    scaling: ScalingSection = ScalingSection()
