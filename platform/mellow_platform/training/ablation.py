"""Ablations: every point of a grid trained with several seeds as trials of Ray Tune, scored, and put into one table.

A run is named by its values; its scores are written to a file of that name. An ablation that is submitted again trains
only the missing runs: those that failed, and those of added points.
"""

import logging
import os
import re
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from mellow_platform import storage
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.evaluate_job import evaluate
from mellow_platform.evaluation.evaluation_report import main_score
from mellow_platform.failure import Failure
from mellow_platform.model.folder import load_processor
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from mellow_platform.resumable import digest
from mellow_platform.training.ablation_config import AblationConfig
from mellow_platform.training.ablation_grid import evaluate_config, grid_points, preprocess_config, train_config
from mellow_platform.training.ablation_report import Outcome, report, write_report
from mellow_platform.training.finetune import build_model, finetune
from mellow_platform.training.train_config import TrainConfig
from mellow_platform.training.trainer import CHANGEABLE

logger = logging.getLogger(__name__)

# A trial only waits for the workers of its run. It reserves no CPU, so that they can have all of them.
TRIAL = tune.PlacementGroupFactory([{"memory": 1}])


@dataclass(frozen=True)
class AblationRun:
    """One point with one seed.

    Attributes:
        point: number of the point.
        preprocess: options to write its shards with; None if the ablation reads existing shards.
        folder: output folder of the ablation.
    """

    point: int
    train: TrainConfig
    preprocess: PreprocessConfig | None
    evaluate: EvaluateConfig | None
    folder: str

    @property
    def name(self) -> str:
        return self.train.run

    @property
    def identity(self) -> dict[str, Any]:
        """Options that the scores depend on."""
        return {"train": self.train.model_dump(), "evaluate": self.evaluate and self.evaluate.model_dump()}

    def read_scores(self) -> dict[str, Any] | None:
        """Return the stored scores; None if they are missing or of other options."""
        if not storage.exists(self._uri):
            return None
        stored = storage.read_json(self._uri)
        return stored.pop("scores") if stored == self.identity | {"scores": stored["scores"]} else None

    def write_scores(self, scores: dict[str, Any]) -> None:
        storage.write_json(self._uri, self.identity | {"scores": scores})

    @property
    def _uri(self) -> str:
        return storage.join(self.folder, "scores", f"{self.name}.json")


def run_ablation(config: AblationConfig) -> dict[str, Any]:
    """Train and score the runs without scores, write `table.md`, `.csv`, `.json` and `.png`, and return the report.

    A failed run does not stop the others; the report has its reason.
    """
    runs = ablation_runs(config)
    remaining = [run for run in runs if run.read_scores() is None]
    logger.warning("%d of %d runs are scored already", len(runs) - len(remaining), len(runs))
    failures = write_shards(remaining)
    failures |= run_trials([run for run in remaining if run.name not in failures], config.concurrent)
    outcomes = []
    for run in runs:
        scores = run.read_scores()
        failed = None if scores else failures.get(run.name, "the run did not finish")
        outcomes.append(Outcome(run.point, run.train.seed, run.name, scores or {}, failed))
    result = report(config, outcomes)
    write_report(config.output, result)
    return result


def ablation_runs(config: AblationConfig) -> list[AblationRun]:
    """Return the runs of an ablation; those of one point are consecutive."""
    runs = []
    for number, point in enumerate(grid_points(config)):
        for seed in config.seeds:
            train = train_config(config, point, seed)
            name = run_name(train, point)
            train = train.model_copy(update={"run": name, "output": storage.join(config.output, "models", name)})
            shards = preprocess_config(config, train)
            folder = storage.join(config.output, "evaluation", f"{name}-{digest(config.evaluate)[:8]}")
            runs.append(AblationRun(number, train, shards, evaluate_config(config, train, folder), config.output))
    return runs


def run_name(config: TrainConfig, point: dict[str, Any]) -> str:
    """Return the name of a run, which depends on its own values and not on the rest of the grid."""
    values = {name: value for name, value in config.model_dump().items() if name not in CHANGEABLE | {"run", "seed"}}
    # An option that a resumed run may change still distinguishes points if it is an axis.
    values |= {axis: value for axis, value in point.items() if axis in CHANGEABLE}
    parts = [_last(config.encoder or config.init_from or ""), config.projection]
    parts += [_last(config.decoder)] if config.decoder else []
    parts += [] if config.pretrained else ["fresh"]
    parts += [f"lora{config.lora.rank}"] if config.lora.rank else []
    parts += [] if config.synthetic_share is None else [f"synthetic{config.synthetic_share:g}"]
    return re.sub(r"[^\w.]+", "-", f"{'-'.join(parts)}-{digest(values)[:8]}-seed{config.seed}")


def _last(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def write_shards(runs: list[AblationRun]) -> dict[str, str]:
    """Write the shard sets of the runs, each once; return the reason by name of each run whose shards failed."""
    failures: dict[str, str] = {}
    reasons: dict[str, str | None] = {}
    for run in runs:
        if run.preprocess is None:
            continue
        shards = run.preprocess.output
        if shards not in reasons:
            try:
                preprocess(run.preprocess)
                reasons[shards] = None
            except Exception as error:  # any error: the other points do not depend on these shards
                logger.exception("shards for %s could not be written", run.name)
                reasons[shards] = Failure(error).message.splitlines()[0]
        if reason := reasons[shards]:
            failures[run.name] = reason
    return failures


def run_trials(runs: list[AblationRun], concurrent: int | None) -> dict[str, str]:
    """Train and score runs as trials of Ray Tune; return the reason by name of each run that failed."""
    if not runs:
        return {}
    if not ray.is_initialized():
        ray.init()
    # Ctrl-C ends the job; by default Ray Tune stops its trials and reports them as failed.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    fs, path = storage.arrow_filesystem(runs[0].folder)
    trial = tune.with_parameters(train_and_score, runs={run.name: run for run in runs})
    tuner = tune.Tuner(
        tune.with_resources(trial, TRIAL),
        param_space={"run": tune.grid_search([run.name for run in runs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrent or min(concurrent_runs(run.train) for run in runs),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=path, storage_filesystem=fs, verbose=0, callbacks=[RunPrinter(len(runs))]
        ),
    )
    results = list(tuner.fit())
    failed = [result for result in results if result.error and result.config]
    return {result.config["run"]: Failure(result.error).message.splitlines()[0] for result in failed}


def train_and_score(values: dict[str, str], runs: dict[str, AblationRun]) -> None:
    """Train and evaluate a run: the function of its trial, on the cluster."""
    run = runs[values["run"]]
    # An invalid point fails here, before its workers are started and restarted.
    build_model(run.train, load_processor(storage.join(run.train.shards, "processor")))
    result = finetune(run.train)
    # Validation of the published weights.
    validation = result["best"] if run.train.publish == "best" else result
    scores = {"steps": result["step"]} | {name: validation[name] for name in ("val_accuracy", "val_loss")}
    if run.evaluate:
        condition = run.evaluate.conditions[0]
        benchmarks = evaluate(run.evaluate)["benchmarks"]
        for name, benchmark in benchmarks.items():
            if "scores" not in benchmark:
                continue
            new = {name: main_score(benchmark)[condition]["value"]}
            families = benchmark["groups"].get("family", {})
            new |= {f"{name} {family}": group["scores"][condition]["value"] for family, group in families.items()}
            # Scores of the default benchmark have no prefix.
            scores |= {key.removeprefix("families ").replace("families", "accuracy"): new[key] for key in new}
    run.write_scores(scores)
    tune.report(scores)


def concurrent_runs(config: TrainConfig) -> int:
    """Return how many such runs fit the cluster at once, each with its workers and one CPU to collate batches."""
    scaling = config.scaling
    needs = {
        "CPU": scaling.workers * scaling.cpus_per_worker + 1,
        "GPU": scaling.workers * scaling.gpus_per_worker,
    }
    resources = ray.cluster_resources()
    return max(1, min(int(resources.get(name, 0) // need) for name, need in needs.items() if need))


def _trial_name(trial: Any) -> str:
    return trial.config["run"]


class RunPrinter(tune.Callback):
    """Printer of finished runs in the job's log."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._print(trial, "scored")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._print(trial, "failed")

    def _print(self, trial: Any, status: str) -> None:
        self.done += 1
        print(f"run {self.done} of {self.total}: {_trial_name(trial)} {status}", flush=True)
