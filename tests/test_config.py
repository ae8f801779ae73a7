"""Configuration: files, overrides, and what is refused."""

from pathlib import Path

import pytest

from mellow_platform.config import (
    AblationConfig,
    CorpusConfig,
    EncoderConfig,
    PredictConfig,
    PreprocessConfig,
    Section,
    TrainConfig,
    load,
)
from tests.conftest import REPOSITORY

REQUIRED = ["--shards", "/s", "--output", "/o", "--storage", "/st", "--run", "r", "--encoder", "/e"]


def test_flags_outrank_the_file_which_outranks_the_defaults(tmp_path: Path):
    file = tmp_path / "train.yaml"
    file.write_text("learning_rate: 0.5\nmicro_batch: 7\nscaling:\n  workers: 3\n  max_failures: 9\n")
    config = load(TrainConfig, ["--config", str(file), *REQUIRED, "--learning-rate", "3e-4", "--scaling.workers=5"])
    assert config.learning_rate == 3e-4
    assert config.micro_batch == 7
    assert (config.scaling.workers, config.scaling.max_failures) == (5, 9)
    assert config.max_grad_norm == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat", "1"], "--learning-rat is not an option; did you mean --learning-rate?"),
        (["--learning-rate", "fast"], "learning_rate: Input should be a valid number"),
        (["--zero-stage", "4"], "zero_stage: Input should be less than or equal to 3"),
        (["--scaling.workers", "0"], "scaling.workers: Input should be greater than or equal to 1"),
        (["stray"], "'stray' does not belong to any option"),
    ],
)
def test_a_wrong_flag_is_named_with_its_value(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        load(TrainConfig, [*REQUIRED, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_switch_needs_no_value():
    assert load(TrainConfig, [*REQUIRED, "--dry-run"]).dry_run
    assert load(TrainConfig, [*REQUIRED, "--dry-run", "--batch", "3"]).batch == 3
    assert not load(TrainConfig, [*REQUIRED, "--dry-run", "false"]).dry_run


@pytest.mark.parametrize(
    ("text", "split"),
    [("val", ["val"]), ("train,val", ["train", "val"]), ("train, val", ["train", "val"]), ("[test]", ["test"])],
)
def test_names_are_a_list_or_separated_by_commas(text: str, split: list[str]):
    assert load(PreprocessConfig, ["--corpus", "/c", "--output", "/o", "--split", text]).split == split


def test_an_unknown_key_in_a_file_is_refused_with_the_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "train.yaml"
    file.write_text("scaling:\n  worker: 3\n")
    with pytest.raises(SystemExit):
        load(TrainConfig, ["--config", str(file), *REQUIRED])
    assert "scaling.worker is not a configuration key; did you mean scaling.workers?" in capsys.readouterr().err


def test_a_missing_required_field_says_what_it_is(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        load(CorpusConfig, [])
    assert "output is required: folder to write the corpus to" in capsys.readouterr().err


def test_encoder_features_need_an_encoder(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        load(PreprocessConfig, ["--corpus", "/c", "--output", "/o", "--features", "encoder"])
    assert "features: encoder and `encoder`, its folder, go together" in capsys.readouterr().err


def test_training_begins_in_one_place(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        load(TrainConfig, [*REQUIRED, "--init-from", "/m"])
    assert "give `encoder`, or `init_from`" in capsys.readouterr().err


def test_a_relative_path_in_a_submitted_job_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SystemExit):
        load(CorpusConfig, ["--output", "runs/x"])
    assert "'runs/x' is relative" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "jobs" / "configs").glob("mellow-*/*.yaml")), ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_every_shipped_file_fits_its_job(file: Path):
    jobs: dict[str, tuple[type[Section], list[str]]] = {
        "preprocess": (PreprocessConfig, ["--corpus", "/c", "--output", "/o"]),
        "pretrain_encoder": (EncoderConfig, [*REQUIRED[:-2], "--labels", "/l"]),
    }
    schema, required = jobs[file.stem]
    assert load(schema, ["--config", str(file), *required]).model_dump()["size"] == file.parent.name


RECIPES = sorted((REPOSITORY / "jobs/configs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_configuration_whose_workers_share_its_batch(recipe: Path):
    begin = "--init-from" if recipe.stem == "finetune" else "--encoder"
    places = ["--shards", "/s", "--output", "/o", "--storage", "/r", "--run", "x", begin, "/e"]
    config = load(TrainConfig, ["--config", str(recipe), *places])
    assert config.batch % (config.micro_batch * config.scaling.workers) == 0
    assert config.micro_batch % config.questions_per_pack == 0


def test_the_recipes_are_those_that_are_documented():
    assert [path.stem for path in RECIPES] == ["8-gpus", "encoder-cached", "finetune", "lora", "published", "tiny"]


@pytest.mark.parametrize(("file", "points"), [("ablation", 10), ("ablation-tiny", 4)])
def test_every_grid_of_an_ablation_is_valid(file: str, points: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    config = load(AblationConfig, ["--config", f"jobs/configs/{file}.yaml", "--output", "/o"])
    assert len(config.points()) == points


def test_an_unknown_key_of_a_grid_is_refused_with_the_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "ablation.yaml"
    file.write_text("output: /o\ntrain: {shards: /s, encoder: /e}\ngrid: {projektion: [mlp]}\n")
    with pytest.raises(SystemExit):
        load(AblationConfig, ["--config", str(file)])
    assert (
        "projektion is not a field of jobs/train.py that a grid can have; did you mean proj" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "question", ["heard: a dog or a cat?", "is it #1?", "yes", "[a] or b?", "c'était « quoi » ?", "007"]
)
def test_text_is_taken_as_it_is_written(question: str):
    for flags in (["--question", question], [f"--question={question}"]):
        assert load(PredictConfig, ["--model", "m", "--output", "o", "--clips", "c", *flags]).question == question
