"""Splits: names in paths, and assignment of labelled clips by group, stratified by label."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from mellow_platform.data.labels import ClipLabels
from mellow_platform.data.records import SPLITS

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
Term = tuple[str, str]  # kind (label or category) and text
Group = tuple[str, str]  # kind of name (group or file) and name


def terms(clip: ClipLabels) -> list[Term]:
    """Return the possible subjects of questions about a clip: its labels, and its categories if they are separate."""
    return [("label", name) for name in clip.names] + [("category", name) for name in clip.categories]


def group_key(clip: ClipLabels) -> Group:
    """Return the key of a clip's group; a clip without a group is a group of its own."""
    return ("group", clip.group) if clip.group else ("file", clip.file)


def assign_splits(clips: Sequence[ClipLabels], seed: int) -> dict[str, list[ClipLabels]]:
    """Return the clips of each split, a function of clips and seed; no group is in two splits.

    The rarest labels are assigned first. Of the groups of a label, one goes to train, one to test if there are two, and
    each of the others to the split in which the label's clips, and then all clips, come nearest to 3:1:1. Groups whose
    labels are in no other group go to train: a test of these labels would have no training clips.
    """
    rng = np.random.default_rng(seed)
    members: dict[Group, list[ClipLabels]] = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip.file):
        members[group_key(clip)].append(clip)
    keys = sorted(members)
    order = sorted((keys[number] for number in rng.permutation(len(keys))), key=lambda key: -len(members[key]))
    sizes = {key: Counter(term for clip in members[key] for term in terms(clip)) for key in order}
    holders: dict[Term, list[Group]] = defaultdict(list)
    for key in order:
        for term in sizes[key]:
            holders[term].append(key)
    testable = [term for term in sorted(holders, key=lambda term: (len(holders[term]), term)) if len(holders[term]) > 1]
    split_of = {key: "train" for key in order if all(len(holders[term]) == 1 for term in sizes[key])}

    total = len(clips) - sum(len(members[key]) for key in split_of)
    all_counts: Counter[str] = Counter()
    counts: dict[Term, Counter[str]] = {term: Counter() for term in holders}

    def assign(key: Group, split: str) -> None:
        split_of[key] = split
        all_counts[split] += len(members[key])
        for term, count in sizes[key].items():
            counts[term][split] += count

    for term in testable:
        term_total = sum(sizes[key][term] for key in holders[term])
        open_keys = [key for key in holders[term] if key not in split_of]
        for key in open_keys:
            if not counts[term]["train"]:
                assign(key, "train")
            elif not counts[term]["test"] and key == open_keys[-1]:
                assign(key, "test")
            else:
                excess = {
                    split: (
                        _excess(counts[term][split], sizes[key][term], term_total, split),
                        _excess(all_counts[split], len(members[key]), total, split),
                    )
                    for split in ("test", "val", "train")
                }
                assign(key, min(excess, key=lambda split: excess[split]))
    _repair(testable, holders, sizes, counts, split_of)
    return {split: [clip for clip in clips if split_of[group_key(clip)] == split] for split in SPLITS}


def _repair(
    testable: Sequence[Term],
    holders: dict[Term, list[Group]],
    sizes: dict[Group, Counter[Term]],
    counts: dict[Term, Counter[str]],
    split_of: dict[Group, str],
) -> None:
    """Move groups to train or test for labels without clips there, unless another label would lose its last clips.

    A label needs this if all its groups were assigned because of rarer labels.
    """

    def is_spare(key: Group) -> bool:
        split = split_of[key]
        remaining = (counts[term][split] > count for term, count in sizes[key].items() if len(holders[term]) > 1)
        return split == "val" or all(remaining)

    for term in testable:
        for needed in ("train", "test"):
            if counts[term][needed]:
                continue
            spare = [key for key in holders[term] if split_of[key] != needed and is_spare(key)]
            if not spare:
                continue
            key = min(spare, key=lambda key: (split_of[key] != "val", len(sizes[key]), sum(sizes[key].values())))
            for each, count in sizes[key].items():
                counts[each][split_of[key]] -= count
                counts[each][needed] += count
            split_of[key] = needed


def _excess(count: int, added: int, total: int, split: str) -> float:
    """Return the excess of a split over its share of `total` after clips are added; lower is better.

    It is half the increase, per added clip, of the sum over splits of (clips - target)^2 / target.
    """
    target = SHARES[split] * total
    return round((count + added / 2 - target) / target, 9)


# Words that name a split. Clotho's development split is its train split, its evaluation split its test split.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "development"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(name: str) -> str:
    """Return the split of the first split word in a path (`train/0.tar`, `Valid-0.parquet`); train if there is none.

    Words are runs of letters.
    """
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
