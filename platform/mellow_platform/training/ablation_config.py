"""Options of jobs/ablate.py."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mellow_platform.settings import (
    Metavar,
    Output,
    Section,
    Separated,
    nearest,
)
from mellow_platform.training.ablation_grid import grid_points, job_configs
from mellow_platform.training.train_config import TrainConfig


class AblationConfig(Section):
    """Train and score every point of a grid with several seeds, and write one table."""

    output: Output = Field(description="folder to write shards, runs, models, scores, and the table with its plot to")
    base: Annotated[str, Metavar("FILE")] | None = Field(
        None,
        description="YAML file of jobs/train.py with options of every point, relative to the working directory "
        "(default: only --train)",
    )
    train: dict[str, Any] = Field(
        {},
        description="options of jobs/train.py for every point; they take precedence over --base (default: only --base)",
    )
    preprocess: dict[str, Any] | None = Field(
        None,
        description="options of jobs/preprocess.py (corpus, audio_root) to write shards with, once per pair of "
        "encoder and decoder (default: all points read `shards` of --train)",
    )
    evaluate: dict[str, Any] | None = Field(
        None,
        description="options of jobs/evaluate.py ({split: test}) to score every model with (default: validation only)",
    )
    grid: dict[str, list[Any]] = Field(
        description="values of each axis, which is an option of jobs/train.py: {projection: [mellow, mlp]}"
    )
    combinations: Literal["all", "one_at_a_time"] = Field(
        "all",
        description="points of the grid: all combinations, or one_at_a_time (the first value of every axis, and that"
        " point with one axis changed)",
    )
    seeds: Annotated[list[int], Separated] = Field(
        [0, 1, 2], min_length=1, description="seeds that every point is trained with"
    )
    metric: Literal["val_accuracy", "val_loss", "accuracy"] = Field(
        "val_accuracy", description="score that points are sorted by; accuracy needs --evaluate"
    )
    concurrent: int | None = Field(
        None, ge=1, description="simultaneous runs (default: as many as fit the cluster at the start)"
    )

    def locations(self) -> list[tuple[str, str, bool]]:
        """Return the URIs of this job, and the inputs of its points' jobs that the ablation does not write itself."""
        written = {"model", "shards"} if self.preprocess is not None else {"model"}
        found = super().locations()
        for point in grid_points(self):
            for name, job in job_configs(self, point).items():
                inputs = [(field, uri) for field, uri, exists in job.locations() if exists and field not in written]
                found += [(f"{name}: {field}", uri, True) for field, uri in inputs]
        return list(dict.fromkeys(found))

    @model_validator(mode="after")
    def _check_axes(self) -> "AblationConfig":
        reserved = {"run", "output", "storage", "seed", "dry_run"}
        valid = [name for name in TrainConfig.model_fields if name not in reserved]
        for name in (*self.grid, *self.train):
            if name not in valid:
                raise ValueError(f"{name} is not an option of jobs/train.py for ablations{nearest(name, valid)}")
        for axis, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{axis} has no values; list at least one, or remove the axis")
        return self

    @model_validator(mode="after")
    def _check_shards(self) -> "AblationConfig":
        if (self.preprocess is None) == ("shards" not in self.train):
            raise ValueError("set either `preprocess` (options to write shards with) or `shards` in `train`")
        if self.preprocess is None and any(len(self.grid.get(axis, [])) > 1 for axis in ("encoder", "init_from")):
            raise ValueError("each encoder needs its own shards; set `preprocess` instead of `shards` in `train`")
        return self

    @model_validator(mode="after")
    def _check_points(self) -> "AblationConfig":
        if self.metric == "accuracy" and self.evaluate is None:
            raise ValueError("metric: accuracy needs `evaluate`; set it, or choose val_accuracy")
        if self.metric == "accuracy" and "families" not in (self.evaluate or {}).get("benchmark", "families"):
            raise ValueError("metric: accuracy needs the benchmark families; add it to evaluate.benchmark")
        for point in grid_points(self):
            try:
                job_configs(self, point)
            except ValueError as error:
                raise ValueError(f"point {point}: {error}") from error
        return self
