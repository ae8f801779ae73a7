"""Splits: their names in paths, and the assignment of labelled clips to them by group, stratified by label."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from mellow_platform.data.labels import ClipLabels
from mellow_platform.data.records import SPLITS

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
Term = tuple[str, str]  # kind (label or category) and text
Group = tuple[str, str]  # what it is named by (group or file) and the name


def terms(clip: ClipLabels) -> list[Term]:
    """Return what may be asked about a clip: its labels and, where they are apart, its categories."""
    return [("label", name) for name in clip.names] + [("category", name) for name in clip.categories]


def group_key(clip: ClipLabels) -> Group:
    """Return what tells a clip's group from others; a clip without a group is one of its own."""
    return ("group", clip.group) if clip.group else ("file", clip.file)


def deal(clips: Sequence[ClipLabels], seed: int) -> dict[str, list[ClipLabels]]:
    """Return the clips of each split, a function of clips and seed; no group is in two splits.

    The rarest labels are dealt first. Of each, one group goes to train, one to test if there are two, and the others
    where they bring the label's clips, and then all clips, nearest to 3:1:1. Groups all of whose labels are in no
    other group go to train: nothing else could be learned about them, so that nothing can be tested.
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

    def put(key: Group, split: str) -> None:
        split_of[key] = split
        all_counts[split] += len(members[key])
        for term, count in sizes[key].items():
            counts[term][split] += count

    for term in testable:
        term_total = sum(sizes[key][term] for key in holders[term])
        open_keys = [key for key in holders[term] if key not in split_of]
        for key in open_keys:
            if not counts[term]["train"]:
                put(key, "train")
            elif not counts[term]["test"] and key == open_keys[-1]:
                put(key, "test")
            else:
                excess = {
                    split: (
                        _excess(counts[term][split], sizes[key][term], term_total, split),
                        _excess(all_counts[split], len(members[key]), total, split),
                    )
                    for split in ("test", "val", "train")
                }
                put(key, min(excess, key=lambda split: excess[split]))
    _repair(testable, holders, sizes, counts, split_of)
    return {split: [clip for clip in clips if split_of[group_key(clip)] == split] for split in SPLITS}


def _repair(
    testable: Sequence[Term],
    holders: dict[Term, list[Group]],
    sizes: dict[Group, Counter[Term]],
    counts: dict[Term, Counter[str]],
    split_of: dict[Group, str],
) -> None:
    """Move groups to train or test for labels that have none there, if no other label loses its last one by that.

    Labels need it whose groups were all dealt for the sake of rarer labels.
    """

    def is_spare(key: Group) -> bool:
        split = split_of[key]
        kept = (counts[term][split] > count for term, count in sizes[key].items() if len(holders[term]) > 1)
        return split == "val" or all(kept)

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
    """Return by how much a split of `count` clips grows away from its share of `total` with some added: less is better.

    It is half of what the sum over splits of (clips - target)^2 / target grows by, for each clip that is added.
    """
    target = SHARES[split] * total
    return round((count + added / 2 - target) / target, 9)


# Words that name a split; Clotho's development split is the one to train on, its evaluation split the test.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "development"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(name: str) -> str:
    """Return the split that the first such word of a shard's path names (`train/0.tar`, `Valid-0.parquet`), or train.

    A word goes from one sign or digit to the next.
    """
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
