"""The corpus that comes out: how much is synthetic, and what it is made of."""

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mellow_platform import storage
from mellow_platform.data.caption_tables import Caption
from mellow_platform.data.records import SPLITS, Record, from_row, read_records
from mellow_platform.option_values import SYNTHETIC_SUBTYPES
from mellow_platform.synthesis.candidates import CAPTION_QUESTION, Candidate, deal_letters, record, subtype
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig


@dataclass(frozen=True, slots=True)
class Pair:
    """A record of the corpus; `kind`, `aspect` and `request` say how it was written, and are empty where it was not."""

    record: Record
    kind: str = ""
    aspect: str = ""
    request: str = ""

    @property
    def type(self) -> str:
        """What is asked for, by ReasonAQA's names."""
        if self.record.is_multiple_choice:
            return "multiple choice"
        if self.record.choices:
            return "binary"
        return "captioning" if self.record.input == CAPTION_QUESTION else "description"


def existing_pairs(captions: list[Caption], config: SynthesizeConfig) -> dict[str, list[Pair]]:
    """Return what nobody has to write, by split: captioning with the captions, and the records of `existing`.

    Of the latter, questions that a language model wrote are left out: ReasonAQA's by their names, those of this job by
    what stands beside them in the folder. Tags are no captions.

    Raises:
        FileNotFoundError: a file of the folder is absent.
        ValueError: a clip is in one split there, and in another here.
    """
    splits = {caption.clip: caption.split for caption in captions}
    found: dict[str, dict[Record, None]] = {split: {} for split in SPLITS}
    for caption in captions:
        if not caption.labels:
            name, text = subtype(caption.taskname, "caption"), caption.text.lower()
            fields = (caption.taskname, caption.clip, "", caption.text, "", CAPTION_QUESTION, text, name)
            found[caption.split][Record(*fields)] = None
    for split in SPLITS if config.existing else ():
        for known, kind in _read_existing(config.existing or "", split):
            for clip in known.filepaths:
                if splits.setdefault(clip, split) != split:
                    raise ValueError(f"{config.existing}: clip {clip} is in {split}, and in {splits[clip]} too")
            if not kind and known.family not in SYNTHETIC_SUBTYPES:
                found[split][known] = None
    return {split: [Pair(record) for record in records] for split, records in found.items()}


def _read_existing(folder: str, split: str) -> list[tuple[Record, str]]:
    """Return the records of a split with how each was written, which the folder says if a synthesis made it."""
    marked = storage.join(folder, f"records/{split}.parquet")
    if storage.exists(marked):
        return [(from_row(row), row["kind"]) for row in storage.read_tables([marked]).to_pylist()]
    return [(known, "") for known in read_records(storage.join(folder, f"{split}.json"))]


def check_share(existing: dict[str, list[Pair]], requested: int, config: SynthesizeConfig) -> None:
    """See to the share of the train split before anything is paid for; say so if much of it will be left out.

    Args:
        requested: pairs of the train split that are to be written.

    Raises:
        ValueError: no existing pairs are there for a share that needs some.
    """
    share, kept = config.synthetic_share, len(existing["train"])
    if share is None or share == 1 or not requested:
        return
    if not kept:
        raise ValueError(_unreachable(share, "no existing pairs"))
    if requested > (used := round(kept * share / (1 - share))):
        print(
            f"{requested} pairs are asked for in train, of which synthetic_share {share:g} can use {used} with {kept} "
            "existing ones: name `existing`, a folder with more, or ask for fewer `questions` or `kinds`",
            flush=True,
        )


def _unreachable(share: float, lacking: str) -> str:
    return (
        f"synthetic_share {share:g} of the train split cannot be reached, since there are {lacking} for it: name "
        "`existing`, a folder with records to mix in, or leave synthetic_share out to keep all pairs"
    )


def mix(existing: dict[str, list[Pair]], accepted: list[Candidate], config: SynthesizeConfig) -> dict[str, list[Pair]]:
    """Return the pairs of each split, existing ones first; the train split has the share of synthetic ones wanted.

    Raises:
        ValueError: that share cannot be reached.
    """
    mixed = {}
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([config.seed, number])
        synthetic = [candidate for candidate in accepted if candidate["split"] == split]
        kept, share = existing[split], config.synthetic_share
        present = bool(kept or synthetic)
        if split == "train" and share is not None:
            if share < 1:
                synthetic = _draw(synthetic, round(len(kept) * share / (1 - share)), rng)
            if share > 0:
                kept = _draw(kept, round(len(synthetic) * (1 - share) / share), rng)
            if present and ((share < 1 and not kept) or (share > 0 and not synthetic)):
                raise ValueError(_unreachable(share, "too few synthetic pairs" if kept else "too few existing pairs"))
        dealt = deal_letters(synthetic, rng)
        mixed[split] = kept + [Pair(record(c), c["kind"], c["aspect"], c["request"]) for c in dealt]
    return mixed


def _draw(items: list, count: int, rng: np.random.Generator) -> list:
    """Return so many of the items, drawn, in their order; all where there are no more."""
    if count >= len(items):
        return items
    return [items[place] for place in sorted(rng.permutation(len(items))[:count])]


def describe(mixed: dict[str, list[Pair]]) -> dict[str, Any]:
    """Return counts of pairs by source, type, aspect and split, lengths in words, and how often a letter is right."""
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
