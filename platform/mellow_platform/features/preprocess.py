"""Audio and records to shards on Ray Data: decode, resample, fix the length, log-mel, tokenise, and encode once.

A shard is a fixed range of the sorted clips (or of the records in their order), and one row of the Ray dataset: it is
decoded, encoded and written as a whole, so the same input gives the same files with the same bytes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from mellow_platform import storage
from mellow_platform.config import PreprocessConfig
from mellow_platform.data import records as record_format
from mellow_platform.data import shards
from mellow_platform.data.audio import AudioError, decode
from mellow_platform.data.labels import ClipLabels, read_labels
from mellow_platform.data.partners import SILENCE, draw_partner, second_clip
from mellow_platform.data.records import Record
from mellow_platform.model import (
    MellowFeatureExtractor,
    MellowProcessor,
    encoder_config,
    holds_model,
    load_encoder,
    load_encoder_config,
)
from mellow_platform.model.decoder import load_tokenizer
from mellow_platform.model.encoders import AudioEncoderConfig
from mellow_platform.model.folder import load_processor, save_pretrained
from mellow_platform.model.tokenizer import train_tokenizer

# Prompt and answer lengths in tokens, as published; a tokenizer of the corpus's own is measured on the corpus.
PUBLISHED_LENGTHS = (129, 250)
ENCODER_BATCH = 16


def preprocess(config: PreprocessConfig) -> shards.Manifest:
    """Write the shard set that `config` describes and return its manifest.

    Raises:
        ValueError: a clip stands in two splits, too many clips are unusable, or `output` holds another set.
    """
    configuration = config.model_dump()
    shards.Manifest.refuse_other(config.output, configuration)
    corpus = config.corpus
    records = (
        {split: record_format.read_records(storage.join(corpus, f"{split}.json")) for split in config.splits}
        if corpus
        else {}
    )
    splits = clip_splits(records, read_labels(config.labels) if config.labels else [])
    if config.encoder:
        encoder = load_encoder_config(config.encoder)
    else:
        encoder = encoder_config(config.size, encoder=config.encoder_name)
    extractor = MellowFeatureExtractor.for_encoder(encoder, config.short_clip)
    clips = sorted(splits.items())
    if records and config.partner == "silence":
        clips.append((SILENCE, ""))  # of no split: nothing is asked about it
    written, features = write_clip_shards(clips, extractor, encoder, config)

    files = {name: digest for row in written for name, digest in zip(row["files"], row["digests"], strict=True)}
    clip_ids = {
        path: clip_id for row in written for path, clip_id in zip(row["filepaths"], row["clip_ids"], strict=True)
    }
    recorded = {path: clip_id for path, clip_id in clip_ids.items() if path != SILENCE}
    usable = {
        split: [record for record in members if all(path in clip_ids for path in record.filepaths)]
        for split, members in records.items()
    }
    if records:
        processor = build_processor(config, extractor, records)
        save_pretrained(processor, storage.join(config.output, "processor"))
        for split, members in usable.items():
            own = sorted({clip_id for path, clip_id in recorded.items() if splits[path] == split})
            files |= write_record_shards(members, split, clip_ids, own, processor, config)
    reasons = Counter(reason for row in written for reason in row["reasons"])
    manifest = shards.Manifest(
        features=features,
        counts={
            "clips": len(recorded),
            "distinct_clips": len(set(recorded.values())),
            "audio_seconds": round(sum(row["seconds"] for row in written), 3),
            "quarantined": reasons.total(),
            "quarantined_by_reason": dict(sorted(reasons.items())),
            "records": {split: len(members) for split, members in usable.items()},
            "records_dropped": sum(len(records[split]) - len(usable[split]) for split in records),
        },
        configuration=configuration,
        files=files,
    )
    manifest.write(config.output)
    return manifest


def write_clip_shards(
    clips: list[tuple[str, str]],
    extractor: MellowFeatureExtractor,
    encoder: AudioEncoderConfig,
    config: PreprocessConfig,
) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """Decode, encode and write clips, given as (path, split); return what was written and the features' shapes.

    Raises:
        ValueError: too many clips are unusable.
    """
    rows = [
        {"shard": number, "filepaths": [path for path, _ in part], "splits": [split for _, split in part]}
        for number, part in enumerate(_ranges(clips, config.clips_per_shard))
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        decode_shard,
        fn_kwargs={
            "audio_root": config.audio_root or storage.join(config.corpus or "", "audio"),
            "extractor": extractor,
            "max_seconds": config.max_seconds,
        },
    )
    features = {"log_mel": [extractor.num_frames, extractor.feature_size]}
    if config.encoder:
        dataset = dataset.map(
            EncodeShard,
            fn_constructor_args=(config.encoder,),
            concurrency=config.encoder_workers,
            num_gpus=config.gpus_per_worker or None,
        )
        features = {"frames": [encoder.num_frames, encoder.frame_size], "latent": [encoder.hidden_size]}
    written = dataset.map(write_clip_shard, fn_kwargs={"output": config.output, "features": features}).take_all()
    reasons = Counter(reason for row in written for reason in row["reasons"])
    recorded = sum(path != SILENCE for path, _ in clips)
    if reasons.total() > config.max_failed_share * recorded:
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise ValueError(
            f"{reasons.total()} of {recorded} clips are unusable ({counts}): see {config.output}/quarantine, "
            f"or raise max_failed_share (now {config.max_failed_share:g})"
        )
    return written, features


def clip_splits(records: dict[str, list[Record]], labelled: list[ClipLabels]) -> dict[str, str]:
    """Return the split of every clip: its records', or train where it only has labels.

    Raises:
        ValueError: a clip stands in two, so the test split would have been trained on.
    """
    splits: dict[str, str] = {}
    for split, members in records.items():
        for record in members:
            for path in record.filepaths:
                if splits.setdefault(path, split) != split:
                    raise ValueError(f"clip {path} stands in both {splits[path]} and {split}: keep it in one")
    for clip in labelled:
        splits.setdefault(clip.file, "train")
    return splits


def build_processor(
    config: PreprocessConfig, extractor: MellowFeatureExtractor, records: dict[str, list[Record]]
) -> MellowProcessor:
    """Return front end and tokenizer: the decoder's, that of the Mellow in `encoder`, or one trained on the questions.

    Raises:
        ValueError: the size has no tokenizer of its own and none is given.
    """
    training = records.get("train") or [record for members in records.values() for record in members]
    lengths, model = PUBLISHED_LENGTHS, None
    if config.decoder:
        tokenizer = load_tokenizer(config.decoder)
    elif config.encoder and holds_model(config.encoder):
        model = load_processor(config.encoder)
        tokenizer, lengths = model.tokenizer, (model.prompt_length, model.answer_length)
    elif config.size == "mellow-tiny":
        texts = [text for record in training for text in (record.input, record.answer)]
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        raise ValueError(f"{config.size} has no tokenizer of its own: set `decoder` to a hub name, folder or GGUF file")
    processor = MellowProcessor(
        extractor,
        tokenizer,
        *lengths,
        prompt_end_marker=config.prompt_end_marker,
        partner=config.partner,
    )
    if config.decoder or model:
        return processor
    prompts, answers = {record.input for record in training}, {record.answer for record in training}
    # Every padded position of a prompt is seen and paid for, so prompts are as long as the corpus needs.
    processor.prompt_length = min(PUBLISHED_LENGTHS[0], max(len(processor.token_ids(text)) for text in prompts) + 4)
    processor.answer_length = min(PUBLISHED_LENGTHS[1], max(len(processor.token_ids(text)) for text in answers) + 4)
    return processor


def decode_shard(
    row: dict[str, Any], audio_root: str, extractor: MellowFeatureExtractor, max_seconds: float
) -> dict[str, Any]:
    """Decode the clips of a shard row; add `log_mel` [usable, frames, bands] and what is known of every clip."""
    torch.set_num_threads(1)
    out: dict[str, Any] = {
        "shard": row["shard"],
        "filepaths": [],
        "splits": [],
        "clip_ids": [],
        "clip_seconds": [],
    }
    rejected: list[dict[str, str]] = []
    spectrograms = []
    for path, split in zip(row["filepaths"], row["splits"], strict=True):
        try:
            if path == SILENCE:
                data, waveform = SILENCE.encode(), np.zeros(extractor.clip_samples, np.float32)
            else:
                data = _read_clip(storage.join(audio_root, path))
                waveform = decode(data, extractor.sampling_rate, max_seconds)
        except AudioError as error:
            rejected.append({"filepath": path, "split": split, "reason": error.reason, "detail": str(error)})
            continue
        out["filepaths"].append(path)
        out["splits"].append(split)
        out["clip_ids"].append(hashlib.sha256(data).hexdigest())
        out["clip_seconds"].append(len(waveform) / extractor.sampling_rate)
        spectrograms.append(extractor(waveform)["input_features"][0].numpy().astype(np.float16))
    empty = np.empty((0, extractor.num_frames, extractor.feature_size), np.float16)
    out["log_mel"] = np.stack(spectrograms) if spectrograms else empty
    out["rejected"] = pa.Table.from_pylist(rejected, schema=shards.QUARANTINE_SCHEMA).to_pylist()
    return out


def _read_clip(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise AudioError("missing", f"{uri} does not exist") from error


class EncodeShard:
    """Ray Data actor that replaces a shard row's `log_mel` by what the frozen encoder makes of it."""

    def __init__(self, encoder: str):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(1)
        self.encoder = load_encoder(encoder).eval().to(self.device)

    @torch.no_grad()
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        frames, latents = [], []
        for batch in torch.from_numpy(row.pop("log_mel")).split(ENCODER_BATCH):
            encoded = self.encoder(batch.to(self.device).float())
            frames.append(encoded.frames.half().cpu().numpy())
            latents.append(encoded.latent.half().cpu().numpy())
        config = self.encoder.config
        row["frames"] = np.concatenate([np.empty((0, config.num_frames, config.frame_size), np.float16), *frames])
        row["latent"] = np.concatenate([np.empty((0, config.hidden_size), np.float16), *latents])
        return row


def write_clip_shard(row: dict[str, Any], output: str, features: dict[str, list[int]]) -> dict[str, Any]:
    """Write one shard of clips, and of quarantined ones where there are any; return names, hashes and counts."""
    columns = {
        "clip_id": row["clip_ids"],
        "filepath": row["filepaths"],
        "split": row["splits"],
        "seconds": row["clip_seconds"],
    }
    for name in features:
        columns[name] = [np.ascontiguousarray(array).tobytes() for array in row[name]]
    tables = {"clips": pa.table(columns, schema=shards.clip_schema(features))}
    rejected = list(row["rejected"])
    if rejected:
        tables["quarantine"] = pa.Table.from_pylist(rejected, schema=shards.QUARANTINE_SCHEMA)
    names = {kind: f"{kind}/{row['shard']:06d}.parquet" for kind in tables}
    return {
        "filepaths": list(row["filepaths"]),
        "clip_ids": list(row["clip_ids"]),
        "seconds": float(
            sum(seconds for path, seconds in zip(row["filepaths"], row["clip_seconds"], strict=True) if path != SILENCE)
        ),
        "reasons": [item["reason"] for item in rejected],
        "files": list(names.values()),
        "digests": [storage.write_table(storage.join(output, names[kind]), table) for kind, table in tables.items()],
    }


def write_record_shards(
    records: list[Record],
    split: str,
    clip_ids: dict[str, str],
    partners: list[str],
    processor: MellowProcessor,
    config: PreprocessConfig,
) -> dict[str, str]:
    """Tokenise and write the records of a split on Ray Data; return file names and hashes.

    Args:
        clip_ids: of every clip by its path, and of silence where the partner rule asks for it.
        partners: the split's clip ids, sorted, that a random partner is drawn from.
    """
    table = record_format.to_table(records)
    table = table.append_column("clip1", pa.array([clip_ids[record.filepath1] for record in records], pa.string()))
    second = [
        second_clip(
            [clip_ids[path] for path in record.filepaths],
            config.partner,
            silence=clip_ids.get(SILENCE, ""),
            drawn=draw_partner(clip_ids[record.filepath1], position, partners),
        )
        for position, record in enumerate(records)
    ]
    table = table.append_column("clip2", pa.array(second, pa.string()))
    source = ray.put(table)
    size = config.records_per_shard
    starts = range(0, max(len(records), 1), size)

    def write(row: dict[str, Any]) -> dict[str, str]:
        part = ray.get(source).slice(row["start"], size)
        asked = [processor.question_ids(text)[: processor.prompt_length] for text in part["input"].to_pylist()]
        prompts = pa.array(asked, pa.list_(pa.int32()))
        answers = pa.array([processor.answer_ids(text) for text in part["answer"].to_pylist()], pa.list_(pa.int32()))
        part = part.append_column("prompt_ids", prompts).append_column("answer_ids", answers)
        name = f"records/{split}/{row['start'] // size:06d}.parquet"
        digest = storage.write_table(storage.join(config.output, name), part.cast(shards.RECORD_SCHEMA))
        return {"file": name, "digest": digest}

    rows = ray.data.from_items([{"start": start} for start in starts], override_num_blocks=len(starts))
    return {row["file"]: row["digest"] for row in rows.map(write).take_all()}


def _ranges(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
