"""The report of a synthesis: what was asked for, what became of it, what it cost, and what the corpus is made of."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mellow_platform.data.records import SPLITS
from mellow_platform.synthesis.writer import SPENT, WriterAnswer


def pass_counts(answers: list[WriterAnswer]) -> dict[str, Any]:
    """Return what a pass came to, over all runs that worked on it."""
    failed = Counter(answer["error"] for answer in answers if answer["error"])
    spent = {name: sum(answer[name] for answer in answers) for name in SPENT}
    return {"requests": len(answers)} | spent | {"failed": dict(sorted(failed.items()))}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as tables."""
    mixture = report["mixture"]
    pairs = {name: report[name] for name in ("requested", "accepted", "rejected", "failed")}
    parts = [
        f"# Questions from {report['captions']} captions of {report['clips']} clips\n\nWritten by {report['writer']}.",
        _table("Pairs", ("", "pairs"), [*pairs.items(), *_indented(report)]),
        _table(
            "Splits",
            ("split", "pairs", "existing", "synthetic", "share of synthetic", "clips"),
            [(split, *counts.values()) for split, counts in mixture["splits"].items()],
        ),
        *(_by_split(name, mixture[f"by_{name}"]) for name in ("source", "type", "aspect")),
        _table(
            "Lengths in words",
            ("type", "", "mean", "median", "max"),
            [(k, part, *c.values()) for k, found in mixture["words"].items() for part, c in found.items()],
        ),
        _table(
            "Right letters of multiple-choice questions",
            ("choices", "split", "how often"),
            [
                (count, split, ", ".join(f"{letter} {number}" for letter, number in letters.items()))
                for count, splits in mixture["letters"].items()
                for split, letters in splits.items()
            ],
        ),
        _table(
            "Requests",
            ("pass", "requests", "failed", "completions", "HTTP retries", "tokens of prompts", "tokens of answers"),
            [
                (name, c["requests"], sum(c["failed"].values()), *(c[count] for count in SPENT))
                for name, c in report["passes"].items()
            ],
        ),
    ]
    if report["cost_usd"]:
        parts.append(f"Cost: {report['cost_usd']:.2f} USD.")
    return "\n\n".join(filter(None, parts)) + "\n"


def _indented(report: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the reasons, under what they are reasons of."""
    return [
        (f"{what}: {reason}", count)
        for what in ("rejected", "failed")
        for reason, count in report[f"{what}_by_reason"].items()
    ]


def _by_split(name: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    rows = [(value, *(found.get(split, 0) for split in SPLITS)) for value, found in counts.items()]
    return _table(f"By {name}", (name, *SPLITS), rows)


def _table(title: str, names: tuple[str, ...], rows: list[tuple]) -> str:
    if not rows:
        return ""
    lines = [names, ("---",) * len(names), *rows]
    return f"## {title}\n\n" + "\n".join(
        f"| {' | '.join('' if c is None else str(c) for c in line)} |" for line in lines
    )
