"""All jobs on a small corpus with real Ray and DeepSpeed: shards, encoder, features, training, evaluation."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel

from mellow_platform import storage
from mellow_platform.data.records import SPLITS, read_records, write_records
from mellow_platform.data.shards import Manifest
from mellow_platform.data.shards import read_records as read_shard_records
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.evaluate_job import evaluate
from mellow_platform.evaluation.evaluation_report import markdown
from mellow_platform.model import HTSATEncoder, encoder_config
from mellow_platform.model.decoder import load_decoder
from mellow_platform.model.folder import load_model, load_processor, save_pretrained
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from mellow_platform.training.checkpoints import CheckpointStore
from mellow_platform.training.finetune import finetune
from mellow_platform.training.run_config import ScalingSection
from mellow_platform.training.tagged_clips import TaggedClips
from mellow_platform.training.tagger import pretrain
from mellow_platform.training.tagger_config import TaggerConfig
from mellow_platform.training.train_config import TrainConfig
from tests.small_corpus import write_corpus

CLIPS = {"train": 24, "val": 2, "test": 6}


@pytest.fixture(scope="module")
def outputs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Outputs of all jobs on a small corpus."""
    root = tmp_path_factory.mktemp("path")
    outputs = SimpleNamespace(root=root, corpus=root / "corpus", run=lambda name: str(root / name))
    write_corpus(str(outputs.corpus), CLIPS)
    # Three unusable clips: damaged, empty, and missing.
    (outputs.corpus / "audio/train/000000.flac").write_bytes(b"not a sound")
    (outputs.corpus / "audio/train/000001.flac").write_bytes(b"")
    (outputs.corpus / "audio/train/000002.flac").unlink()
    common = {"corpus": str(outputs.corpus), "size": "mellow-tiny", "clips_per_shard": 8, "max_failed_share": 0.2}
    outputs.common = common
    outputs.log_mel = preprocess(PreprocessConfig(**common, output=outputs.run("log-mel")))
    run = {"storage": outputs.run("runs"), "size": "mellow-tiny", "batch": 8, "micro_batch": 4}
    run |= {"checkpoint_every": 4, "log_every": 1}
    outputs.encoder_config = TaggerConfig(
        **run, shards=outputs.run("log-mel"), labels=str(outputs.corpus / "labels.json"), output=outputs.run("encoder"),
        run="encoder", epochs=2.0,
    )  # fmt: skip
    outputs.encoder_result = pretrain(outputs.encoder_config)
    outputs.features = preprocess(
        PreprocessConfig(**common, output=outputs.run("features"), features="encoder", encoder=outputs.run("encoder"))
    )
    outputs.train_config = TrainConfig(
        **run, shards=outputs.run("features"), encoder=outputs.run("encoder"), output=outputs.run("model"),
        run="mellow", epochs=0.5,
    )  # fmt: skip
    outputs.train_result = finetune(outputs.train_config)
    outputs.evaluate_config = EvaluateConfig(
        model=outputs.run("model"),
        shards=outputs.run("features"),
        output=outputs.run("evaluation"),
        limit=24,
        batch_size=8,
    )
    outputs.report = evaluate(outputs.evaluate_config)
    return outputs


def test_quarantine_has_reasons(outputs: SimpleNamespace):
    counts = outputs.log_mel.counts
    assert counts["quarantined_by_reason"] == {"empty": 1, "missing": 1, "not_audio": 1}
    assert counts["clips"] == sum(CLIPS.values()) - 3
    rows = outputs.log_mel.read_table(outputs.run("log-mel"), "quarantine").to_pylist()
    assert {row["filepath"]: row["reason"] for row in rows} == {
        "train/000000.flac": "not_audio",
        "train/000001.flac": "empty",
        "train/000002.flac": "missing",
    }
    assert all(row["detail"] for row in rows)


def test_only_records_of_quarantined_clips_are_dropped(outputs: SimpleNamespace):
    counts = outputs.log_mel.counts
    written = {split: read_records(str(outputs.corpus / f"{split}.json")) for split in SPLITS}
    assert sum(counts["records"].values()) + counts["records_dropped"] == sum(map(len, written.values()))
    assert counts["records"]["test"] == len(written["test"])
    stored = read_shard_records(outputs.run("log-mel"), "test").to_pylist()
    assert [row["input"] for row in stored] == [record.input for record in written["test"]]


@pytest.mark.parametrize("partner", ["random", "silence"])
def test_single_clip_questions_have_partners(partner: str, outputs: SimpleNamespace):
    shards = outputs.run(f"partner-{partner}")
    manifest = preprocess(PreprocessConfig(**outputs.common, partner=partner, output=shards))
    # Stored silence is not a clip of the corpus: all counts are those of `partner: same`.
    assert manifest.counts == outputs.log_mel.counts
    store = FeatureStore.load(shards)
    assert ("<silence>" in store.filepaths) == (partner == "silence")
    splits = dict(zip(store.filepaths, store.splits, strict=True))
    files = {clip_id: store.filepaths[row] for clip_id, row in store.rows.items()}
    drawn = set()
    for split in SPLITS:
        rows = read_shard_records(shards, split).to_pylist()
        same = read_shard_records(outputs.run("log-mel"), split).to_pylist()
        for row, before in zip(rows, same, strict=True):
            assert {**row, "clip2": ""} == {**before, "clip2": ""}
            second = files[row["clip2"]]
            drawn.add(second)
            if row["filepath2"]:
                assert second == row["filepath2"]
            elif partner == "silence":
                assert second == "<silence>"
            else:
                assert splits[second] == split
                assert second != row["filepath1"]
    if partner == "random":
        assert len(drawn) > 20
    else:
        silence = store.arrays["log_mel"][store.filepaths.index("<silence>")]
        assert (silence == silence.flat[0]).all()
    processor = load_processor(f"{shards}/processor")
    assert processor.partner == partner


def test_prompts_without_end_marker(outputs: SimpleNamespace):
    shards = outputs.run("unmarked")
    preprocess(PreprocessConfig(**outputs.common, prompt_end_marker=False, output=shards))
    end = load_processor(f"{shards}/processor").tokenizer.eos_token_id
    rows = read_shard_records(shards, "test").to_pylist()
    assert not any(end in row["prompt_ids"] for row in rows)
    assert all(row["answer_ids"][-1] == end for row in rows)


def test_max_failed_share_stops_the_job(outputs: SimpleNamespace):
    config = PreprocessConfig(**outputs.common | {"max_failed_share": 0.01}, output=outputs.run("refused"))
    with pytest.raises(ValueError, match=r"\b[123] of 32\b.*max_failed_share"):
        preprocess(config)
    assert not storage.exists(outputs.run("refused/manifest.json"))


def test_shards_are_reproducible(outputs: SimpleNamespace):
    again = preprocess(PreprocessConfig(**outputs.common, output=outputs.run("again")))
    assert again.content_hash == outputs.log_mel.content_hash
    for name in again.files:
        assert (outputs.root / "again" / name).read_bytes() == (outputs.root / "log-mel" / name).read_bytes()
    assert Manifest.read(outputs.run("again")).configuration["clips_per_shard"] == 8


def test_folder_of_other_configuration_is_refused(outputs: SimpleNamespace):
    config = PreprocessConfig(**outputs.common | {"clips_per_shard": 4}, output=outputs.run("log-mel"))
    with pytest.raises(ValueError, match="clips_per_shard"):
        preprocess(config)


def test_audioset_labels_train_an_encoder(outputs: SimpleNamespace):
    (outputs.root / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/1,Tone\n")
    (outputs.root / "sounds").mkdir()
    (outputs.root / "sounds/abc.wav").write_bytes((outputs.corpus / "audio/train/000005.flac").read_bytes())
    (outputs.root / "segments.csv").write_text('# YTID, start, end, mids\nabc, 0.0, 10.0, "/m/1"\n')
    labels = {"labels": outputs.run("segments.csv"), "audio_root": outputs.run("sounds")}
    manifest = preprocess(PreprocessConfig(**labels, output=outputs.run("audioset")))
    assert manifest.features == {"log_mel": [1001, 64]}
    config = TaggerConfig(
        shards=outputs.run("audioset"), labels=outputs.run("segments.csv"), output="/o", storage="/s", run="r"
    )
    clips = TaggedClips.load(config)
    assert (clips.ids, clips.names, clips.targets.tolist()) == (["abc.wav"], ["Tone"], [[1.0]])


@pytest.mark.extended
def test_resumed_encoder_equals_undisturbed_one(outputs: SimpleNamespace):
    run = Path(outputs.run("runs"), "encoder-of-two")
    changes = {"run": run.name, "output": outputs.run(run.name), "scaling": ScalingSection(workers=2)}
    config = outputs.encoder_config.model_copy(update=changes)

    def trained() -> tuple[int, dict[str, torch.Tensor]]:
        return pretrain(config)["resumed_from"], HTSATEncoder.from_pretrained(config.output).state_dict()

    resumed_from, undisturbed = trained()
    assert resumed_from == 0
    shutil.rmtree(CheckpointStore(str(run)).checkpoints()[-1].uri)
    (run / "result.json").unlink()
    resumed_from, weights = trained()
    assert resumed_from == 4
    torch.testing.assert_close(weights, undisturbed, rtol=0.0, atol=0.0)


def test_clip_in_two_splits_is_refused(outputs: SimpleNamespace, tmp_path: Path):
    for split in SPLITS:
        write_records(str(tmp_path / f"{split}.json"), read_records(str(outputs.corpus / "test.json")))
    with pytest.raises(ValueError, match=r"test/00000\d\.flac.*\btrain\b.*\bval\b"):
        preprocess(PreprocessConfig(**outputs.common | {"corpus": str(tmp_path)}, output=outputs.run("leak")))


def test_shards_with_other_features_are_refused(outputs: SimpleNamespace):
    with pytest.raises(ValueError, match=r"logmel.*encoder"):
        evaluate(outputs.evaluate_config.model_copy(update={"shards": outputs.run("log-mel")}))


def test_unfinished_shards_are_refused(outputs: SimpleNamespace):
    with pytest.raises(FileNotFoundError, match=r"jobs/preprocess\.py"):
        FeatureStore.load(outputs.run("refused"))


def test_stored_features_match_the_encoder(outputs: SimpleNamespace):
    encoder = HTSATEncoder.from_pretrained(outputs.run("encoder")).eval()
    spectrograms, features = FeatureStore.load(outputs.run("log-mel")), FeatureStore.load(outputs.run("features"))
    assert spectrograms.rows == features.rows
    with torch.no_grad():
        encoded = encoder(torch.from_numpy(spectrograms.arrays["log_mel"]).float())
    np.testing.assert_allclose(features.arrays["frames"], encoded.frames.numpy(), atol=1e-3)
    np.testing.assert_allclose(features.arrays["latent"], encoded.latent.numpy(), atol=5e-3)


def test_training_result_log_and_tensorboard(outputs: SimpleNamespace):
    metrics = outputs.train_result
    assert metrics["step"] == metrics["total_steps"] > 4
    assert metrics["examples_per_second"] > 0
    assert np.isfinite(metrics["loss"])
    store = CheckpointStore(metrics["run"])
    assert [saved.step for saved in store.checkpoints()][-1] == metrics["step"]
    losses = store.read_log()["loss"].to_pylist()
    assert len(losses) == metrics["step"]
    assert losses[-1] < losses[0]
    assert list((outputs.root / "runs/mellow/tensorboard").glob("events.out.tfevents.*"))


def test_trained_folder_has_model_card(outputs: SimpleNamespace):
    card = ModelCard.load(outputs.root / "model/README.md")
    assert re.search(rf"\| prompt.*\| {load_processor(outputs.run('model')).prompt_length}\b", card.text)


def test_trained_folder_loads_with_transformers(outputs: SimpleNamespace):
    model = AutoModel.from_pretrained(outputs.run("model"))
    encoder = HTSATEncoder.from_pretrained(outputs.run("encoder"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.audio_encoder.state_dict()[name]), name


def test_report_has_every_family_and_condition(outputs: SimpleNamespace):
    report = json.loads((outputs.root / "evaluation/report.json").read_text())
    assert report["records"] == 24
    families = report["benchmarks"]["families"]["groups"]["family"]
    for family in families.values():
        assert set(family["scores"]) == {"audio", "noise", "text_only", "chance"}
        for score in family["scores"].values():
            assert 0 <= round(score["low"], 9) <= round(score["value"], 9) <= round(score["high"], 9) <= 1
    rows = pq.read_table(outputs.root / "evaluation/predictions.parquet").to_pylist()
    assert len(rows) == 4 * 24
    questions = read_records(str(outputs.corpus / "test.json"))[:24]
    for condition in ("audio", "noise", "text_only"):
        assert [row["question"] for row in rows if row["condition"] == condition] == [
            record.input for record in questions
        ]
    assert all(family in markdown(report) for family in families)


@pytest.mark.slow
def test_published_size_trains_gguf_decoder(cluster: None, smollm2_gguf: str, tmp_path: Path):
    write_corpus(str(tmp_path / "corpus"), {"train": 2, "val": 1, "test": 1})
    save_pretrained(HTSATEncoder(encoder_config("mellow-v0")), str(tmp_path / "encoder"))
    folders = {"encoder": str(tmp_path / "encoder"), "decoder": smollm2_gguf, "size": "mellow-v0"}
    shards = str(tmp_path / "features")
    manifest = preprocess(
        PreprocessConfig(**folders, corpus=str(tmp_path / "corpus"), output=shards, features="encoder")
    )
    assert manifest.features == {"frames": [32, 527], "latent": [768]}
    run = {"storage": str(tmp_path / "runs"), "run": "v0", "output": str(tmp_path / "model")}
    config = TrainConfig(**folders, **run, shards=shards, batch=2, micro_batch=1, epochs=0.2, learning_rate=1e-5)
    result = finetune(config)
    assert result["step"] == result["total_steps"]
    model, processor = load_model(str(tmp_path / "model"))
    # After a few small steps every decoder weight has changed, and is still close to that of the file.
    for name, value in load_decoder(smollm2_gguf).named_parameters():
        change = (model.language_model.get_parameter(name) - value).abs().max()
        assert 0 < change < 1e-3, name
    assert sum(parameter.numel() for parameter in model.parameters()) == 165_937_495
    assert model.language_model.generation_config.eos_token_id == 0
    assert processor.prompt_length == 129
