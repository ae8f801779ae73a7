"""Report of a synthesis: requested and rejected pairs, cost, and the composition of the corpus."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mellow_platform.data.records import SPLITS
from mellow_platform.markdown import markdown_table
from mellow_platform.synthesis.writer import SPENT, WriterAnswer


def pass_counts(answers: list[WriterAnswer]) -> dict[str, Any]:
    """Return the requests, spending and failures of a pass, over all runs of the job."""
    failed = Counter(answer["error"] for answer in answers if answer["error"])
    spent = {name: sum(answer[name] for answer in answers) for name in SPENT}
    return {"requests": len(answers)} | spent | {"failed": dict(sorted(failed.items()))}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    mixture = report["mixture"]
    pairs = {name: report[name] for name in ("requested", "accepted", "rejected", "failed")}
    parts = [
        f"# Questions from {report['captions']} captions of {report['clips']} clips\n\nWritten by {report['writer']}.",
        _section("Pairs", ("", "pairs"), [*pairs.items(), *_reasons(report)]),
        _section(
            "Splits",
            ("split", "pairs", "existing", "synthetic", "share of synthetic", "clips"),
            [(split, *counts.values()) for split, counts in mixture["splits"].items()],
        ),
        *(_by_split(name, mixture[f"by_{name}"]) for name in ("source", "type", "aspect")),
        _section(
            "Lengths in words",
            ("type", "", "mean", "median", "max"),
            [
                (kind, part, *counts.values())
                for kind, found in mixture["words"].items()
                for part, counts in found.items()
            ],
            text_columns=2,
        ),
        _section(
            "Reference letters of multiple-choice questions",
            ("choices", "split", "count per letter"),
            [
                (count, split, ", ".join(f"{letter} {number}" for letter, number in letters.items()))
                for count, splits in mixture["letters"].items()
                for split, letters in splits.items()
            ],
            text_columns=3,
        ),
        _section(
            "Requests",
            ("pass", "requests", "failed", "completions", "HTTP retries", "prompt tokens", "answer tokens"),
            [
                (name, counts["requests"], sum(counts["failed"].values()), *(counts[field] for field in SPENT))
                for name, counts in report["passes"].items()
            ],
        ),
    ]
    if report["cost_usd"]:
        parts.append(f"Cost: {report['cost_usd']:.2f} USD.")
    return "\n\n".join(filter(None, parts)) + "\n"


def _reasons(report: dict[str, Any]) -> list[tuple[str, int]]:
    """Return one row per reason of rejected and failed pairs."""
    return [
        (f"{outcome}: {reason}", count)
        for outcome in ("rejected", "failed")
        for reason, count in report[f"{outcome}_by_reason"].items()
    ]


def _by_split(name: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    rows = [(value, *(found.get(split, 0) for split in SPLITS)) for value, found in counts.items()]
    return _section(f"By {name}", (name, *SPLITS), rows)


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: int = 1) -> str:
    return f"## {title}\n\n{markdown_table(header, rows, text_columns)}" if rows else ""
