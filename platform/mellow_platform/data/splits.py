"""Dealing of labelled clips to train, val and test: by group, stratified by label."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from mellow_platform.data.labels import ClipLabels
from mellow_platform.data.records import SPLITS

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
Term = tuple[str, str]  # kind (label or category) and text


def terms(clip: ClipLabels) -> list[Term]:
    """Return what may be asked about a clip: its labels and, where they are apart, its categories."""
    return [("label", name) for name in clip.names] + [("category", name) for name in clip.categories]


def group_key(clip: ClipLabels) -> tuple[str, str]:
    """Return what tells a clip's group from others; a clip without a group is one of its own."""
    return ("group", clip.group) if clip.group else ("file", clip.file)


def deal(clips: Sequence[ClipLabels], seed: int) -> dict[str, list[ClipLabels]]:
    """Return the clips of each split, a function of clips and seed; no group is in two splits.

    The rarest labels are dealt first. Of each, one group goes to train, one to test if there are two, and the others
    where they bring the label's clips, and then all clips, nearest to 3:1:1. Groups all of whose labels are in no
    other group go to train: nothing else could be learned about them, so that nothing can be tested.
    """
    rng = np.random.default_rng(seed)
    members: dict[tuple[str, str], list[ClipLabels]] = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip.file):
        members[group_key(clip)].append(clip)
    keys = sorted(members)
    order = sorted((keys[number] for number in rng.permutation(len(keys))), key=lambda key: -len(members[key]))
    sizes = {key: Counter(term for clip in members[key] for term in terms(clip)) for key in order}
    holders: dict[Term, list[tuple[str, str]]] = defaultdict(list)
    for key in order:
        for term in sizes[key]:
            holders[term].append(key)
    testable = [term for term in sorted(holders, key=lambda term: (len(holders[term]), term)) if len(holders[term]) > 1]
    split_of_group = {key: "train" for key in order if all(len(holders[term]) == 1 for term in sizes[key])}

    total = sum(len(members[key]) for key in order if key not in split_of_group)
    all_counts: Counter[str] = Counter()
    counts: dict[Term, Counter[str]] = defaultdict(Counter)
    for term in testable:
        term_total = sum(sizes[key][term] for key in holders[term])
        open_keys = [key for key in holders[term] if key not in split_of_group]
        for key in open_keys:
            if not counts[term]["train"]:
                split = "train"
            elif not counts[term]["test"] and key == open_keys[-1]:
                split = "test"
            else:
                split = min(
                    ("test", "val", "train"),
                    key=lambda split: (
                        _excess(counts[term][split], sizes[key][term], term_total, split),
                        _excess(all_counts[split], len(members[key]), total, split),
                    ),
                )
            split_of_group[key] = split
            all_counts[split] += len(members[key])
            for each, count in sizes[key].items():
                counts[each][split] += count
    return {split: [clip for clip in clips if split_of_group[group_key(clip)] == split] for split in SPLITS}


def _excess(count: int, added: int, total: int, split: str) -> float:
    """Return by how much a split of `count` clips grows away from its share of `total` with some added: less is better.

    It is half of what the sum over splits of (clips - target)^2 / target grows by, for each clip that is added.
    """
    target = SHARES[split] * total
    return round((count + added / 2 - target) / target, 9)
