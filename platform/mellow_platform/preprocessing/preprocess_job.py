"""The preprocessing job: a corpus to a shard set, exactly once however often it is killed and started again.

It takes stock of the clips (`stock`), makes shards of their features (`clips`) and of the questions (`questions`), and
describes the corpus (`statistics`). Every stage leaves out what an earlier run of the same configuration has done.
The driver holds names, ids and questions of the whole corpus, and features of none.
"""

import hashlib
import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data import shards
from mellow_platform.data.clip_reader import ClipAddress
from mellow_platform.data.partners import SILENCE
from mellow_platform.model import (
    MellowFeatureExtractor,
    encoder_config,
    encoder_digest,
    load_encoder,
    load_encoder_config,
)
from mellow_platform.model.folder import save_pretrained
from mellow_platform.preprocessing.clip_shards import SILENCE_ID, feature_shapes, shard_rows, write_clip_shards
from mellow_platform.preprocessing.corpus_plan import CorpusPlan, plan_corpus, records_beside_audio
from mellow_platform.preprocessing.inventory import Inventory, write_stock
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.record_shards import build_processor, with_clips, write_record_shards
from mellow_platform.preprocessing.statistics import describe, draw
from mellow_platform.progress import Progress


def preprocess(config: PreprocessConfig) -> shards.Manifest:
    """Write the shard set that `config` describes and return its manifest; a set that is finished is left as it is.

    Raises:
        ValueError: a clip stands in two splits, too many clips are unusable, or `output` holds another set.
    """
    begun = time.monotonic()
    plan = plan_corpus(config)
    weights = encoder_digest(load_encoder(config.encoder)) if config.encoder else ""
    config = claim(config, plan, weights)
    if storage.exists(storage.join(config.output, shards.MANIFEST)):
        print(f"{config.output} is finished: nothing to do", flush=True)
        return shards.Manifest.read(config.output)
    encoder = (
        load_encoder_config(config.encoder)
        if config.encoder
        else encoder_config(config.size, encoder=config.encoder_name)
    )
    extractor = MellowFeatureExtractor.for_encoder(encoder, config.short_clip)
    shapes = feature_shapes(config, extractor.front_end, encoder)

    stock = write_stock(plan.units, config)
    records = plan.records or records_beside_audio(stock.table, config)
    if records and not plan.records:
        stock = asked_about(stock, records)
    if not records:
        stock = limited(stock, config.limit)
    clips = stock.distinct()
    if records and config.partner == "silence":
        clips.append((SILENCE_ID, ClipAddress(SILENCE, "", "")))  # of no split: nothing is asked about it
    rows = shard_rows(clips, config.clips_per_shard)
    receipts, rejected = clip_stage(rows, stock, config, extractor, shapes)

    clip_ids = usable_clips(stock, receipts)
    usable = {split: with_usable_clips(table, clip_ids) for split, table in records.items()}
    asked = question_stage(records, usable, clip_ids, stock, extractor, config)
    done = [*receipts, *(receipt for members in asked.values() for receipt in members)]
    files = {receipt["file"]: receipt["digest"] for receipt in done} | write_quarantine(rejected, config.output)
    counts = count(stock, receipts, rejected, clip_ids) | {
        "records": {split: len(members) for split, members in usable.items()},
        "records_dropped": sum(len(records[split]) - len(usable[split]) for split in records),
    }
    statistics = describe(receipts, asked, counts)
    storage.write_json(storage.join(config.output, "statistics.json"), statistics)
    storage.write_bytes(storage.join(config.output, "statistics.png"), draw(statistics))
    storage.remove_partial(config.output)
    manifest = shards.Manifest(shapes, counts, config.model_dump(), files, weights)
    manifest.write(config.output)
    print(f"{config.output} is finished after {time.monotonic() - begun:.0f} s", flush=True)
    return manifest


def claim(config: PreprocessConfig, plan: CorpusPlan, weights: str) -> PreprocessConfig:
    """Take the output folder for this configuration and this input; return the configuration with its name.

    Args:
        weights: `encoder_digest` of the encoder, where there is one.

    Raises:
        ValueError: the folder is another set's.
    """
    depends_on = {"fields": config.identity, "input": plan.digest, "encoder": weights}
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    config = config.model_copy(update={"output": config.output.replace("{hash}", digest[:12])})
    shards.claim(config.output, config.identity, digest)
    return config


def clip_stage(
    rows: list[dict[str, Any]],
    stock: Inventory,
    config: PreprocessConfig,
    extractor: MellowFeatureExtractor,
    shapes: dict[str, list[int]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Make the shards of clips that are not done; return all receipts in order, and the clips that cannot be used.

    Raises:
        ValueError: more clips than the allowed share cannot be used; raised as soon as that is sure.
    """
    clips = stock.table.select(["path", "split", "reason", "detail"]).to_pylist()
    paths: dict[str, list[int]] = {}
    for row, clip_id in enumerate(stock.column("clip_id")):
        paths.setdefault(clip_id, []).append(row)
    rejected = [_quarantined(clips[row], clips[row]) for row in paths.get("", [])]

    def add(receipt: dict[str, Any]) -> int:
        expect(f"clips of shard {receipt['name']}", receipt["expected"], receipt["read"] + len(receipt["rejected"]))
        for item in receipt["rejected"]:
            rejected.extend(_quarantined(clips[row], item) for row in paths[item["clip_id"]])
        stop_if_too_many(rejected, len(clips), config)
        return len(receipt["rejected"])

    stop_if_too_many(rejected, len(clips), config)
    receipts = shards.receipts(config.output, shards.CLIPS)
    done = sum(receipt["expected"] for receipt in receipts.values())
    progress = Progress("distinct clips", sum(len(row["clip_ids"]) for row in rows), done)
    for receipt in receipts.values():
        progress.rejected += add(receipt)
    remaining = [row for row in rows if row["name"] not in receipts]
    for receipt in write_clip_shards(remaining, config, extractor.spectrogram, shapes):
        receipts[receipt["name"]] = receipt
        progress.add(receipt["expected"], add(receipt), sum(receipt["seconds"]))
    for shard in rows:
        expect(f"clips of shard {shard['name']}", len(shard["clip_ids"]), receipts[shard["name"]]["expected"])
    return [receipts[shard["name"]] for shard in rows], sorted(rejected, key=lambda item: item["filepath"])


def usable_clips(stock: Inventory, receipts: list[dict[str, Any]]) -> dict[str, str]:
    """Return the clip id of every path whose clip is stored, and of silence where that is."""
    present = {clip_id for receipt in receipts for clip_id in receipt["clip_ids"]}
    named = zip(stock.column("path"), stock.column("clip_id"), strict=True)
    silence = {SILENCE: SILENCE_ID} if SILENCE_ID in present else {}
    return {path: clip_id for path, clip_id in named if clip_id in present} | silence


def question_stage(
    records: dict[str, pa.Table],
    usable: dict[str, pa.Table],
    clip_ids: dict[str, str],
    stock: Inventory,
    extractor: MellowFeatureExtractor,
    config: PreprocessConfig,
) -> dict[str, list[dict[str, Any]]]:
    """Make the shards of questions that are not done, and the processor; return all receipts by split."""
    if not sum(map(len, usable.values())):
        return {}
    processor = build_processor(config, extractor, records)
    save_pretrained(processor, storage.join(config.output, "processor"))
    splits = dict(zip(stock.column("path"), stock.column("split"), strict=True))
    asked = {}
    for split, members in usable.items():
        own = sorted({clip_id for path, clip_id in clip_ids.items() if splits.get(path) == split})
        questions = with_clips(members, clip_ids, own, config)
        asked[split] = list(write_record_shards(questions, split, processor, config))
        expect(f"questions of {split}", len(members), sum(receipt["records"] for receipt in asked[split]))
    return asked


def count(
    stock: Inventory, receipts: list[dict[str, Any]], rejected: list[dict[str, str]], clip_ids: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest's counts of clips.

    Raises:
        RuntimeError: clips that are stored and clips that are quarantined are not all there are.
    """
    reasons = Counter(row["reason"] for row in rejected)
    recorded = [clip_id for path, clip_id in clip_ids.items() if path != SILENCE]
    expect("clips", len(stock.table), len(recorded) + reasons.total())
    seconds = {
        clip_id: value
        for receipt in receipts
        for clip_id, value in zip(receipt["clip_ids"], receipt["seconds"], strict=True)
    }
    return {
        "clips": len(recorded),
        "distinct_clips": len(set(recorded)),
        "audio_seconds": round(sum(seconds[clip_id] for clip_id in sorted(set(recorded))), 3),
        "quarantined": reasons.total(),
        "quarantined_by_reason": dict(sorted(reasons.items())),
        "splits": by_split(stock, rejected),
    }


def _quarantined(clip: dict[str, str], because: dict[str, str]) -> dict[str, str]:
    return {
        "filepath": clip["path"],
        "split": clip["split"],
        "reason": because["reason"],
        "detail": because["detail"],
    }


def stop_if_too_many(rejected: list[dict[str, str]], clips: int, config: PreprocessConfig) -> None:
    if len(rejected) <= config.max_failed_share * clips:
        return
    reasons = Counter(item["reason"] for item in rejected)
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    write_quarantine(sorted(rejected, key=lambda item: item["filepath"]), config.output)
    raise ValueError(
        f"{len(rejected)} of {clips} clips are unusable ({counts}) so far, see {config.output}/quarantine: "
        f"mend them and delete {config.output}, or raise max_failed_share (now {config.max_failed_share:g})"
    )


def expect(what: str, expected: int, found: int) -> None:
    """Make sure that nothing was lost or done twice.

    Raises:
        RuntimeError: numbers do not add up.
    """
    if expected != found:
        raise RuntimeError(f"{what}: {expected} are expected, and {found} are accounted for")


def asked_about(stock: Inventory, records: dict[str, pa.Table]) -> Inventory:
    """Return the clips that questions are asked about, of those that came with questions beside them."""
    named = {
        path for table in records.values() for name in ("filepath1", "filepath2") for path in table[name].to_pylist()
    }
    return replace(
        stock, table=stock.table.filter(pa.array([path in named for path in stock.column("path")], pa.bool_()))
    )


def limited(stock: Inventory, limit: int | None) -> Inventory:
    """Return the first `limit` clips of each split, of clips that no questions are asked about."""
    if limit is None:
        return stock
    seen: Counter[str] = Counter()
    kept = []
    for split in stock.column("split"):
        seen[split] += 1
        kept.append(seen[split] <= limit)
    return replace(stock, table=stock.table.filter(pa.array(kept, pa.bool_())))


def with_usable_clips(records: pa.Table, clip_ids: dict[str, str]) -> pa.Table:
    """Return the questions whose clips are all there."""
    pairs = zip(records["filepath1"].to_pylist(), records["filepath2"].to_pylist(), strict=True)
    return records.filter(
        pa.array([one in clip_ids and (not two or two in clip_ids) for one, two in pairs], pa.bool_())
    )


def write_quarantine(rejected: list[dict[str, str]], output: str) -> dict[str, str]:
    """Write the clips that cannot be used, if there are any; return file name and hash."""
    if not rejected:
        return {}
    name = f"{shards.QUARANTINE}/000000.parquet"
    table = pa.Table.from_pylist(rejected, schema=shards.QUARANTINE_SCHEMA)
    return {name: storage.write_table(storage.join(output, name), table)}


def by_split(stock: Inventory, rejected: list[dict[str, str]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return clips, missing ones and quarantined ones of each split and task: clips vanish from the web over time."""
    reasons = {item["filepath"]: item["reason"] for item in rejected}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, split, task in zip(stock.column("path"), stock.column("split"), stock.column("taskname"), strict=True):
        counts = found.setdefault(split, {}).setdefault(task or "clips", {"clips": 0, "missing": 0, "quarantined": 0})
        counts["clips"] += 1
        counts["missing"] += reasons.get(path) == "missing"
        counts["quarantined"] += path in reasons
    for tasks in found.values():
        for counts in tasks.values():
            counts["missing_share"] = round(counts["missing"] / counts["clips"], 4)
    return {split: dict(sorted(found[split].items())) for split in sorted(found)}
