"""The preprocessing job: from a corpus to a shard set, exactly once however often it is killed and submitted again.

It plans what to read (`corpus_plan`), makes the inventory of the clips (`inventory`), writes shards of their features
(`clip_shards`) and of the questions (`record_shards`), and describes the corpus (`statistics`). Every stage skips parts
that an earlier run has written (`mellow_platform.resumable`). The driver holds names, ids and questions of the whole
corpus, and no features.
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
    """Write the shard set that `config` describes and return its manifest; a set that is finished is left as it is.

    Raises:
        ValueError: a clip stands in two splits, too many clips are unusable, or `output` holds another set.
    """
    begun = time.monotonic()
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
        inventory = asked_about(inventory, records)
    if not records:
        inventory = limited(inventory, config.limit)
    clips = inventory.distinct()
    if records and config.partner == "silence":
        clips.append((SILENCE_ID, ClipAddress(SILENCE, "", "")))  # of no split: nothing is asked about it
    rows = shard_rows(clips, config.clips_per_shard)
    receipts, rejected = clip_stage(rows, inventory, config, extractor, shapes)

    clip_ids = usable_clips(inventory, receipts)
    usable = {split: with_usable_clips(table, clip_ids) for split, table in records.items()}
    asked = question_stage(records, usable, clip_ids, inventory, extractor, config)
    done = [*receipts, *(receipt for members in asked.values() for receipt in members)]
    files = {receipt["file"]: receipt["digest"] for receipt in done} | write_quarantine(rejected, config.output)
    counts = count(inventory, receipts, rejected, clip_ids) | {
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


def claim_output(config: PreprocessConfig, plan: CorpusPlan, weights: str) -> PreprocessConfig:
    """Take the output folder for this configuration and this input; return the configuration with its name.

    Args:
        weights: `encoder_digest` of the encoder, where there is one.

    Raises:
        ValueError: the folder is another set's.
    """
    depends_on = {"fields": config.identity, "input": plan.digest, "encoder": weights}
    config = config.model_copy(update={"output": config.output.replace("{hash}", digest(depends_on)[:12])})
    claim(config.output, config.identity, digest(depends_on), "shards", shards.MANIFEST)
    return config


def clip_stage(
    rows: list[dict[str, Any]],
    inventory: Inventory,
    config: PreprocessConfig,
    extractor: MellowFeatureExtractor,
    shapes: dict[str, list[int]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Make the shards of clips that are not done; return all receipts in order, and the clips that cannot be used.

    Raises:
        ValueError: more clips than the allowed share cannot be used; raised as soon as that is sure.
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

    def add(receipt: dict[str, Any]) -> int:
        expect(f"clips of shard {receipt['name']}", receipt["expected"], receipt["read"] + len(receipt["rejected"]))
        reject([quarantined(clips[row], item) for item in receipt["rejected"] for row in rows_of_clip[item["clip_id"]]])
        return len(receipt["rejected"])

    reject([quarantined(clips[row], clips[row]) for row in rows_of_clip.get("", [])])
    receipts = read_receipts(config.output, shards.CLIPS)
    done = sum(receipt["expected"] for receipt in receipts.values())
    progress = Progress("distinct clips", sum(len(row["clip_ids"]) for row in rows), done)
    for receipt in receipts.values():
        progress.rejected += add(receipt)
    missing = [row for row in rows if row["name"] not in receipts]
    for receipt in write_clip_shards(missing, config, extractor.spectrogram, shapes):
        receipts[receipt["name"]] = receipt
        progress.add(receipt["expected"], add(receipt), sum(receipt["seconds"]))
    for shard in rows:
        expect(f"clips of shard {shard['name']}", len(shard["clip_ids"]), receipts[shard["name"]]["expected"])
    return [receipts[shard["name"]] for shard in rows], sorted(rejected, key=itemgetter("filepath"))


def usable_clips(inventory: Inventory, receipts: list[dict[str, Any]]) -> dict[str, str]:
    """Return the clip id of every path whose clip is stored, and of silence where that is."""
    present = {clip_id for receipt in receipts for clip_id in receipt["clip_ids"]}
    named = zip(inventory.column("path"), inventory.column("clip_id"), strict=True)
    silence = {SILENCE: SILENCE_ID} if SILENCE_ID in present else {}
    return {path: clip_id for path, clip_id in named if clip_id in present} | silence


def question_stage(
    records: dict[str, pa.Table],
    usable: dict[str, pa.Table],
    clip_ids: dict[str, str],
    inventory: Inventory,
    extractor: MellowFeatureExtractor,
    config: PreprocessConfig,
) -> dict[str, list[dict[str, Any]]]:
    """Make the shards of questions that are not done, and the processor; return all receipts by split."""
    if not sum(map(len, usable.values())):
        return {}
    processor = build_processor(config, extractor, records)
    save_pretrained(processor, storage.join(config.output, "processor"))
    splits = dict(zip(inventory.column("path"), inventory.column("split"), strict=True))
    asked = {}
    for split, members in usable.items():
        own = sorted({clip_id for path, clip_id in clip_ids.items() if splits.get(path) == split})
        questions = with_clips(members, clip_ids, own, config)
        asked[split] = list(write_record_shards(questions, split, processor, config))
        expect(f"questions of {split}", len(members), sum(receipt["records"] for receipt in asked[split]))
    return asked


def count(
    inventory: Inventory, receipts: list[dict[str, Any]], rejected: list[dict[str, str]], clip_ids: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest's counts of clips.

    Raises:
        RuntimeError: clips that are stored and clips that are quarantined are not all there are.
    """
    reasons = Counter(row["reason"] for row in rejected)
    recorded = [clip_id for path, clip_id in clip_ids.items() if path != SILENCE]
    expect("clips", len(inventory.table), len(recorded) + reasons.total())
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


def quarantined(clip: dict[str, str], because: dict[str, str]) -> dict[str, str]:
    return {
        "filepath": clip["path"],
        "split": clip["split"],
        "reason": because["reason"],
        "detail": because["detail"],
    }


def expect(what: str, expected: int, found: int) -> None:
    """Make sure that nothing was lost or done twice.

    Raises:
        RuntimeError: numbers do not add up.
    """
    if expected != found:
        raise RuntimeError(f"{what}: {expected} are expected, and {found} are accounted for")


def asked_about(inventory: Inventory, records: dict[str, pa.Table]) -> Inventory:
    """Return the clips that questions are asked about, of those that came with questions beside them."""
    named = {
        path for table in records.values() for name in ("filepath1", "filepath2") for path in table[name].to_pylist()
    }
    kept = pa.array([path in named for path in inventory.column("path")], pa.bool_())
    return replace(inventory, table=inventory.table.filter(kept))


def limited(inventory: Inventory, limit: int | None) -> Inventory:
    """Return the first `limit` clips of each split, of clips that no questions are asked about."""
    if limit is None:
        return inventory
    seen: Counter[str] = Counter()
    kept = []
    for split in inventory.column("split"):
        seen[split] += 1
        kept.append(seen[split] <= limit)
    return replace(inventory, table=inventory.table.filter(pa.array(kept, pa.bool_())))


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


def by_split(inventory: Inventory, rejected: list[dict[str, str]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return clips, missing ones and quarantined ones of each split and task: clips vanish from the web over time."""
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
