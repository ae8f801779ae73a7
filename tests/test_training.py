"""Training with real Ray Train and DeepSpeed: equal losses for any ZeRO stage, interruption and number of workers."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mellow_platform import storage
from mellow_platform.data.shards import Manifest
from mellow_platform.model import HTSATEncoder, encoder_config
from mellow_platform.model.folder import load_model, load_processor, save_pretrained
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from mellow_platform.training.batches import batches
from mellow_platform.training.checkpoints import FOLDER, MARKER, STATE, CheckpointStore
from mellow_platform.training.finetune import BETAS, build_model, finetune, load_examples, train_answers
from mellow_platform.training.learning_rate_schedule import learning_rate_factor
from mellow_platform.training.step_plan import StepPlan
from mellow_platform.training.train_config import TrainConfig
from mellow_platform.training.trainer import (
    MAX_RESIZABLE_WORKERS,
    RESULT,
    claim_run,
    run_training,
    total_steps,
)
from mellow_platform.training.verify_export import check_published
from tests.small_corpus import write_corpus, write_features

STEPS = 20


@pytest.fixture(scope="module")
def inputs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folder with feature shards of a few scenes."""
    root = tmp_path_factory.mktemp("training")
    write_features(root)
    return SimpleNamespace(root=root)


def configured(inputs: SimpleNamespace, name: str, **changes: Any) -> TrainConfig:
    """Return the options of a run of `STEPS` steps that keeps all checkpoints."""
    values: dict[str, Any] = {
        "shards": str(inputs.root / "features"), "encoder": str(inputs.root / "encoder"), "size": "mellow-tiny",
        "storage": str(inputs.root / name), "output": str(inputs.root / name / "model"), "run": "run",
        "batch": 8, "micro_batch": 2, "checkpoint_every": 5, "keep_checkpoints": 100, "log_every": 1,
    }  # fmt: skip
    config = TrainConfig(**values | changes)
    if "epochs" not in changes:
        count = len(load_examples(config))
        config = config.model_copy(update={"epochs": STEPS / -(-count // config.batch)})
    assert changes.get("epochs") or total_steps(config, len(load_examples(config))) == STEPS
    return config


def trained(config: TrainConfig) -> SimpleNamespace:
    return outcome(config, finetune(config))


def outcome(config: TrainConfig, result: dict[str, Any]) -> SimpleNamespace:
    log = CheckpointStore(storage.join(config.storage, config.run)).read_log()
    return SimpleNamespace(
        result=result, losses=np.array(log["loss"]), examples=log["examples"].to_pylist(), steps=log["step"].to_pylist()
    )


def plain_losses(config: TrainConfig) -> np.ndarray:
    """Return the losses of the same run in one process, in plain PyTorch."""
    examples = load_examples(config)
    model = build_model(config, load_processor(storage.join(config.shards, "processor"))).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=BETAS, weight_decay=config.weight_decay)
    plan = StepPlan(config.seed, len(examples), config.batch, config.micro_batch, workers=1)
    losses = []
    for step, micro_batches in enumerate(batches(plan, ray.put(examples), 0, 0, STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, STEPS, config.warmup)
        optimizer.zero_grad()
        loss = 0.0
        for micro_batch in micro_batches:
            torch.manual_seed(micro_batch.seed)
            share = model(**micro_batch.arrays, num_items_in_batch=micro_batch.step_weight).loss * micro_batch.active
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        losses.append(loss)
    return np.array(losses)


def cut_back(inputs: SimpleNamespace, name: str, new: str, step: int) -> None:
    """Copy a run without its result and the checkpoints after `step`."""
    shutil.copytree(inputs.root / name, inputs.root / new)
    run = inputs.root / new / "run"
    (run / RESULT).unlink()
    for saved in CheckpointStore(str(run)).checkpoints():
        if saved.step > step:
            shutil.rmtree(saved.uri)


@pytest.fixture(scope="module")
def plain(inputs: SimpleNamespace) -> np.ndarray:
    return plain_losses(configured(inputs, "plain"))


@pytest.fixture(scope="module")
def whole(inputs: SimpleNamespace) -> SimpleNamespace:
    """An uninterrupted run of two workers at ZeRO stage 2."""
    return trained(configured(inputs, "whole", zero_stage=2))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.extended
def test_zero_stages_match_plain_pytorch(inputs, plain, stage):
    run = trained(configured(inputs, f"zero-{stage}", zero_stage=stage))
    np.testing.assert_allclose(run.losses, plain, atol=1e-4)


def test_zero_stage_2_matches_plain_pytorch(plain, whole):
    assert plain[-1] < 0.7 * plain[0]
    np.testing.assert_allclose(whole.losses, plain, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "parameters"},
        {"zero_stage": 0, "activation_checkpointing": True},
    ],
)
@pytest.mark.extended
def test_resume_with_offloading_or_activation_checkpointing(inputs, whole, changes):
    name = "-".join(map(str, changes.values()))
    cut_back(inputs, "whole", name, step=10)
    run = trained(configured(inputs, name, **changes))
    assert run.result["resumed_from"] == 10
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "workers"),
    [
        pytest.param(stage, workers, marks=() if (stage, workers) in ((2, 4), (3, 1)) else pytest.mark.slow)
        for stage in range(4)
        for workers in range(1, MAX_RESIZABLE_WORKERS + 1)
        if workers != 2
    ],
)
@pytest.mark.extended
def test_resume_with_other_number_of_workers(inputs, whole, stage, workers):
    name = f"moved-{stage}-{workers}"
    cut_back(inputs, "whole", name, step=5)
    config = configured(inputs, name, zero_stage=stage, scaling={"workers": workers})
    run = trained(config)
    assert run.result["resumed_from"] == 5
    assert run.examples == whole.examples
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-4)


def test_untested_resizes_are_refused(inputs, whole):
    cut_back(inputs, "whole", "refused", step=5)
    with pytest.raises(ValueError, match=r"step 5\b.*\b2\b.*\b9\b.*\b8\b"):
        trained(configured(inputs, "refused", scaling={"workers": 9}))
    with pytest.raises(ValueError, match=r"\b2\b.*\b16\b.*\b8\b.*min_workers"):
        trained(configured(inputs, "elastic-16", scaling={"workers": 16, "min_workers": 2}))


@pytest.mark.extended
def test_run_starts_with_fewer_workers_if_cluster_is_small(inputs, plain):
    # The cluster has 8 logical CPUs: room for one worker.
    scaling = {"workers": 2, "min_workers": 1, "cpus_per_worker": 5}
    config = configured(inputs, "elastic", scaling=scaling)
    run = trained(config)
    np.testing.assert_allclose(run.losses, plain, atol=1e-4)
    store = CheckpointStore(storage.join(config.storage, config.run))
    assert {store.read_progress(saved)["workers"] for saved in store.checkpoints()} == {1}


def failing_store(fails: Callable[[int, tuple], bool], part: str) -> Callable[[dict[str, Any]], None]:
    """Return the training loop with a store whose method `part` fails if `fails(call, arguments)`."""

    def loop(values: dict[str, Any]) -> None:
        write, calls = getattr(CheckpointStore, part), itertools.count(1)

        def attempt(*args: Any) -> Any:
            if fails(next(calls), args):
                raise OSError("the store is unavailable")
            return write(*args)

        setattr(CheckpointStore, part, attempt)
        train_answers(values)

    return loop


@pytest.mark.parametrize("part", ["write_log", "write"])
@pytest.mark.extended
def test_failed_checkpoints_lose_no_log_rows(inputs, whole, part):
    config = configured(inputs, f"failing-{part}", zero_stage=2)
    result = run_training(failing_store(lambda number, _: number in (1, 3), part), config, load_examples(config))
    run = outcome(config, result)
    assert result["resumed_from"] == 0
    assert run.steps == list(range(1, STEPS + 1))
    assert run.examples == whole.examples
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-5)
    assert [saved.step for saved in CheckpointStore(str(inputs.root / f"failing-{part}/run")).checkpoints()] == [10, 20]


def test_resume_keeps_examples_and_losses(inputs, whole):
    cut_back(inputs, "whole", "stopped", step=15)
    # A killed attempt may leave an incomplete checkpoint, a damaged one, and log files.
    store = CheckpointStore(str(inputs.root / "stopped/run"))
    *_, last = store.checkpoints()
    torn, damaged = (Path(last.uri).with_name(f"step-000000{step}-0000") for step in (18, 17))
    shutil.copytree(last.uri, torn)
    (torn / MARKER).unlink()
    shutil.copytree(last.uri, damaged)
    (damaged / STATE).write_bytes((damaged / STATE).read_bytes()[:-1])
    run = trained(configured(inputs, "stopped", zero_stage=2, keep_checkpoints=1))
    assert run.result["resumed_from"] == 15
    assert run.steps == list(range(1, STEPS + 1))
    assert run.examples == whole.examples
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-5)
    assert [saved.step for saved in store.checkpoints()] == [STEPS]
    assert storage.list_folder(storage.join(store.run, FOLDER)) == [Path(store.checkpoints()[0].uri).name]


@pytest.mark.extended
def test_resume_at_end_of_epoch(inputs, whole):
    per_epoch = -(-len(load_examples(configured(inputs, "whole"))) // 8)
    epochs = [whole.examples[start : start + per_epoch] for start in range(0, STEPS, per_epoch)]
    whole_epochs = [sorted(itertools.chain(*steps)) for steps in epochs if len(steps) == per_epoch]
    assert len(whole_epochs) >= 2
    assert all(ids == whole_epochs[0] == sorted(set(ids)) for ids in whole_epochs)
    config = configured(inputs, "boundary", epochs=1.0)
    first = trained(config)
    assert first.result["step"] == per_epoch
    second = trained(config.model_copy(update={"epochs": 1.5}))
    assert second.result["resumed_from"] == per_epoch
    assert second.examples == whole.examples[: len(second.examples)]


def test_complete_run_is_not_changed(inputs, whole):
    config = configured(inputs, "whole", zero_stage=2)
    before = {path: path.stat().st_mtime_ns for path in (inputs.root / "whole/run").rglob("*")}
    assert trained(config).result == whole.result
    assert before == {path: path.stat().st_mtime_ns for path in (inputs.root / "whole/run").rglob("*")}


@pytest.mark.extended
def test_complete_run_is_published_to_new_output(inputs, whole):
    shutil.copytree(inputs.root / "whole", inputs.root / "published")
    config = configured(inputs, "published", zero_stage=2, output=str(inputs.root / "elsewhere"))
    run = trained(config)
    assert run.result["redone_steps"] == 0
    assert run.losses.tolist() == whole.losses.tolist()
    one, two = (storage.read_json(str(inputs.root / name / "training.json")) for name in ("whole/model", "elsewhere"))
    assert one["files"] == two["files"]
    assert trained(config).result == run.result


def test_resume_with_other_options_is_refused(inputs, whole):
    config = configured(inputs, "whole", seed=1)
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        finetune(config)
    # Nor with other shards in the same folder.
    shutil.copytree(inputs.root / "features", inputs.root / "changed")
    config = configured(inputs, "pinned", shards=str(inputs.root / "changed"))
    claim_run(str(inputs.root / "pinned/run"), config)
    claim_run(str(inputs.root / "pinned/run"), config)
    manifest = Manifest.read(config.shards)
    manifest.files["clips/000000.parquet"] = "0" * 64
    manifest.write(config.shards)
    with pytest.raises(ValueError, match=r"content_of_shards '\w+' -> '\w+'"):
        claim_run(str(inputs.root / "pinned/run"), config)


def test_shards_of_other_encoder_weights_are_refused(inputs):
    torch.manual_seed(1)
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")).eval(), str(inputs.root / "another"))
    config = configured(inputs, "another-encoder", encoder=str(inputs.root / "another"))
    with pytest.raises(ValueError, match=r"/another\b.*jobs/preprocess\.py"):
        build_model(config, load_processor(storage.join(config.shards, "processor")))


def test_validation_without_questions_is_refused(inputs):
    shutil.copytree(inputs.root / "corpus", inputs.root / "unvalidated")
    (inputs.root / "unvalidated/val.json").write_text("[]")
    folders = {"corpus": str(inputs.root / "unvalidated"), "output": str(inputs.root / "no-val")}
    encoder = {"features": "encoder", "encoder": str(inputs.root / "encoder"), "size": "mellow-tiny"}
    preprocess(PreprocessConfig(**folders, **encoder))
    with pytest.raises(ValueError, match=r"\bval\b.*validate_every.*\b5\b"):
        finetune(configured(inputs, "unvalidated-run", shards=str(inputs.root / "no-val"), validate_every=5))


def test_metrics_in_tensorboard(inputs, whole):
    (log,) = (inputs.root / "whole/run/tensorboard").iterdir()
    events = EventAccumulator(str(log)).Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([event.value for event in logged], whole.losses, atol=1e-5)
    assert {"examples_per_second", "data_wait_share", "learning_rate"} <= set(events.Tags()["scalars"])


@pytest.mark.extended
def test_early_stopping_keeps_best_checkpoint(inputs):
    config = configured(
        inputs, "stopping", learning_rate=3e-2, warmup=0.0, validate_every=2, patience=2, publish="best",
        keep_checkpoints=1, validation_examples=8, epochs=20.0,
    )  # fmt: skip
    run = trained(config)
    assert run.result["step"] < run.result["total_steps"]
    best = run.result["best"]
    assert best["step"] == run.result["step"] - 2 * config.validate_every
    assert 0 <= best["val_accuracy"] <= 1
    store = CheckpointStore(str(inputs.root / "stopping/run"))
    assert [saved.step for saved in store.checkpoints()] == [best["step"], run.result["step"]]
    published = load_model(config.output)[0].state_dict()
    weights = store.load(store.checkpoints()[0])[0]
    assert all(torch.equal(published[name.removeprefix("weight.")], value) for name, value in weights.items()
               if name.startswith("weight."))  # fmt: skip
    # If the best checkpoint cannot be written, the best of the others is published.
    again = configured(inputs, "unwritten", **config.model_dump(exclude={"storage", "output", "shards", "encoder"}))
    step = best["step"]
    failing = failing_store(lambda _, arguments: arguments[1] == step, "write")
    result = run_training(failing, again, load_examples(again), load_examples(again, "val"))
    kept = CheckpointStore(str(inputs.root / "unwritten/run")).checkpoints()
    assert result["best"]["step"] in [saved.step for saved in kept]
    assert result["best"]["step"] != best["step"]
    assert storage.read_json(f"{again.output}/training.json")["step"] == result["best"]["step"]
    # The run stays stopped unless patience grows.
    assert trained(config).result == run.result
    assert trained(config.model_copy(update={"patience": 3})).result["step"] > run.result["step"]


def test_changed_model_is_not_published(inputs, whole, tmp_path):
    shutil.copytree(inputs.root / "whole/model", tmp_path / "model")
    marker = json.loads((tmp_path / "model/training.json").read_text())
    assert marker["step"] == STEPS
    assert all(storage.sha256(tmp_path / "model" / name) == digest for name, digest in marker["files"].items())
    model = load_model(str(tmp_path / "model"))[0]
    check_published(str(tmp_path / "model"), model, [], [], like=model.frame_embedding.weight)
    with torch.no_grad():
        model.frame_embedding.weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"frame_embedding\.weight"):
        check_published(str(tmp_path / "model"), model, [], [], like=model.frame_embedding.weight)


@pytest.mark.extended
def test_init_from_needs_its_encoder_and_tokenizer(inputs, whole, tmp_path):
    model, shards = str(inputs.root / "whole/model"), str(tmp_path / "features")
    values = {"corpus": str(inputs.root / "corpus"), "features": "encoder", "encoder": model}
    preprocess(PreprocessConfig(**values, output=shards))
    before, after = (FeatureStore.load(uri) for uri in (str(inputs.root / "features"), shards))
    assert all(np.array_equal(before.arrays[name], after.arrays[name]) for name in before.arrays)
    config = configured(inputs, "further", shards=shards, init_from=model, encoder=None)
    processor = load_processor(storage.join(shards, "processor"))
    weights, published = build_model(config, processor).state_dict(), load_model(model)[0].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in published.items())

    write_corpus(str(tmp_path / "other"), {"train": 2, "val": 1, "test": 1})
    values |= {"corpus": str(tmp_path / "other"), "encoder": str(inputs.root / "encoder"), "size": "mellow-tiny"}
    preprocess(PreprocessConfig(**values, output=str(tmp_path / "wrong")))
    processor = load_processor(str(tmp_path / "wrong/processor"))
    with pytest.raises(ValueError, match=r"tokenizer.*/whole/model\b.*jobs/preprocess\.py"):
        build_model(config, processor)


@pytest.mark.extended
def test_non_finite_loss_names_the_step(inputs):
    config = configured(inputs, "diverging", learning_rate=1e30, scaling={"workers": 1, "max_failures": 0}, epochs=0.5)
    with pytest.raises(Exception, match=r"step \d+\b.*\bnan\b.*learning_rate"):
        trained(config)


def test_epoch_has_each_example_once():
    count, batch = 41, 12
    examples = SimpleNamespace(order=lambda seed, epoch: np.random.default_rng([seed, epoch]).permutation(count))
    for workers, micro_batch in ((1, 4), (2, 2), (4, 3)):
        plan = StepPlan(seed=1, count=count, batch=batch, micro_batch=micro_batch, workers=workers)
        for step in range(2 * plan.steps_per_epoch):
            epoch, first, last = plan.order_range(step)
            ranges = [
                plan.micro_batch_range(step, micro_step, rank)
                for micro_step in range(plan.accumulation_steps)
                for rank in range(workers)
            ]
            positions = [position for part in ranges if part for position in range(*part)]
            assert positions == list(range(first, last))
            assert epoch == step // plan.steps_per_epoch
        numbers = np.concatenate([plan.numbers(examples, step) for step in range(plan.steps_per_epoch)])
        assert sorted(numbers) == list(range(count))


def test_batches_start_at_any_step(inputs):
    examples = load_examples(configured(inputs, "order"))
    plan = StepPlan(seed=0, count=len(examples), batch=8, micro_batch=2, workers=2)
    source = ray.put(examples)

    def labels(first: int) -> list[list[torch.Tensor]]:
        return [
            [micro_batch.arrays["labels"] for micro_batch in micro_batches]
            for micro_batches in batches(plan, source, 1, first, STEPS)
        ]

    whole = labels(0)
    assert len(whole) == STEPS
    rest = labels(7)
    assert all(torch.equal(a, b) for x, y in zip(rest, whole[7:], strict=True) for a, b in zip(x, y, strict=True))
