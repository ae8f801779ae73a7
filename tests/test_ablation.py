"""Ablations: points, data and weights of a point, and a small grid from end to end."""

import csv
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mellow_platform import storage
from mellow_platform.data.shards import read_records
from mellow_platform.model.configuration_mellow import tiny_decoder_config
from mellow_platform.model.folder import load_processor
from mellow_platform.training.ablation import ablation_runs, run_ablation
from mellow_platform.training.ablation_config import AblationConfig
from mellow_platform.training.ablation_grid import grid_points
from mellow_platform.training.ablation_report import Outcome, markdown, picture, point_labels, report
from mellow_platform.training.finetune import build_model, load_examples
from mellow_platform.training.train_config import TrainConfig
from mellow_platform.training.trainer import RESULT
from tests.small_corpus import write_features


@pytest.fixture(scope="module")
def inputs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Corpus of a few scenes, an encoder, their shards, and a decoder with the corpus's tokenizer."""
    root = tmp_path_factory.mktemp("ablation")
    write_features(root)
    tokenizer = load_processor(str(root / "features/processor")).tokenizer
    decoder = transformers.LlamaForCausalLM(tiny_decoder_config(len(tokenizer)))
    decoder.save_pretrained(root / "decoder")
    tokenizer.save_pretrained(root / "decoder")
    return SimpleNamespace(root=root, decoder=decoder)


def configured(inputs: SimpleNamespace, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "shards": str(inputs.root / "features"), "encoder": str(inputs.root / "encoder"), "size": "mellow-tiny",
        "storage": str(inputs.root / "runs"), "output": str(inputs.root / "model"), "run": "run",
    }  # fmt: skip
    return TrainConfig(**values | changes)


SYNTHETIC = ["Scenes-Detail", "Scenes-Heard-MCQ.json"]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.extended
def test_synthetic_share_keeps_most_questions(inputs, share):
    every = load_examples(configured(inputs))
    subtypes = np.array(read_records(str(inputs.root / "features"), "train")["subtype"].to_pylist())
    counts = Counter(subtype in ("Scenes-Detail", "Scenes-Heard-MCQ") for subtype in subtypes)
    chosen = load_examples(configured(inputs, synthetic_share=share, synthetic_subtypes=SYNTHETIC))
    places = np.array([int(name.removeprefix("train/")) for name in chosen.ids])
    synthetic = sum(subtype in ("Scenes-Detail", "Scenes-Heard-MCQ") for subtype in subtypes[places])
    assert len(set(places)) == len(chosen)
    assert abs(synthetic - share * len(chosen)) <= 0.5
    assert synthetic == counts[True] or len(chosen) - synthetic == counts[False]
    # The kept questions are unchanged.
    numbers = np.arange(len(chosen))
    for name, array in every.collate(0, 0, places).items():
        assert np.array_equal(array, chosen.collate(0, 0, numbers)[name]), name


@pytest.mark.extended
def test_seed_draws_synthetic_questions_of_train_split(inputs):
    def names(**changes: Any) -> list[str]:
        return list(load_examples(configured(inputs, synthetic_share=0.2, synthetic_subtypes=SYNTHETIC, **changes)).ids)

    assert names() == names()
    assert names() != names(seed=1)
    config = configured(inputs, synthetic_share=0.2, synthetic_subtypes=SYNTHETIC)
    assert len(load_examples(config, "val")) == len(read_records(config.shards, "val"))


@pytest.mark.extended
def test_unreachable_synthetic_share_is_refused(inputs):
    with pytest.raises(ValueError, match=r"synthetic_share 0\.3\b.*\b0 of\b.*Scenes-Detail.*synthetic_subtypes"):
        load_examples(configured(inputs, synthetic_share=0.3))


@pytest.mark.extended
def test_decoder_without_pretraining_has_fresh_weights(inputs):
    processor = load_processor(str(inputs.root / "features/processor"))
    loaded, fresh, other = (
        build_model(configured(inputs, decoder=str(inputs.root / "decoder"), **changes), processor).language_model
        for changes in ({}, {"pretrained": False}, {"pretrained": False, "seed": 1})
    )
    assert loaded.config.to_dict() == fresh.config.to_dict()
    weights = inputs.decoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = fresh.state_dict()[name], other.state_dict()[name]
    assert not torch.equal(first, weights[name])
    assert not torch.equal(first, second)


@pytest.mark.extended
def test_decoder_with_other_tokenizer_is_refused(inputs, tmp_path):
    inputs.decoder.save_pretrained(tmp_path)
    tokenizer = load_processor(str(inputs.root / "features/processor")).tokenizer
    tokenizer.add_tokens(["mellow"])
    tokenizer.save_pretrained(tmp_path)
    processor = load_processor(str(inputs.root / "features/processor"))
    with pytest.raises(ValueError, match=r"tokenizer.*jobs/preprocess\.py.*--decoder"):
        build_model(configured(inputs, decoder=str(tmp_path)), processor)


@pytest.mark.extended
def test_fresh_weights_need_a_decoder(inputs):
    with pytest.raises(ValueError, match=r"pretrained.*`decoder`"):
        configured(inputs, pretrained=False)


@pytest.fixture(scope="module")
def grid(inputs: SimpleNamespace) -> AblationConfig:
    """Two points with two seeds each; the encoder of one is missing."""
    return AblationConfig(
        output=str(inputs.root / "ablation"),
        train={
            "size": "mellow-tiny", "batch": 16, "micro_batch": 8, "epochs": 0.5, "validation_examples": 8,
            "scaling": {"workers": 1},
        },
        preprocess={"corpus": str(inputs.root / "corpus")},
        evaluate={"split": "val", "workers": 1, "max_new_tokens": 4, "limit": 4},
        grid={"encoder": [str(inputs.root / "encoder"), str(inputs.root / "no-encoder")], "lora": [{"rank": 4}]},
        seeds=[0, 1],
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(grid: AblationConfig) -> dict[str, Any]:
    return run_ablation(grid)


@pytest.mark.extended
def test_grid_report_has_scores_and_failures(grid, result):
    good, failed = result["points"]
    stored = [storage.read_json(storage.join(grid.output, "runs", run["run"], RESULT)) for run in good["runs"]]
    assert [run["seed"] for run in good["runs"]] == [0, 1]
    for name in ("val_loss", "val_accuracy"):
        values = [run[name] for run in stored]
        assert good["mean"][name] == pytest.approx(np.mean(values))
        assert good["std"][name] == pytest.approx(np.std(values, ddof=1))
    assert good["std"]["val_loss"] > 0
    assert {"accuracy", "steps"} <= good["mean"].keys()
    assert not failed["runs"]
    assert [item["seed"] for item in failed["failed"]] == [0, 1]
    assert all("no-encoder: no such file or folder" in item["reason"] for item in failed["failed"])

    loss = f"{good['mean']['val_loss']:.3f} ± {good['std']['val_loss']:.3f}"
    table = Path(grid.output, "table.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert any(row[1:4] == ["encoder", "rank 4", "2 of 2"] and loss in row for row in cells)
    assert any(row[1:5] == ["no-encoder", "rank 4", "0 of 2", "failed"] for row in cells)
    rows = list(csv.DictReader(Path(grid.output, "table.csv").read_text().splitlines()))
    assert float(rows[0]["val_loss_mean"]) == good["mean"]["val_loss"]
    assert Path(grid.output, "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.extended
def test_resubmitted_ablation_trains_only_missing_runs(grid, result, inputs):
    files = {path: path.stat().st_mtime_ns for path in Path(grid.output, "runs").rglob("*")}
    assert files
    # An added value adds points and leaves the others unchanged.
    more = grid.model_copy(update={"grid": grid.grid | {"lora": [{"rank": 4}, {"rank": 4, "target_modules": ["no"]}]}})
    good, *failed = run_ablation(more)["points"]
    assert good["runs"] == result["points"][0]["runs"]
    assert all("Target modules {'no'} not found" in item["reason"] for item in failed[0]["failed"])
    assert files == {path: path.stat().st_mtime_ns for path in Path(grid.output, "runs").rglob("*")}


def names(config: AblationConfig) -> list[str]:
    return [run.name for run in ablation_runs(config)]


def test_run_name_depends_on_values_not_grid(grid):
    def changed(**changes: Any) -> list[str]:
        return names(AblationConfig(**grid.model_dump() | changes))

    first = names(grid)
    assert first[0].startswith("encoder-mellow-lora4-")
    assert len(set(first)) == 4
    assert changed(seeds=[0, 1, 2])[:2] == first[:2]
    assert changed(grid=grid.grid | {"projection": ["mellow", "mlp"]})[:2] == first[:2]
    assert changed(train=grid.train | {"learning_rate": 0.1})[0] != first[0]
    # Epochs change a run that resumes, and distinguish runs if they are an axis.
    assert changed(train=grid.train | {"epochs": 9.0}) == first
    assert len(set(changed(grid=grid.grid | {"epochs": [1.0, 2.0]}))) == 8


def test_one_at_a_time_labels(grid):
    axes = {"projection": ["mellow", "mlp", "linear"], "lora": [{"rank": 0}, {"rank": 8}]}
    config = AblationConfig(**grid.model_dump() | {"grid": axes, "combinations": "one_at_a_time"} | SHARDS)
    assert point_labels(config) == ["reference", "projection mlp", "projection linear", "lora rank 8"]
    config = AblationConfig(**grid.model_dump() | {"grid": axes} | SHARDS)
    assert len(grid_points(config)) == 6
    assert point_labels(config)[-1] == "projection linear, lora rank 8"


SHARDS = {"preprocess": None, "evaluate": None, "train": {"shards": "/s", "encoder": "/e", "size": "mellow-tiny"}}


@pytest.mark.parametrize(("metric", "best"), [("val_accuracy", "projection mlp"), ("val_loss", "projection mellow")])
def test_points_are_sorted_and_failed_runs_excluded(metric, best):
    config = AblationConfig(output="/o", grid={"projection": ["linear", "mellow", "mlp"]}, metric=metric, **SHARDS)
    scores = [(0.2, 3.0), (0.3, 1.0), (0.5, 2.0)]
    outcomes = [
        Outcome(point, seed, f"{point}-{seed}", {"val_accuracy": accuracy + 0.1 * seed, "val_loss": loss}, None)
        for point, (accuracy, loss) in enumerate(scores)
        for seed in range(3)
    ]
    outcomes[-1] = Outcome(2, 2, "2-2", {}, "RuntimeError: step 7: the loss is nan")
    result = report(config, outcomes)
    assert result["points"][0]["label"] == best
    assert result["points"][-1]["label"] == "projection linear"
    mlp = next(point for point in result["points"] if point["label"] == "projection mlp")
    assert mlp["mean"]["val_accuracy"] == pytest.approx(0.55)
    assert mlp["std"]["val_accuracy"] == pytest.approx(0.1 / 2**0.5)
    table = markdown(result)
    assert re.search(r"\| mlp +\| 2 of 3 \| 0.550 ± 0.071 \| 2.000 ± 0.000 \|", table)
    assert "- `2-2`: RuntimeError: step 7: the loss is nan" in table
    assert picture(result).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"projektion": ["mlp"]}}, r"projektion\b.*\bprojection\b"),
        ({"grid": {"seed": [0, 1]}}, r"\bseed\b.*jobs/train\.py"),
        ({"grid": {"projection": []}}, r"grid\.projection"),
        ({"grid": {"lora": [{"rnk": 4}]}}, r"'lora'.*lora\.rnk\b.*lora\.rank\b"),
        ({"grid": {"pretrained": [True, False]}}, "'pretrained': False.*`decoder`"),
        ({"grid": {"encoder": ["/a", "/b"]}}, "encoder.*`preprocess`.*`shards`"),
        ({"train": {"encoder": "/e"}}, "either `preprocess`.*`shards` in `train`"),
        ({"preprocess": {"korpus": "/c"}, "train": {"encoder": "/e"}}, r"\bkorpus\b.*\bcorpus\b"),
        ({"base": "absent.yaml"}, r"absent\.yaml"),
        ({"metric": "accuracy"}, "metric: accuracy.*`evaluate`"),
    ],
)  # fmt: skip
def test_invalid_grid_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AblationConfig(**{"output": "/o", "grid": {"projection": ["mlp"]}} | SHARDS | changes)
