"""Training with real Ray Train and DeepSpeed: the same losses whatever shares, stops or moves a run."""

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
    MOST_RESIZED,
    RESULT,
    begin,
    run_training,
    total_steps,
)
from mellow_platform.training.verify_export import check_published
from tests.small_corpus import write_corpus, write_features

STEPS = 20


@pytest.fixture(scope="module")
def made(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Feature shards of a few scenes, and how they are trained on."""
    root = tmp_path_factory.mktemp("training")
    write_features(root)
    return SimpleNamespace(root=root)


def configured(made: SimpleNamespace, name: str, **changes: Any) -> TrainConfig:
    """Return a run of two epochs that stop in the middle of a batch; every step's checkpoint of note is kept."""
    values: dict[str, Any] = {
        "shards": str(made.root / "features"), "encoder": str(made.root / "encoder"), "size": "mellow-tiny",
        "storage": str(made.root / name), "output": str(made.root / name / "model"), "run": "run",
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
    """Return the losses of the same run in one process, with PyTorch alone."""
    examples = load_examples(config)
    model = build_model(config, load_processor(storage.join(config.shards, "processor"))).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=BETAS, weight_decay=config.weight_decay)
    plan = StepPlan(config.seed, len(examples), config.batch, config.micro_batch, workers=1)
    losses = []
    for step, turns in enumerate(batches(plan, ray.put(examples), 0, 0, STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, STEPS, config.warmup)
        optimizer.zero_grad()
        loss = 0.0
        for micro in turns:
            torch.manual_seed(micro.draw)
            share = model(**micro.arrays, num_items_in_batch=micro.size).loss * micro.counts
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        losses.append(loss)
    return np.array(losses)


def cut_back(made: SimpleNamespace, name: str, new: str, step: int) -> None:
    """Copy a run as it stood after `step`."""
    shutil.copytree(made.root / name, made.root / new)
    run = made.root / new / "run"
    (run / RESULT).unlink()
    for saved in CheckpointStore(str(run)).saved():
        if saved.step > step:
            shutil.rmtree(saved.uri)


@pytest.fixture(scope="module")
def plain(made: SimpleNamespace) -> np.ndarray:
    return plain_losses(configured(made, "plain"))


@pytest.fixture(scope="module")
def whole(made: SimpleNamespace) -> SimpleNamespace:
    """An uninterrupted run of two workers at ZeRO stage 2."""
    return trained(configured(made, "whole", zero_stage=2))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.extended
def test_every_zero_stage_on_two_workers_gives_the_losses_of_plain_pytorch(made, plain, stage):
    run = trained(configured(made, f"zero-{stage}", zero_stage=stage))
    np.testing.assert_allclose(run.losses, plain, atol=1e-4)


def test_zero_stage_2_on_two_workers_gives_the_losses_of_plain_pytorch(plain, whole):
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
def test_offloading_and_activation_checkpointing_change_no_loss_and_go_on(made, whole, changes):
    name = "-".join(map(str, changes.values()))
    cut_back(made, "whole", name, step=10)
    run = trained(configured(made, name, **changes))
    assert run.result["resumed_from"] == 10
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "workers"),
    [
        pytest.param(stage, workers, marks=() if (stage, workers) in ((2, 4), (3, 1)) else pytest.mark.slow)
        for stage in range(4)
        for workers in range(1, MOST_RESIZED + 1)
        if workers != 2
    ],
)
@pytest.mark.extended
def test_a_checkpoint_of_two_workers_goes_on_with_another_number(made, whole, stage, workers):
    name = f"moved-{stage}-{workers}"
    cut_back(made, "whole", name, step=5)
    config = configured(made, name, zero_stage=stage, scaling={"workers": workers})
    run = trained(config)
    assert run.result["resumed_from"] == 5
    assert run.examples == whole.examples
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-4)


def test_resizes_past_those_that_are_tested_are_refused(made, whole):
    cut_back(made, "whole", "refused", step=5)
    with pytest.raises(ValueError, match=r"step 5\b.*\b2\b.*\b9\b.*\b8\b"):
        trained(configured(made, "refused", scaling={"workers": 9}))
    with pytest.raises(ValueError, match=r"\b2\b.*\b16\b.*\b8\b.*min_workers"):
        trained(configured(made, "elastic-16", scaling={"workers": 16, "min_workers": 2}))


@pytest.mark.extended
def test_a_run_begins_with_as_many_workers_as_there_is_room_for_from_the_fewest_on(made, plain):
    # Of 8 logical CPUs.
    scaling = {"workers": 2, "min_workers": 1, "cpus_per_worker": 5}
    config = configured(made, "elastic", scaling=scaling)
    run = trained(config)
    np.testing.assert_allclose(run.losses, plain, atol=1e-4)
    store = CheckpointStore(storage.join(config.storage, config.run))
    assert {store.progress_of(saved)["workers"] for saved in store.saved()} == {1}


def failing_store(fails: Callable[[int, tuple], bool], part: str) -> Callable[[dict[str, Any]], None]:
    """Return the training loop with a store that fails to write `part` of checkpoints, by number and arguments."""

    def loop(values: dict[str, Any]) -> None:
        write, calls = getattr(CheckpointStore, part), itertools.count(1)

        def attempt(*args: Any) -> Any:
            if fails(next(calls), args):
                raise OSError("the store is away")
            return write(*args)

        setattr(CheckpointStore, part, attempt)
        train_answers(values)

    return loop


@pytest.mark.parametrize("part", ["write_log", "write"])
@pytest.mark.extended
def test_checkpoints_that_cannot_be_written_lose_no_step_of_the_log(made, whole, part):
    config = configured(made, f"failing-{part}", zero_stage=2)
    result = run_training(failing_store(lambda number, _: number in (1, 3), part), config, load_examples(config))
    run = outcome(config, result)
    assert result["resumed_from"] == 0
    assert run.steps == list(range(1, STEPS + 1))
    assert run.examples == whole.examples
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-5)
    assert [saved.step for saved in CheckpointStore(str(made.root / f"failing-{part}/run")).saved()] == [10, 20]


def test_a_run_that_was_stopped_goes_on_with_the_same_examples_and_losses(made, whole):
    cut_back(made, "whole", "stopped", step=15)
    # What a killed attempt may leave: a checkpoint without its marker, a damaged one, and pieces of the log.
    store = CheckpointStore(str(made.root / "stopped/run"))
    *_, last = store.saved()
    torn, damaged = (Path(last.uri).with_name(f"step-000000{step}-0000") for step in (18, 17))
    shutil.copytree(last.uri, torn)
    (torn / MARKER).unlink()
    shutil.copytree(last.uri, damaged)
    (damaged / STATE).write_bytes((damaged / STATE).read_bytes()[:-1])
    run = trained(configured(made, "stopped", zero_stage=2, keep_checkpoints=1))
    assert run.result["resumed_from"] == 15
    assert run.steps == list(range(1, STEPS + 1))
    assert run.examples == whole.examples
    np.testing.assert_allclose(run.losses, whole.losses, atol=1e-5)
    assert [saved.step for saved in store.saved()] == [STEPS]
    assert storage.list_folder(storage.join(store.run, FOLDER)) == [Path(store.saved()[0].uri).name]


@pytest.mark.extended
def test_going_on_at_the_end_of_an_epoch_neither_skips_nor_repeats_one(made, whole):
    per_epoch = -(-len(load_examples(configured(made, "whole"))) // 8)
    epochs = [whole.examples[start : start + per_epoch] for start in range(0, STEPS, per_epoch)]
    whole_epochs = [sorted(itertools.chain(*steps)) for steps in epochs if len(steps) == per_epoch]
    assert len(whole_epochs) >= 2
    assert all(ids == whole_epochs[0] == sorted(set(ids)) for ids in whole_epochs)
    config = configured(made, "boundary", epochs=1.0)
    first = trained(config)
    assert first.result["step"] == per_epoch
    second = trained(config.model_copy(update={"epochs": 1.5}))
    assert second.result["resumed_from"] == per_epoch
    assert second.examples == whole.examples[: len(second.examples)]


def test_a_complete_run_is_left_as_it_is(made, whole):
    config = configured(made, "whole", zero_stage=2)
    before = {path: path.stat().st_mtime_ns for path in (made.root / "whole/run").rglob("*")}
    assert trained(config).result == whole.result
    assert before == {path: path.stat().st_mtime_ns for path in (made.root / "whole/run").rglob("*")}


@pytest.mark.extended
def test_a_complete_run_is_published_where_it_was_not_yet(made, whole):
    shutil.copytree(made.root / "whole", made.root / "published")
    config = configured(made, "published", zero_stage=2, output=str(made.root / "elsewhere"))
    run = trained(config)
    assert run.result["redone_steps"] == 0
    assert run.losses.tolist() == whole.losses.tolist()
    one, two = (storage.read_json(str(made.root / name / "training.json")) for name in ("whole/model", "elsewhere"))
    assert one["files"] == two["files"]
    assert trained(config).result == run.result


def test_a_run_does_not_go_on_under_other_values(made, whole):
    config = configured(made, "whole", seed=1)
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        finetune(config)
    # Nor on shards that were written anew in the place of its own.
    shutil.copytree(made.root / "features", made.root / "anew")
    config = configured(made, "pinned", shards=str(made.root / "anew"))
    begin(str(made.root / "pinned/run"), config)
    begin(str(made.root / "pinned/run"), config)
    manifest = Manifest.read(config.shards)
    manifest.files["clips/000000.parquet"] = "0" * 64
    manifest.write(config.shards)
    with pytest.raises(ValueError, match=r"content_of_shards '\w+' -> '\w+'"):
        begin(str(made.root / "pinned/run"), config)


def test_shards_of_an_encoder_with_other_weights_are_refused(made):
    torch.manual_seed(1)
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")).eval(), str(made.root / "another"))
    config = configured(made, "another-encoder", encoder=str(made.root / "another"))
    with pytest.raises(ValueError, match=r"/another\b.*jobs/preprocess\.py"):
        build_model(config, load_processor(storage.join(config.shards, "processor")))


def test_validation_without_questions_is_refused(made):
    shutil.copytree(made.root / "corpus", made.root / "unvalidated")
    (made.root / "unvalidated/val.json").write_text("[]")
    folders = {"corpus": str(made.root / "unvalidated"), "output": str(made.root / "no-val")}
    encoder = {"features": "encoder", "encoder": str(made.root / "encoder"), "size": "mellow-tiny"}
    preprocess(PreprocessConfig(**folders, **encoder))
    with pytest.raises(ValueError, match=r"\bval\b.*validate_every.*\b5\b"):
        finetune(configured(made, "unvalidated-run", shards=str(made.root / "no-val"), validate_every=5))


def test_metrics_go_to_tensorboard(made, whole):
    (log,) = (made.root / "whole/run/tensorboard").iterdir()
    events = EventAccumulator(str(log)).Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([event.value for event in logged], whole.losses, atol=1e-5)
    assert {"examples_per_second", "data_wait_share", "learning_rate"} <= set(events.Tags()["scalars"])


@pytest.mark.extended
def test_validation_keeps_the_best_and_stops_a_run_that_gets_no_better(made):
    config = configured(
        made, "stopping", learning_rate=3e-2, warmup=0.0, validate_every=2, patience=2, publish="best",
        keep_checkpoints=1, validation_examples=8, epochs=20.0,
    )  # fmt: skip
    run = trained(config)
    assert run.result["step"] < run.result["total_steps"]
    best = run.result["best"]
    assert best["step"] == run.result["step"] - 2 * config.validate_every
    assert 0 <= best["val_accuracy"] <= 1
    store = CheckpointStore(str(made.root / "stopping/run"))
    assert [saved.step for saved in store.saved()] == [best["step"], run.result["step"]]
    published = load_model(config.output)[0].state_dict()
    weights = store.load(store.saved()[0])[0]
    assert all(torch.equal(published[name.removeprefix("weight.")], value) for name, value in weights.items()
               if name.startswith("weight."))  # fmt: skip
    # Where the best cannot be written, the best of the others is the best.
    again = configured(made, "unwritten", **config.model_dump(exclude={"storage", "output", "shards", "encoder"}))
    step = best["step"]
    failing = failing_store(lambda _, arguments: arguments[1] == step, "write")
    result = run_training(failing, again, load_examples(again), load_examples(again, "val"))
    kept = CheckpointStore(str(made.root / "unwritten/run")).saved()
    assert result["best"]["step"] in [saved.step for saved in kept]
    assert result["best"]["step"] != best["step"]
    assert storage.read_json(f"{again.output}/training.json")["step"] == result["best"]["step"]
    # It stays stopped, until more patience is asked for.
    assert trained(config).result == run.result
    assert trained(config.model_copy(update={"patience": 3})).result["step"] > run.result["step"]


def test_a_model_is_published_only_as_it_was_trained(made, whole, tmp_path):
    shutil.copytree(made.root / "whole/model", tmp_path / "model")
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
def test_a_model_is_trained_further_on_shards_made_with_its_own_encoder_and_tokenizer(made, whole, tmp_path):
    model, own = str(made.root / "whole/model"), str(tmp_path / "features")
    values = {"corpus": str(made.root / "corpus"), "features": "encoder", "encoder": model}
    preprocess(PreprocessConfig(**values, output=own))
    before, after = (FeatureStore.load(uri) for uri in (str(made.root / "features"), own))
    assert all(np.array_equal(before.arrays[name], after.arrays[name]) for name in before.arrays)
    config = configured(made, "further", shards=own, init_from=model, encoder=None)
    processor = load_processor(storage.join(own, "processor"))
    weights, published = build_model(config, processor).state_dict(), load_model(model)[0].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in published.items())

    write_corpus(str(tmp_path / "other"), {"train": 2, "val": 1, "test": 1})
    values |= {"corpus": str(tmp_path / "other"), "encoder": str(made.root / "encoder"), "size": "mellow-tiny"}
    preprocess(PreprocessConfig(**values, output=str(tmp_path / "wrong")))
    processor = load_processor(str(tmp_path / "wrong/processor"))
    with pytest.raises(ValueError, match=r"tokenizer.*/whole/model\b.*jobs/preprocess\.py"):
        build_model(config, processor)


@pytest.mark.extended
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(made):
    config = configured(made, "diverging", learning_rate=1e30, scaling={"workers": 1, "max_failures": 0}, epochs=0.5)
    with pytest.raises(Exception, match=r"step \d+\b.*\bnan\b.*learning_rate"):
        trained(config)


def test_every_epoch_sees_every_example_once_whatever_the_number_of_workers():
    count, batch = 41, 12
    examples = SimpleNamespace(order=lambda seed, epoch: np.random.default_rng([seed, epoch]).permutation(count))
    for workers, micro_batch in ((1, 4), (2, 2), (4, 3)):
        plan = StepPlan(seed=1, count=count, batch=batch, micro_batch=micro_batch, workers=workers)
        for step in range(2 * plan.steps_per_epoch):
            epoch, first, last = plan.stretch(step)
            taken = [plan.micro(step, turn, rank) for turn in range(plan.turns) for rank in range(workers)]
            shares = [place for share in taken if share for place in range(*share)]
            assert shares == list(range(first, last))
            assert epoch == step // plan.steps_per_epoch
        everything = np.concatenate([plan.numbers(examples, step) for step in range(plan.steps_per_epoch)])
        assert sorted(everything) == list(range(count))


def test_batches_come_in_order_and_can_begin_anywhere(made):
    examples = load_examples(configured(made, "order"))
    plan = StepPlan(seed=0, count=len(examples), batch=8, micro_batch=2, workers=2)
    source = ray.put(examples)

    def labels(first: int) -> list[list[torch.Tensor]]:
        return [[micro.arrays["labels"] for micro in turns] for turns in batches(plan, source, 1, first, STEPS)]

    whole = labels(0)
    assert len(whole) == STEPS
    later = labels(7)
    assert all(torch.equal(a, b) for x, y in zip(later, whole[7:], strict=True) for a, b in zip(x, y, strict=True))
