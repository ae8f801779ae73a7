"""Mixture of the corpus: existing and synthetic pairs, with statistics for the report."""

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mellow_platform import storage
from mellow_platform.data.caption_tables import Caption
from mellow_platform.data.records import SPLITS, Record, from_row, read_records
from mellow_platform.option_values import SYNTHETIC_SUBTYPES
from mellow_platform.synthesis.candidates import CAPTION_QUESTION, Candidate, assign_letters, record, subtype
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig


@dataclass(frozen=True, slots=True)
class Pair:
    """A record of the corpus; `kind`, `aspect` and `request` are those of a synthetic pair, or empty."""

    record: Record
    kind: str = ""
    aspect: str = ""
    request: str = ""

    @property
    def type(self) -> str:
        """Type of the question, in ReasonAQA's terms."""
        if self.record.is_multiple_choice:
            return "multiple choice"
        if self.record.choices:
            return "binary"
        return "captioning" if self.record.input == CAPTION_QUESTION else "description"


def existing_pairs(captions: list[Caption], config: SynthesizeConfig) -> dict[str, list[Pair]]:
    """Return the existing pairs by split: captioning questions for the captions, and the records of `existing`.

    Synthetic records of `existing` are excluded: ReasonAQA's by subtype, those of this job by the column `kind` in
    `records/`. Tags have no captioning question.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a clip is in two splits; the message names the clip and both.
    """
    splits = {caption.clip: caption.split for caption in captions}
    found: dict[str, dict[Record, None]] = {split: {} for split in SPLITS}
    for caption in captions:
        if not caption.labels:
            name, text = subtype(caption.taskname, "caption"), caption.text.lower()
            fields = (caption.taskname, caption.clip, "", caption.text, "", CAPTION_QUESTION, text, name)
            found[caption.split][Record(*fields)] = None
    for split in SPLITS if config.existing else ():
        for existing, kind in _read_existing(config.existing or "", split):
            for clip in existing.filepaths:
                if splits.setdefault(clip, split) != split:
                    raise ValueError(f"{config.existing}: clip {clip} is in split {split}, and also in {splits[clip]}")
            if not kind and existing.family not in SYNTHETIC_SUBTYPES:
                found[split][existing] = None
    return {split: [Pair(record) for record in records] for split, records in found.items()}


def _read_existing(folder: str, split: str) -> list[tuple[Record, str]]:
    """Return the records of a split, each with the kind of a synthetic pair, or an empty one."""
    table = storage.join(folder, f"records/{split}.parquet")
    if storage.exists(table):
        return [(from_row(row), row["kind"]) for row in storage.read_tables([table]).to_pylist()]
    return [(existing, "") for existing in read_records(storage.join(folder, f"{split}.json"))]


def check_share(existing: dict[str, list[Pair]], requested: int, config: SynthesizeConfig) -> None:
    """Check `synthetic_share` before any paid request; print a message if requested pairs will be unused.

    Args:
        requested: number of requested pairs of the train split.

    Raises:
        ValueError: the share requires existing pairs, and `existing` has none.
    """
    share, count = config.synthetic_share, len(existing["train"])
    if share is None or share == 1 or not requested:
        return
    if not count:
        raise ValueError(_unreachable(share, "no existing pairs"))
    if requested > (used := round(count * share / (1 - share))):
        print(
            f"{requested} pairs are requested for train; synthetic_share {share:g} uses at most {used} with {count} "
            "existing pairs. Set `existing` to a folder with more records, or request fewer `questions` or `kinds`",
            flush=True,
        )


def _unreachable(share: float, cause: str) -> str:
    return (
        f"synthetic_share {share:g} of the train split cannot be reached: {cause}. Set `existing` to a folder with "
        "records to mix in, or omit synthetic_share to use all pairs"
    )


def mix(existing: dict[str, list[Pair]], accepted: list[Candidate], config: SynthesizeConfig) -> dict[str, list[Pair]]:
    """Return the pairs of each split, existing ones first; the train split has the share `synthetic_share`.

    Raises:
        ValueError: the share cannot be reached.
    """
    mixed = {}
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([config.seed, number])
        synthetic = [candidate for candidate in accepted if candidate["split"] == split]
        others, share = existing[split], config.synthetic_share
        has_pairs = bool(others or synthetic)
        if split == "train" and share is not None:
            if share < 1:
                synthetic = _sample(synthetic, round(len(others) * share / (1 - share)), rng)
            if share > 0:
                others = _sample(others, round(len(synthetic) * (1 - share) / share), rng)
            if has_pairs and ((share < 1 and not others) or (share > 0 and not synthetic)):
                raise ValueError(_unreachable(share, "too few synthetic pairs" if others else "too few existing pairs"))
        synthetic = assign_letters(synthetic, rng)
        mixed[split] = others + [Pair(record(c), c["kind"], c["aspect"], c["request"]) for c in synthetic]
    return mixed


def _sample(items: list, count: int, rng: np.random.Generator) -> list:
    """Return `count` random items in their order, or all if there are fewer."""
    if count >= len(items):
        return items
    return [items[index] for index in sorted(rng.permutation(len(items))[:count])]


def describe(mixed: dict[str, list[Pair]]) -> dict[str, Any]:
    """Return counts of pairs by source, type, aspect and split, lengths in words, and counts of correct letters."""
    by: dict[str, dict[str, Counter[str]]] = {"source": {}, "type": {}, "aspect": {}}
    lengths: dict[str, dict[str, list[int]]] = {}
    letters: dict[str, dict[str, Counter[str]]] = {}
    for split, pairs in mixed.items():
        for pair in pairs:
            for name, value in (("source", pair.record.family), ("type", pair.type), ("aspect", pair.aspect)):
                if value:
                    by[name].setdefault(value, Counter())[split] += 1
            found = lengths.setdefault(pair.type, {"question": [], "answer": []})
            found["question"].append(len(pair.record.input.split()))
            found["answer"].append(len(pair.record.answer.split()))
            if pair.kind == "mcq":
                choices = letters.setdefault(f"{len(pair.record.choices)} choices", {})
                choices.setdefault(split, Counter())[pair.record.answer[0]] += 1
    return {
        "splits": {split: _shares(pairs) for split, pairs in mixed.items()},
        **{
            f"by_{name}": {value: dict(counts) for value, counts in sorted(found.items())} for name, found in by.items()
        },
        "words": {
            kind: {part: _lengths(counts) for part, counts in parts.items()} for kind, parts in sorted(lengths.items())
        },
        "letters": {
            count: {split: dict(sorted(counter.items())) for split, counter in splits.items()}
            for count, splits in sorted(letters.items())
        },
    }


def _shares(pairs: list[Pair]) -> dict[str, Any]:
    synthetic = sum(bool(pair.kind) for pair in pairs)
    share = round(synthetic / len(pairs), 4) if pairs else None
    clips = {clip for pair in pairs for clip in pair.record.filepaths}
    return {
        "pairs": len(pairs),
        "existing": len(pairs) - synthetic,
        "synthetic": synthetic,
        "synthetic_share": share,
        "clips": len(clips),
    }


def _lengths(counts: list[int]) -> dict[str, float]:
    return {
        "mean": round(statistics.fmean(counts), 1),
        "median": float(statistics.median(counts)),
        "max": max(counts),
    }
