"""Options of jobs: files, flags, validation and help."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from jobs.demo import DemoConfig
from jobs.deploy import DeployConfig
from mellow_platform.data.corpus_config import CorpusConfig
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.inference.predict_config import PredictConfig
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.settings import Section, command_line, dashed, flags, help_text, load
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.training.ablation_config import AblationConfig
from mellow_platform.training.ablation_grid import grid_points
from mellow_platform.training.tagger_config import TaggerConfig
from mellow_platform.training.train_config import TrainConfig
from tests.conftest import REPOSITORY

JOBS: dict[str, type[Section]] = {
    "ablate": AblationConfig,
    "demo": DemoConfig,
    "deploy": DeployConfig,
    "evaluate": EvaluateConfig,
    "make_corpus": CorpusConfig,
    "predict": PredictConfig,
    "preprocess": PreprocessConfig,
    "pretrain_encoder": TaggerConfig,
    "synthesize": SynthesizeConfig,
    "train": TrainConfig,
}
NO_NOUN = {"of", "to", "before", "after", "for", "with", "in", "by", "as", "what", "how", "who", "where", "whether"}
each_job = pytest.mark.parametrize("job", JOBS)

REQUIRED = ["--shards", "/s", "--output", "/o", "--storage", "/st", "--run", "r", "--encoder", "/e"]


def error_of(capsys: pytest.CaptureFixture) -> str:
    """Return the message on stderr, without the usage before it."""
    return capsys.readouterr().err.partition("error: ")[2]


def test_flags_override_file_and_file_overrides_defaults(tmp_path: Path):
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
        (["--learning-rat", "1"], r"--learning-rat\b.*--learning-rate\b"),
        (["--learning-rate", "fast"], "--learning-rate fast"),
        (["--zero-stage", "4"], r"--zero-stage 4\b.*\b3\b"),
        (["--scaling.workers", "0"], r"--scaling\.workers 0\b.*\b1\b"),
        (["--size", "huge"], "--size huge.*'mellow-v0'.*'mellow-tiny'"),
        (["--batch", "[1"], r"--batch \[1.*YAML"),
        (["--init-from", ""], "--init-from .*URI"),
        (["stray"], "'stray'"),
    ],
)
def test_wrong_flag_is_named_with_value(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        load(TrainConfig, [*REQUIRED, *arguments])
    assert stop.value.code == 2
    assert re.search(message, error_of(capsys))


def test_switch_needs_no_value():
    assert load(TrainConfig, [*REQUIRED, "--dry-run"]).dry_run
    assert load(TrainConfig, [*REQUIRED, "--dry-run", "--batch", "3"]).batch == 3
    assert not load(TrainConfig, [*REQUIRED, "--dry-run", "false"]).dry_run


@pytest.mark.parametrize(
    ("text", "split"),
    [("val", ["val"]), ("train,val", ["train", "val"]), ("train, val", ["train", "val"]), ("[test]", ["test"])],
)
def test_names_are_list_or_comma_separated(text: str, split: list[str]):
    assert load(PreprocessConfig, ["--corpus", "/c", "--output", "/o", "--split", text]).split == split


def test_unknown_key_in_file_suggests_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "train.yaml"
    file.write_text("scaling:\n  worker: 3\n")
    with pytest.raises(SystemExit):
        load(TrainConfig, ["--config", str(file), *REQUIRED])
    assert re.search(r"scaling\.worker\b.*scaling\.workers\b", error_of(capsys))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"train\.yaml.*no such file"),
        (b"a: [1", "YAML.*flow sequence"),
        (b"\xc0", "YAML.*'utf-8'"),
        (b"- a", r"`option: value`.*\blist\b"),
        (b"scaling: 3", r"scaling.*`option: value`.*\b3\b"),
        (b"learning_rate: fast", "learning_rate.*'fast'"),
        (b"lora: {target_modules: [1]}", r"lora\.target_modules.*\b1\b"),
    ],
)
def test_invalid_file_is_named(content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "train.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        load(TrainConfig, ["--config", str(file), *REQUIRED])
    assert stop.value.code == 2
    assert re.search(message, error_of(capsys))


def test_missing_option_is_described(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        load(CorpusConfig, [])
    error = error_of(capsys)
    assert "--output" in error and help_text(flags(CorpusConfig)["output"]) in error


def test_encoder_features_need_an_encoder(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        load(PreprocessConfig, ["--corpus", "/c", "--output", "/o", "--features", "encoder"])
    assert re.search("features.*`encoder`", error_of(capsys))


def test_training_starts_from_encoder_or_model(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        load(TrainConfig, [*REQUIRED, "--init-from", "/m"])
    assert re.search("`encoder`.*`init_from`", error_of(capsys))


def test_relative_path_in_submitted_job_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SystemExit):
        load(CorpusConfig, ["--output", "runs/x"])
    assert "'runs/x'" in error_of(capsys)


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "jobs" / "configs").glob("mellow-*/*.yaml")), ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_configuration_file_is_valid(file: Path):
    jobs: dict[str, tuple[type[Section], list[str]]] = {
        "preprocess": (PreprocessConfig, ["--corpus", "/c", "--output", "/o"]),
        "pretrain_encoder": (TaggerConfig, [*REQUIRED[:-2], "--labels", "/l"]),
    }
    schema, required = jobs[file.stem]
    assert load(schema, ["--config", str(file), *required]).model_dump()["size"] == file.parent.name


RECIPES = sorted((REPOSITORY / "jobs/configs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_divides_its_batch(recipe: Path):
    begin = "--init-from" if recipe.stem == "finetune" else "--encoder"
    places = ["--shards", "/s", "--output", "/o", "--storage", "/r", "--run", "x", begin, "/e"]
    config = load(TrainConfig, ["--config", str(recipe), *places])
    assert config.batch % (config.micro_batch * config.scaling.workers) == 0
    assert config.micro_batch % config.questions_per_pack == 0


def test_recipes_are_the_documented_ones():
    assert [path.stem for path in RECIPES] == ["8-gpus", "encoder-cached", "finetune", "lora", "published", "tiny"]


@pytest.mark.parametrize(("file", "points"), [("ablation", 10), ("ablation-tiny", 4)])
def test_ablation_grid_is_valid(file: str, points: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    config = load(AblationConfig, ["--config", f"jobs/configs/{file}.yaml", "--output", "/o"])
    assert len(grid_points(config)) == points


def test_unknown_key_of_grid_suggests_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "ablation.yaml"
    file.write_text("output: /o\ntrain: {shards: /s, encoder: /e}\ngrid: {projektion: [mlp]}\n")
    with pytest.raises(SystemExit):
        load(AblationConfig, ["--config", str(file)])
    assert re.search(r"\bprojektion\b.*\bprojection\b", error_of(capsys))


@pytest.mark.parametrize(
    "question", ["heard: a dog or a cat?", "is it #1?", "yes", "[a] or b?", "c'était « quoi » ?", "007"]
)
def test_text_option_is_not_parsed(question: str):
    for arguments in (["--question", question], [f"--question={question}"]):
        assert load(PredictConfig, ["--model", "m", "--output", "o", "--clips", "c", *arguments]).question == question


def choices(annotation: object) -> tuple[str, ...]:
    """Return the choices anywhere in the type of a field."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(choices, get_args(annotation))), ())


@each_job
def test_options_have_complete_help(job: str):
    shown = " ".join(command_line(JOBS[job]).format_help().split())
    for name, field in flags(JOBS[job]).items():
        text, options = help_text(field), choices(field.annotation)
        assert text.split()[0].lower() not in NO_NOUN, name
        assert "None" not in text and text.count("(default: ") <= 1, name
        assert re.search(r"\(default: |required|instead of", text) or field.is_required(), name
        assert text in shown and f"{dashed(name)} " in shown
        assert not options or f"{dashed(name)} {{{','.join(options)}}}" in shown


@each_job
def test_usage_has_required_options(job: str):
    usage = command_line(JOBS[job]).format_usage()
    required = [dashed(name) for name, field in flags(JOBS[job]).items() if field.is_required()]
    assert re.findall(r"--\S+", usage) == required
    assert usage.endswith("[options]\n")


@each_job
def test_help_imports_no_heavy_package(job: str):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{job}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('jobs/{job}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "print('loaded:', *sorted({'torch', 'ray', 'transformers', 'pyarrow', 'fsspec', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.startswith(f"usage: {job}.py "), result.stderr
    assert result.stdout.endswith("\nloaded:\n")


@each_job
def test_job_has_its_options(job: str):
    names = runpy.run_path(str(REPOSITORY / "jobs" / f"{job}.py"))
    assert command_line(names[JOBS[job].__name__]).format_help() == command_line(JOBS[job]).format_help()


def test_locations_are_paths_and_uris():
    config = EvaluateConfig(
        model="predictions:/answers.jsonl", corpus="/corpus", audio_root={"mmau": "s3://b/mmau", "x": "/x"}, output="/o"
    )
    assert config.locations() == [
        ("model", "/answers.jsonl", True),
        ("corpus", "/corpus", True),
        ("audio_root", "s3://b/mmau", True),
        ("audio_root", "/x", True),
        ("output", "/o", False),
    ]
    assert EvaluateConfig(model="http://localhost/v1", mmau="/m", output="/o").locations()[0] == ("mmau", "/m", True)


@pytest.mark.parametrize(
    ("decoder", "found"),
    [("HuggingFaceTB/SmolLM2-135M", []), *((uri, [uri]) for uri in ("./folder", "/folder", "s3://b/f", "smollm.gguf"))],
)
def test_decoder_path_is_a_location(decoder: str, found: list[str]):
    locations = load(TrainConfig, [*REQUIRED, "--decoder", decoder]).locations()
    assert [uri for name, uri, _ in locations if name == "decoder"] == found


def test_ablation_has_locations_of_its_points():
    fields = {"output": "/o", "grid": {"encoder": ["/e1", "/e2"]}, "preprocess": {"corpus": "/c"}}
    read = [(name, uri) for name, uri, exists in AblationConfig(**fields).locations() if exists]
    assert read == [
        ("train: encoder", "/e1"), ("preprocess: corpus", "/c"), ("preprocess: encoder", "/e1"),
        ("train: encoder", "/e2"), ("preprocess: encoder", "/e2"),
    ]  # fmt: skip
