"""Points of an ablation's grid, and the configurations of each point's jobs."""

import itertools
from typing import TYPE_CHECKING, Any

from mellow_platform import storage
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.resumable import digest
from mellow_platform.settings import Section, read_yaml, validated
from mellow_platform.training.train_config import TrainConfig

if TYPE_CHECKING:
    from mellow_platform.training.ablation_config import AblationConfig

LAST_STEP_ONLY = 10**9  # steps between validations of a run that validates only its last step

Point = dict[str, Any]  # value by axis


def grid_points(config: "AblationConfig") -> list[Point]:
    """Return the points of the grid in order."""
    if config.combinations == "all":
        return [dict(zip(config.grid, values, strict=True)) for values in itertools.product(*config.grid.values())]
    reference = {axis: values[0] for axis, values in config.grid.items()}
    changed = [reference | {axis: value} for axis, values in config.grid.items() for value in values[1:]]
    return [reference, *changed]


def train_config(config: "AblationConfig", point: Point, seed: int) -> TrainConfig:
    """Return the training configuration of a point; the caller sets its run name and output.

    Raises:
        ValueError: the base is malformed, or an option is invalid; the message names it.
    """
    values = read_yaml(config.base) if config.base else {}
    values |= config.train | point | {"seed": seed, "storage": storage.join(config.output, "runs")}
    values |= {"run": "unnamed", "output": config.output, "shards": values.get("shards", config.output)}
    # A run without intermediate validations is validated at its end.
    values["validate_every"] = values.get("validate_every") or LAST_STEP_ONLY
    train = validated(TrainConfig, values)
    preprocess = preprocess_config(config, train)
    return train.model_copy(update={"shards": preprocess.output}) if preprocess else train


def preprocess_config(config: "AblationConfig", train: TrainConfig) -> PreprocessConfig | None:
    """Return the options to write shards for a run's encoder and decoder; None if the ablation reads existing ones."""
    if config.preprocess is None:
        return None
    values = {"size": train.size, "features": "encoder", "encoder": train.encoder or train.init_from}
    values |= {"decoder": train.decoder} if train.decoder else {}
    preprocess = validated(PreprocessConfig, config.preprocess | values | {"output": config.output})
    folder = storage.join(config.output, "shards", digest(preprocess.identity)[:12])
    return preprocess.model_copy(update={"output": folder})


def evaluate_config(config: "AblationConfig", train: TrainConfig, output: str) -> EvaluateConfig | None:
    """Return the configuration of a run's evaluation; None if runs are only validated."""
    if config.evaluate is None:
        return None
    values = {"conditions": ["audio"]} | config.evaluate
    return validated(EvaluateConfig, values | {"model": train.output, "shards": train.shards, "output": output})


def job_configs(config: "AblationConfig", point: Point) -> dict[str, Section]:
    """Return the configurations of a point's jobs, with the first seed, by job.

    Raises:
        ValueError: an option is invalid; the message names it.
    """
    train = train_config(config, point, config.seeds[0])
    preprocess, evaluate = preprocess_config(config, train), evaluate_config(config, train, config.output)
    jobs = {"train": train, "preprocess": preprocess, "evaluate": evaluate}
    return {name: job for name, job in jobs.items() if job}
