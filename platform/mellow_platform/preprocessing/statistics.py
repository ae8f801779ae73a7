"""Statistics of a corpus as numbers and as a plot: durations, levels, questions by type, lengths in tokens."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mellow_platform.plot_style import BLUE, DARK, GREEN, GREY, LIGHT_GREY, ORANGE, RED, png, styled_figure
from mellow_platform.preprocessing.clip_shards import SILENCE_ID

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 40
COLORS = {"train": BLUE, "val": ORANGE, "test": RED}  # other splits are grey


def describe(
    clips: Sequence[dict[str, Any]], records: dict[str, list[dict[str, Any]]], counts: dict[str, Any]
) -> dict[str, Any]:
    """Return the statistics of a shard set, from the receipts of clip shards and, by split, record shards."""
    measured = [
        (length, level)
        for receipt in clips
        for clip_id, length, level in zip(receipt["clip_ids"], receipt["seconds"], receipt["levels"], strict=True)
        if clip_id != SILENCE_ID  # a partner, not a clip of the corpus
    ]
    seconds, levels = np.array(measured).reshape(-1, 2).T
    by_family = {split: _sum(receipts, "families") for split, receipts in records.items()}
    families = sorted(set().union(*by_family.values()) if by_family else ())
    return {
        "clips": counts["clips"],
        "distinct_clips": counts["distinct_clips"],
        "hours": round(counts["audio_seconds"] / 3600, 4),
        "quarantined_by_reason": counts["quarantined_by_reason"],
        "splits": counts["splits"],
        "seconds": _summary(seconds),
        "level_db": _summary(levels),
        "questions_by_type": {
            family: {split: counts[family] for split, counts in by_family.items() if counts[family]}
            for family in families
        },
        "prompt_tokens": {split: _lengths(_sum(receipts, "prompt_tokens")) for split, receipts in records.items()},
        "answer_tokens": {split: _lengths(_sum(receipts, "answer_tokens")) for split, receipts in records.items()},
    }


def _sum(receipts: Sequence[dict[str, Any]], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for receipt in receipts:
        total.update(receipt[name])
    return total


def _summary(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"count": 0, "quantiles": {}, "histogram": {"edges": [], "counts": []}}
    heights, edges = np.histogram(values, BINS)
    return {
        "count": len(values),
        "mean": round(float(values.mean()), 3),
        "quantiles": {f"{share:g}": round(float(np.quantile(values, share)), 3) for share in QUANTILES},
        "histogram": {"edges": [round(float(edge), 4) for edge in edges], "counts": heights.tolist()},
    }


def _lengths(counted: Counter[str]) -> dict[str, Any]:
    """Return the summary of lengths from their counts."""
    if not counted:
        return {"count": 0, "quantiles": {}, "counts": {}}
    lengths = np.array(sorted(map(int, counted)))
    heights = np.array([counted[str(length)] for length in lengths])
    below = np.cumsum(heights) / heights.sum()
    return {
        "count": int(heights.sum()),
        "mean": round(float((lengths * heights).sum() / heights.sum()), 3),
        "quantiles": {
            f"{share:g}": int(lengths[min(int(np.searchsorted(below, share)), len(lengths) - 1)]) for share in QUANTILES
        },
        "counts": {str(length): int(height) for length, height in zip(lengths, heights, strict=True)},
    }


def draw(statistics: dict[str, Any]) -> bytes:
    """Return a PNG that plots the statistics of `describe`."""
    with styled_figure(13, 7.6) as figure:
        axes = figure.subplots(2, 3)
        _draw_histogram(axes[0, 0], statistics["seconds"], "Durations of clips", "seconds", "clips")
        _draw_histogram(
            axes[0, 1], statistics["level_db"], "Levels of clips", "root mean square in dB, full scale 0", "clips"
        )
        _draw_types(axes[0, 2], statistics["questions_by_type"])
        _draw_lengths(axes[1, 0], statistics["prompt_tokens"], "Lengths of prompts")
        _draw_lengths(axes[1, 1], statistics["answer_tokens"], "Lengths of answers")
        _draw_clips(axes[1, 2], statistics)
        title = f"{statistics['clips']:,} clips, {statistics['hours']:,.2f} h"
        questions = sum(sum(counts.values()) for counts in statistics["questions_by_type"].values())
        figure.suptitle(f"{title}, {questions:,} questions" if questions else title)
        return png(figure)


def _draw_histogram(axes: Axes, summary: dict[str, Any], title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    edges, heights = summary["histogram"]["edges"], summary["histogram"]["counts"]
    if not heights:
        return
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.stairs(heights, edges, fill=True, color=COLORS["train"], alpha=0.85)
    axes.set_ylim(0, 1.12 * max(heights))  # room for the median's label
    median = summary["quantiles"]["0.5"]
    axes.axvline(median, color=DARK, linewidth=1, linestyle="--")
    axes.annotate(
        f"median {median:.1f}", (median, 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
        textcoords="offset points", color=DARK,
    )  # fmt: skip


def _draw_types(axes: Axes, types: dict[str, dict[str, int]]) -> None:
    axes.set(title="Questions by type", xlabel="questions")
    names = sorted(types, key=lambda name: sum(types[name].values()))
    left = np.zeros(len(names))
    for split in dict.fromkeys(split for counts in types.values() for split in counts):
        widths = np.array([types[name].get(split, 0) for name in names])
        axes.barh(names, widths, left=left, color=COLORS.get(split, GREY), label=split)
        left += widths
    if names:
        axes.legend(loc="lower right")
        axes.tick_params(axis="y", labelsize=8)


def _draw_lengths(axes: Axes, by_split: dict[str, Any], title: str) -> None:
    axes.set(title=title, xlabel="tokens", ylabel="share of questions")
    for split, summary in by_split.items():
        if summary["count"]:
            lengths = np.array(list(map(int, summary["counts"])))
            dense = np.zeros(lengths.max() + 2)
            dense[lengths] = np.array(list(summary["counts"].values())) / summary["count"]
            label = f"{split}: median {summary['quantiles']['0.5']}, 95 % up to {summary['quantiles']['0.95']}"
            color = COLORS.get(split, GREY)
            axes.stairs(dense, np.arange(len(dense) + 1) - 0.5, color=color, label=label, linewidth=1.4)
    if axes.get_legend_handles_labels()[0]:
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="upper right")


def _draw_clips(axes: Axes, statistics: dict[str, Any]) -> None:
    """Draw the shares of usable, missing and otherwise unusable clips per split and task."""
    axes.set(title="Usable clips", xlabel="share of clips", xlim=(0, 1))
    rows = [
        (f"{split} {task}" if task != "clips" else split or "clips", counts)
        for split, tasks in sorted(statistics["splits"].items(), key=lambda item: [*COLORS, item[0]].index(item[0]))
        for task, counts in tasks.items()
    ][::-1]
    for place, (_, counts) in enumerate(rows):
        total = counts["clips"]
        parts = (total - counts["quarantined"], counts["missing"], counts["quarantined"] - counts["missing"])
        left = 0.0
        for part, color in zip(parts, (GREEN, LIGHT_GREY, RED), strict=True):
            axes.barh(place, part / total, left=left, color=color)
            left += part / total
        axes.annotate(f"{parts[0]:,} of {total:,}", (0.02, place), va="center", color="white")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    reasons = ", ".join(f"{reason} {count}" for reason, count in statistics["quarantined_by_reason"].items())
    axes.annotate(
        f"unusable: {reasons or 'none'} (grey: missing)", (0, -0.2), xycoords="axes fraction", va="top", fontsize=8.5
    )
