"""Preprocessing job: a corpus to a shard set, exactly once, even if it is killed and resubmitted.

The job plans its input (`corpus_plan`), makes the inventory of the clips (`inventory`), writes shards of features
(`clip_shards`) and of questions (`record_shards`), and describes the corpus (`statistics`). Every stage skips parts
that an earlier run has written (`mellow_platform.resumable`). The driver keeps names, ids and questions of the whole
corpus in memory, but no features.
"""

import time
from collections import Counter
from dataclasses import replace
from operator import itemgetter
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
from mellow_platform.preprocessing.inventory import Inventory, write_inventory
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.record_shards import build_processor, with_clips, write_record_shards
from mellow_platform.preprocessing.statistics import describe, draw
from mellow_platform.progress import Progress
from mellow_platform.resumable import FailureBudget, claim, digest, is_finished, read_receipts


def preprocess(config: PreprocessConfig) -> shards.Manifest:
    """Write the shard set of `config` and return its manifest; a finished set is not changed.

    Raises:
        ValueError: a clip is in two splits, too many clips failed, or `output` contains another set.
    """
    start = time.monotonic()
    plan = plan_corpus(config)
    weights = encoder_digest(load_encoder(config.encoder)) if config.encoder else ""
    config = claim_output(config, plan, weights)
    if is_finished(config.output, shards.MANIFEST):
        return shards.Manifest.read(config.output)
    encoder = (
        load_encoder_config(config.encoder)
        if config.encoder
        else encoder_config(config.size, encoder=config.encoder_name)
    )
    extractor = MellowFeatureExtractor.for_encoder(encoder, config.short_clip)
    shapes = feature_shapes(config, extractor.front_end, encoder)

    inventory = write_inventory(plan.units, config)
    records = plan.records or records_beside_audio(inventory.table, config)
    if records and not plan.records:
        inventory = clips_with_questions(inventory, records)
    if not records:
        inventory = limit_clips(inventory, config.limit)
    clips = inventory.distinct()
    if records and config.partner == "silence":
        clips.append((SILENCE_ID, ClipAddress(SILENCE, "", "")))  # in no split, because no question is about it
    rows = shard_rows(clips, config.clips_per_shard)
    receipts, rejected = clip_stage(rows, inventory, config, extractor, shapes)

    clip_ids = usable_clips(inventory, receipts)
    usable = {split: usable_questions(table, clip_ids) for split, table in records.items()}
    record_receipts = question_stage(records, usable, clip_ids, inventory, extractor, config)
    all_receipts = [*receipts, *(receipt for members in record_receipts.values() for receipt in members)]
    files = {receipt["file"]: receipt["digest"] for receipt in all_receipts} | write_quarantine(rejected, config.output)
    counts = count_clips(inventory, receipts, rejected, clip_ids) | {
        "records": {split: len(members) for split, members in usable.items()},
        "records_dropped": sum(len(records[split]) - len(usable[split]) for split in records),
    }
    statistics = describe(receipts, record_receipts, counts)
    storage.write_json(storage.join(config.output, "statistics.json"), statistics)
    storage.write_bytes(storage.join(config.output, "statistics.png"), draw(statistics))
    storage.remove_partial(config.output)
    manifest = shards.Manifest(shapes, counts, config.model_dump(), files, weights)
    manifest.write(config.output)
    print(f"{config.output} is finished after {time.monotonic() - start:.0f} s", flush=True)
    return manifest


def claim_output(config: PreprocessConfig, plan: CorpusPlan, weights: str) -> PreprocessConfig:
    """Claim the output folder for this configuration and input; return the configuration with the folder's name.

    Args:
        weights: `encoder_digest` of the encoder; empty without one.

    Raises:
        ValueError: another set has claimed the folder.
    """
    job_digest = digest({"fields": config.identity, "input": plan.digest, "encoder": weights})
    config = config.model_copy(update={"output": config.output.replace("{hash}", job_digest[:12])})
    claim(config.output, config.identity, job_digest, "shards", shards.MANIFEST)
    return config


def clip_stage(
    rows: list[dict[str, Any]],
    inventory: Inventory,
    config: PreprocessConfig,
    extractor: MellowFeatureExtractor,
    shapes: dict[str, list[int]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Write the missing shards of clips; return all receipts in order, and the quarantined clips.

    Raises:
        ValueError: more than the allowed share of clips failed; raised as soon as that is certain.
    """
    clips = inventory.table.select(["path", "split", "reason", "detail"]).to_pylist()
    rows_of_clip: dict[str, list[int]] = {}
    for row, clip_id in enumerate(inventory.column("clip_id")):
        rows_of_clip.setdefault(clip_id, []).append(row)
    rejected: list[dict[str, str]] = []
    remedy = f"See {config.output}/quarantine; repair the clips and delete {config.output}"
    budget = FailureBudget("clips", len(clips), config.max_failed_share, remedy)

    def reject(entries: list[dict[str, str]]) -> None:
        rejected.extend(entries)
        try:
            budget.add(Counter(entry["reason"] for entry in entries), entries[0]["detail"] if entries else None)
        except ValueError:
            write_quarantine(sorted(rejected, key=itemgetter("filepath")), config.output)
            raise

    def reject_clips(receipt: dict[str, Any]) -> int:
        verify(f"clips of shard {receipt['name']}", receipt["expected"], receipt["read"] + len(receipt["rejected"]))
        reject([rejection(clips[row], item) for item in receipt["rejected"] for row in rows_of_clip[item["clip_id"]]])
        return len(receipt["rejected"])

    reject([rejection(clips[row], clips[row]) for row in rows_of_clip.get("", [])])
    receipts = read_receipts(config.output, shards.CLIPS)
    done = sum(receipt["expected"] for receipt in receipts.values())
    progress = Progress("distinct clips", sum(len(row["clip_ids"]) for row in rows), done)
    for receipt in receipts.values():
        progress.rejected += reject_clips(receipt)
    missing = [row for row in rows if row["name"] not in receipts]
    for receipt in write_clip_shards(missing, config, extractor.spectrogram, shapes):
        receipts[receipt["name"]] = receipt
        progress.add(receipt["expected"], reject_clips(receipt), sum(receipt["seconds"]))
    for shard in rows:
        verify(f"clips of shard {shard['name']}", len(shard["clip_ids"]), receipts[shard["name"]]["expected"])
    return [receipts[shard["name"]] for shard in rows], sorted(rejected, key=itemgetter("filepath"))


def usable_clips(inventory: Inventory, receipts: list[dict[str, Any]]) -> dict[str, str]:
    """Return the clip id of every path whose clip is stored, and of silence if it is stored."""
    stored = {clip_id for receipt in receipts for clip_id in receipt["clip_ids"]}
    clips = zip(inventory.column("path"), inventory.column("clip_id"), strict=True)
    silence = {SILENCE: SILENCE_ID} if SILENCE_ID in stored else {}
    return {path: clip_id for path, clip_id in clips if clip_id in stored} | silence


def question_stage(
    records: dict[str, pa.Table],
    usable: dict[str, pa.Table],
    clip_ids: dict[str, str],
    inventory: Inventory,
    extractor: MellowFeatureExtractor,
    config: PreprocessConfig,
) -> dict[str, list[dict[str, Any]]]:
    """Write the missing shards of questions, and the processor; return all receipts by split."""
    if not sum(map(len, usable.values())):
        return {}
    processor = build_processor(config, extractor, records)
    save_pretrained(processor, storage.join(config.output, "processor"))
    splits = dict(zip(inventory.column("path"), inventory.column("split"), strict=True))
    receipts = {}
    for split, members in usable.items():
        split_clips = sorted({clip_id for path, clip_id in clip_ids.items() if splits.get(path) == split})
        questions = with_clips(members, clip_ids, split_clips, config)
        receipts[split] = list(write_record_shards(questions, split, processor, config))
        verify(f"questions of {split}", len(members), sum(receipt["records"] for receipt in receipts[split]))
    return receipts


def count_clips(
    inventory: Inventory, receipts: list[dict[str, Any]], rejected: list[dict[str, str]], clip_ids: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest's counts of clips.

    Raises:
        RuntimeError: stored and quarantined clips are not all clips of the inventory.
    """
    reasons = Counter(row["reason"] for row in rejected)
    recorded = [clip_id for path, clip_id in clip_ids.items() if path != SILENCE]
    verify("clips", len(inventory.table), len(recorded) + reasons.total())
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
        "splits": by_split(inventory, rejected),
    }


def rejection(clip: dict[str, str], failure: dict[str, str]) -> dict[str, str]:
    return {
        "filepath": clip["path"],
        "split": clip["split"],
        "reason": failure["reason"],
        "detail": failure["detail"],
    }


def verify(items: str, expected: int, found: int) -> None:
    """Check that no item was lost or processed twice.

    Raises:
        RuntimeError: the counts differ.
    """
    if expected != found:
        raise RuntimeError(f"{items}: expected {expected}, found {found}")


def clips_with_questions(inventory: Inventory, records: dict[str, pa.Table]) -> Inventory:
    """Return the clips of the inventory that have questions."""
    paths = {
        path for table in records.values() for name in ("filepath1", "filepath2") for path in table[name].to_pylist()
    }
    mask = pa.array([path in paths for path in inventory.column("path")], pa.bool_())
    return replace(inventory, table=inventory.table.filter(mask))


def limit_clips(inventory: Inventory, limit: int | None) -> Inventory:
    """Return the first `limit` clips of each split, for a corpus without questions."""
    if limit is None:
        return inventory
    counts: Counter[str] = Counter()
    mask = []
    for split in inventory.column("split"):
        counts[split] += 1
        mask.append(counts[split] <= limit)
    return replace(inventory, table=inventory.table.filter(pa.array(mask, pa.bool_())))


def usable_questions(records: pa.Table, clip_ids: dict[str, str]) -> pa.Table:
    """Return the questions whose clips are all stored."""
    pairs = zip(records["filepath1"].to_pylist(), records["filepath2"].to_pylist(), strict=True)
    return records.filter(
        pa.array([one in clip_ids and (not two or two in clip_ids) for one, two in pairs], pa.bool_())
    )


def write_quarantine(rejected: list[dict[str, str]], output: str) -> dict[str, str]:
    """Write the quarantined clips, if there are any; return file name and hash."""
    if not rejected:
        return {}
    name = f"{shards.QUARANTINE}/000000.parquet"
    table = pa.Table.from_pylist(rejected, schema=shards.QUARANTINE_SCHEMA)
    return {name: storage.write_table(storage.join(output, name), table)}


def by_split(inventory: Inventory, rejected: list[dict[str, str]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return counts of clips, missing clips and quarantined clips per split and task."""
    reasons = {item["filepath"]: item["reason"] for item in rejected}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, split, task in zip(*(inventory.column(name) for name in ("path", "split", "taskname")), strict=True):
        counts = found.setdefault(split, {}).setdefault(task or "clips", {"clips": 0, "missing": 0, "quarantined": 0})
        counts["clips"] += 1
        counts["missing"] += reasons.get(path) == "missing"
        counts["quarantined"] += path in reasons
    for tasks in found.values():
        for counts in tasks.values():
            counts["missing_share"] = round(counts["missing"] / counts["clips"], 4)
    return {split: dict(sorted(found[split].items())) for split in sorted(found)}
