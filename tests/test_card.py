"""Model cards: content and code sample; upload of a folder to a hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from mellow_platform.cli import main
from mellow_platform.data.audio import encode
from mellow_platform.model import MellowConfig, MellowFeatureExtractor, MellowForConditionalGeneration, MellowProcessor
from mellow_platform.model.card import model_card, push
from mellow_platform.model.folder import load_model, save_model
from mellow_platform.model.tokenizer import train_tokenizer

REPORT = {
    "records": 1200,
    "split": "test",
    "conditions": ["audio", "chance"],
    "benchmarks": {
        "mmau": {"questions": 9000},
        "mcq": {
            "main": "accuracy",
            "scores": {"audio": {"accuracy": {"value": 0.75}}, "chance": {"accuracy": {"value": 0.125}}},
            "groups": {
                "family": {"Scenes-Heard-MCQ": {"scores": {"audio": {"value": 0.9}, "chance": {"value": 0.25}}}}
            },
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny, untrained model with its processor and card."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["caption the audio.", "a loud tone"])
    processor = MellowProcessor(MellowFeatureExtractor.from_size("mellow-tiny"), tokenizer, prompt_length=24)
    model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-tiny", vocab_size=len(tokenizer)))
    folder = tmp_path_factory.mktemp("model")
    save_model(model, processor, str(folder), training_data="Twelve synthetic scenes.")
    return folder


def test_saved_card_contains_sizes(folder: Path):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "audio-text-to-text"
    assert card.data.library_name == "mellow-platform"
    assert "mellow" in card.data.tags
    model, _ = load_model(str(folder))
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card.text, flags=re.MULTILINE))
    total = int(rows["parameters"].replace(",", ""))
    assert total == model.num_parameters()
    parts = [
        int(rows[name].replace(",", "")) for name in ("decoder (llama)", "audio encoder (mellow_htsat)", "projection")
    ]
    assert sum(parts) == total
    assert rows["audio tokens per clip"] == str(model.config.num_audio_tokens)
    assert rows["prompt, in tokens"] == "24, always padded to this length"
    assert "Twelve synthetic scenes." in card.text
    assert "Not measured yet." in card.text


def test_card_code_runs(folder: Path, monkeypatch, capsys: pytest.CaptureFixture):
    (sample,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    waveform = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    (folder / "clip.wav").write_bytes(encode(waveform, 32_000, "WAV"))
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(sample, names)
    answer = names["processor"].decode_answers(names["model"].generate(**names["inputs"]))[0]
    assert answer
    assert capsys.readouterr().out == f"{answer}\n"


def test_card_command_adds_scores_license_and_data(folder: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps(REPORT))
    main(["card", str(folder), "--report", str(report), "--license", "mit", "--training-data", "ReasonAQA."])
    card = ModelCard.load(folder / "README.md")
    rows = [line.replace(" ", "") for line in card.text.splitlines()]
    start = rows.index("|questions|score|audio|chance|")
    assert rows[start + 2 : start + 4] == ["|mcq|accuracy|0.750|0.125|", "|Scenes-Heard-MCQ|accuracy|0.900|0.250|"]
    assert "On 1,200 questions of the split test" in card.text
    assert card.data.license == "mit"
    assert "ReasonAQA." in card.text


def test_invalid_report_raises(folder: Path):
    with pytest.raises(ValueError, match="split, conditions, benchmarks"):
        model_card(*load_model(str(folder)), report={"records": 3})


def test_push_without_model_raises(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config\.json"):
        push(str(tmp_path), "owner/name")


def test_push_names_unreachable_hub(folder: Path):
    command = [sys.executable, "-m", "mellow_platform.cli", "push", str(folder), "owner/name"]
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none"}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere)
    assert result.returncode == 1
    assert f"mellow: {folder} cannot be pushed to owner/name at http://127.0.0.1:9" in result.stderr
    assert "HF_ENDPOINT" in result.stderr
    assert "Traceback" not in result.stderr
