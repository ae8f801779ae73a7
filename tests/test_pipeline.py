"""The whole path on a small corpus with real Ray and DeepSpeed: shards, encoder, features, training, evaluation."""

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
from mellow_platform.training.tagger_config import EncoderConfig
from mellow_platform.training.train_config import TrainConfig
from tests.small_corpus import write_corpus

CLIPS = {"train": 24, "val": 2, "test": 6}


@pytest.fixture(scope="module")
def path(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Everything the jobs make of a small corpus, in order."""
    root = tmp_path_factory.mktemp("path")
    made = SimpleNamespace(root=root, corpus=root / "corpus", run=lambda name: str(root / name))
    write_corpus(str(made.corpus), CLIPS)
    # Three clips that cannot be used: damaged, empty, and absent.
    (made.corpus / "audio/train/000000.flac").write_bytes(b"not a sound")
    (made.corpus / "audio/train/000001.flac").write_bytes(b"")
    (made.corpus / "audio/train/000002.flac").unlink()
    common = {"corpus": str(made.corpus), "size": "mellow-tiny", "clips_per_shard": 8, "max_failed_share": 0.2}
    made.common = common
    made.log_mel = preprocess(PreprocessConfig(**common, output=made.run("log-mel")))
    run = {"storage": made.run("runs"), "size": "mellow-tiny", "batch": 8, "micro_batch": 4}
    run |= {"checkpoint_every": 4, "log_every": 1}
    made.encoder_config = EncoderConfig(
        **run, shards=made.run("log-mel"), labels=str(made.corpus / "labels.json"), output=made.run("encoder"),
        run="encoder", epochs=2.0,
    )  # fmt: skip
    made.encoder_result = pretrain(made.encoder_config)
    made.features = preprocess(
        PreprocessConfig(**common, output=made.run("features"), features="encoder", encoder=made.run("encoder"))
    )
    made.train_config = TrainConfig(
        **run, shards=made.run("features"), encoder=made.run("encoder"), output=made.run("model"), run="mellow",
        epochs=0.5,
    )  # fmt: skip
    made.train_result = finetune(made.train_config)
    made.evaluate_config = EvaluateConfig(
        model=made.run("model"), shards=made.run("features"), output=made.run("evaluation"), limit=24, batch_size=8
    )
    made.report = evaluate(made.evaluate_config)
    return made


def test_unusable_clips_are_quarantined_with_their_reason(path: SimpleNamespace):
    counts = path.log_mel.counts
    assert counts["quarantined_by_reason"] == {"empty": 1, "missing": 1, "not_audio": 1}
    assert counts["clips"] == sum(CLIPS.values()) - 3
    rows = path.log_mel.read_table(path.run("log-mel"), "quarantine").to_pylist()
    assert {row["filepath"]: row["reason"] for row in rows} == {
        "train/000000.flac": "not_audio",
        "train/000001.flac": "empty",
        "train/000002.flac": "missing",
    }
    assert all(row["detail"] for row in rows)


def test_records_of_quarantined_clips_are_counted_and_nothing_else_is_lost(path: SimpleNamespace):
    counts = path.log_mel.counts
    written = {split: read_records(str(path.corpus / f"{split}.json")) for split in SPLITS}
    assert sum(counts["records"].values()) + counts["records_dropped"] == sum(map(len, written.values()))
    assert counts["records"]["test"] == len(written["test"])
    stored = read_shard_records(path.run("log-mel"), "test").to_pylist()
    assert [row["input"] for row in stored] == [record.input for record in written["test"]]


@pytest.mark.parametrize("partner", ["random", "silence"])
def test_a_question_about_one_clip_is_stored_with_its_partner(partner: str, path: SimpleNamespace):
    shards = path.run(f"partner-{partner}")
    manifest = preprocess(PreprocessConfig(**path.common, partner=partner, output=shards))
    # A stored silence is no clip of the corpus: counts and shards of clips are those of the rule `same`.
    assert manifest.counts == path.log_mel.counts
    store = FeatureStore.load(shards)
    assert ("<silence>" in store.filepaths) == (partner == "silence")
    splits = dict(zip(store.filepaths, store.splits, strict=True))
    files = {clip_id: store.filepaths[row] for clip_id, row in store.rows.items()}
    drawn = set()
    for split in SPLITS:
        rows = read_shard_records(shards, split).to_pylist()
        same = read_shard_records(path.run("log-mel"), split).to_pylist()
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


def test_prompts_are_stored_without_an_end_marker_where_the_job_says_so(path: SimpleNamespace):
    shards = path.run("unmarked")
    preprocess(PreprocessConfig(**path.common, prompt_end_marker=False, output=shards))
    end = load_processor(f"{shards}/processor").tokenizer.eos_token_id
    rows = read_shard_records(shards, "test").to_pylist()
    assert not any(end in row["prompt_ids"] for row in rows)
    assert all(row["answer_ids"][-1] == end for row in rows)


def test_too_many_unusable_clips_stop_the_job(path: SimpleNamespace):
    config = PreprocessConfig(**path.common | {"max_failed_share": 0.01}, output=path.run("refused"))
    with pytest.raises(ValueError, match=r"\b[123] of 32\b.*max_failed_share"):
        preprocess(config)
    assert not storage.exists(path.run("refused/manifest.json"))


def test_the_same_input_gives_the_same_shards(path: SimpleNamespace):
    again = preprocess(PreprocessConfig(**path.common, output=path.run("again")))
    assert again.content_hash == path.log_mel.content_hash
    for name in again.files:
        assert (path.root / "again" / name).read_bytes() == (path.root / "log-mel" / name).read_bytes()
    assert Manifest.read(path.run("again")).configuration["clips_per_shard"] == 8


def test_a_folder_with_shards_of_another_configuration_is_refused(path: SimpleNamespace):
    config = PreprocessConfig(**path.common | {"clips_per_shard": 4}, output=path.run("log-mel"))
    with pytest.raises(ValueError, match="clips_per_shard"):
        preprocess(config)


def test_clips_that_only_have_labels_are_shards_to_train_an_encoder_on(path: SimpleNamespace):
    (path.root / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/1,Tone\n")
    (path.root / "sounds").mkdir()
    (path.root / "sounds/abc.wav").write_bytes((path.corpus / "audio/train/000005.flac").read_bytes())
    (path.root / "segments.csv").write_text('# YTID, start, end, mids\nabc, 0.0, 10.0, "/m/1"\n')
    labels = {"labels": path.run("segments.csv"), "audio_root": path.run("sounds")}
    manifest = preprocess(PreprocessConfig(**labels, output=path.run("audioset")))
    assert manifest.features == {"log_mel": [1001, 64]}
    config = EncoderConfig(
        shards=path.run("audioset"), labels=path.run("segments.csv"), output="/o", storage="/s", run="r"
    )
    clips = TaggedClips.load(config)
    assert (clips.ids, clips.names, clips.targets.tolist()) == (["abc.wav"], ["Tone"], [[1.0]])


@pytest.mark.extended
def test_an_encoder_of_two_workers_goes_on_from_its_checkpoint_as_if_never_stopped(path: SimpleNamespace):
    run = Path(path.run("runs"), "encoder-of-two")
    changes = {"run": run.name, "output": path.run(run.name), "scaling": ScalingSection(workers=2)}
    config = path.encoder_config.model_copy(update=changes)

    def trained() -> tuple[int, dict[str, torch.Tensor]]:
        return pretrain(config)["resumed_from"], HTSATEncoder.from_pretrained(config.output).state_dict()

    resumed_from, undisturbed = trained()
    assert resumed_from == 0
    shutil.rmtree(CheckpointStore(str(run)).saved()[-1].uri)
    (run / "result.json").unlink()
    resumed_from, weights = trained()
    assert resumed_from == 4
    torch.testing.assert_close(weights, undisturbed, rtol=0.0, atol=0.0)


def test_a_clip_in_two_splits_is_refused(path: SimpleNamespace, tmp_path: Path):
    for split in SPLITS:
        write_records(str(tmp_path / f"{split}.json"), read_records(str(path.corpus / "test.json")))
    with pytest.raises(ValueError, match=r"test/00000\d\.flac.*\btrain\b.*\bval\b"):
        preprocess(PreprocessConfig(**path.common | {"corpus": str(tmp_path)}, output=path.run("leak")))


def test_shards_with_the_other_features_are_refused(path: SimpleNamespace):
    with pytest.raises(ValueError, match=r"logmel.*encoder"):
        evaluate(path.evaluate_config.model_copy(update={"shards": path.run("log-mel")}))


def test_unfinished_shards_are_refused(path: SimpleNamespace):
    with pytest.raises(FileNotFoundError, match=r"jobs/preprocess\.py"):
        FeatureStore.load(path.run("refused"))


def test_stored_features_are_the_encoder_of_the_folder(path: SimpleNamespace):
    encoder = HTSATEncoder.from_pretrained(path.run("encoder")).eval()
    spectrograms, features = FeatureStore.load(path.run("log-mel")), FeatureStore.load(path.run("features"))
    assert spectrograms.rows == features.rows
    with torch.no_grad():
        encoded = encoder(torch.from_numpy(spectrograms.arrays["log_mel"]).float())
    np.testing.assert_allclose(features.arrays["frames"], encoded.frames.numpy(), atol=1e-3)
    np.testing.assert_allclose(features.arrays["latent"], encoded.latent.numpy(), atol=5e-3)


def test_training_reports_loss_and_throughput_and_checkpoints(path: SimpleNamespace):
    metrics = path.train_result
    assert metrics["step"] == metrics["total_steps"] > 4
    assert metrics["examples_per_second"] > 0
    assert np.isfinite(metrics["loss"])
    store = CheckpointStore(metrics["run"])
    assert [saved.step for saved in store.saved()][-1] == metrics["step"]
    losses = store.read_log()["loss"].to_pylist()
    assert len(losses) == metrics["step"]
    assert losses[-1] < losses[0]
    assert list((path.root / "runs/mellow/tensorboard").glob("events.out.tfevents.*"))


def test_the_trained_folder_has_a_model_card(path: SimpleNamespace):
    card = ModelCard.load(path.root / "model/README.md")
    assert re.search(rf"\| prompt.*\| {load_processor(path.run('model')).prompt_length}\b", card.text)


def test_the_trained_folder_loads_with_plain_transformers_and_keeps_its_encoder(path: SimpleNamespace):
    model = AutoModel.from_pretrained(path.run("model"))
    encoder = HTSATEncoder.from_pretrained(path.run("encoder"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.audio_encoder.state_dict()[name]), name


def test_the_report_holds_every_family_under_every_condition(path: SimpleNamespace):
    report = json.loads((path.root / "evaluation/report.json").read_text())
    assert report["records"] == 24
    families = report["benchmarks"]["families"]["groups"]["family"]
    for family in families.values():
        assert set(family["scores"]) == {"audio", "noise", "text_only", "chance"}
        for own in family["scores"].values():
            assert 0 <= round(own["low"], 9) <= round(own["value"], 9) <= round(own["high"], 9) <= 1
    rows = pq.read_table(path.root / "evaluation/predictions.parquet").to_pylist()
    assert len(rows) == 4 * 24
    asked = read_records(str(path.corpus / "test.json"))[:24]
    for condition in ("audio", "noise", "text_only"):
        assert [row["question"] for row in rows if row["condition"] == condition] == [r.input for r in asked]
    assert all(family in markdown(report) for family in families)


@pytest.mark.slow
def test_the_published_size_trains_from_a_gguf_decoder(cluster: None, smollm2_gguf: str, tmp_path: Path):
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
    # After a few small steps every weight of the decoder has moved, and is still near where the file had it.
    for name, value in load_decoder(smollm2_gguf).named_parameters():
        change = (model.language_model.get_parameter(name) - value).abs().max()
        assert 0 < change < 1e-3, name
    assert sum(parameter.numel() for parameter in model.parameters()) == 165_937_495
    assert model.language_model.generation_config.eos_token_id == 0
    assert processor.prompt_length == 129
