"""What an evaluation shows: tables to paste, and one page with tables, bars by category and examples to listen to."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mellow_platform.data.audio import AudioError, decode, encode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.clip_reader import ClipAddress, read
from mellow_platform.evaluation.dataset import BenchmarkItem

CONDITIONS = {"audio": "audio", "noise": "noise", "text_only": "text only", "chance": "chance"}
COLORS = {"audio": "#2a6fbb", "noise": "#d9822b", "text_only": "#8a8f98", "chance": "#c9cdd3"}
PLAYED_RATE = 32_000  # Hz
PLAYED_SECONDS = 10  # what a model hears of a recording
BARS_AT_MOST = 40  # categories in a picture

Scores = dict[str, dict[str, float]]  # by condition: value, low, high


@dataclass(frozen=True)
class Example:
    """A question to listen to, with what was answered under each condition."""

    item: BenchmarkItem
    score: float
    predictions: dict[str, Any]  # Reply by condition


def markdown(report: dict[str, Any]) -> str:
    """Return the report's tables: benchmarks by condition, then the scores of each with its categories."""
    conditions = report["conditions"]
    lines = [f"Model `{report['model']}`, split {report['split']}, {report['records']:,} questions.", ""]
    lines += main_scores(report)
    for name, each in report["benchmarks"].items():
        lines += ["", f"**{name}**: {each['title']}, {each['questions']:,} questions.", ""]
        if "scores" not in each:
            lines.append("Right answers are not public: see `mmau.json`, the file to submit.")
            continue
        lines += _table(
            ["score", *_titles(conditions)],
            [[score, *_cells(own, conditions)] for score, own in by_name(each["scores"]).items()],
        )
        for axis, groups in each["groups"].items():
            lines += ["", *_table(
                [axis, "questions", *_titles(conditions)],
                [
                    [group, f"{own['questions']:,}", *_cells(own["scores"], conditions)]
                    for group, own in groups.items()
                ],
            )]  # fmt: skip
        lines += ["", *notes(each)] if notes(each) else []
        for family, own in each.get("data_sets", {}).items():
            lines += ["", f"{family} alone, {own['questions']:,} questions:", ""]
            by_score = by_name(own["scores"])
            lines += _table(
                ["score", *_titles(conditions)], [[score, *_cells(of, conditions)] for score, of in by_score.items()]
            )
    lines += ["", f"Intervals of 95 %, by bootstrap over clips. {left_over(report)}".rstrip()]
    return "\n".join(lines) + "\n" + comparison_lines(report.get("comparison"))


def main_scores(report: dict[str, Any]) -> list[str]:
    """Return the lines of the table that has a row a benchmark."""
    rows = [
        [name, each["main"], f"{each['scored']:,}", *_cells(of_main(each), report["conditions"])]
        for name, each in report["benchmarks"].items()
        if "scores" in each
    ]
    return _table(["benchmark", "score", "questions", *_titles(report["conditions"])], rows, texts=2)


def by_name(scores: dict[str, Scores]) -> dict[str, Scores]:
    """Return scores by condition and name as scores by name and condition."""
    names = next(iter(scores.values()))
    return {name: {condition: own[name] for condition, own in scores.items()} for name in names}


def of_main(summary: dict[str, Any]) -> Scores:
    """Return the score that stands for a benchmark, by condition."""
    return {condition: scores[summary["main"]] for condition, scores in summary["scores"].items()}


def notes(summary: dict[str, Any]) -> list[str]:
    """Return what is to be said of a benchmark's scores: how they fall without audio, and what is not there."""
    said = [
        f"- Audio minus {CONDITIONS[name]}: {summary['main']} {own['value']:+.3f} "
        f"({own['low']:+.3f} to {own['high']:+.3f}, p {probability(own['p'])})."
        for name, own in summary["control"].items()
    ]
    said += [
        f"- Without an answer under {CONDITIONS[condition]}, and so wrong: "
        f"{', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}."
        for condition, reasons in summary["no_answer"].items()
    ]
    return said + [f"- No {name}: {reason}." for name, reason in summary["unavailable"].items()]


def left_over(report: dict[str, Any]) -> str:
    """Return what was not answered as it was asked, in a line."""
    parts = [
        f"{count:,} {what} ({CONDITIONS[condition]})"
        for field, words in (("no_answer", "without an answer: {}"), ("cut", "{}"))
        for condition, counts in report[field].items()
        for what, count in ((words.format(name), count) for name, count in counts.items())
    ]
    parts += (
        [f"{report['dropped']:,} dropped by preprocess with clips that cannot be used"] if report["dropped"] else []
    )
    said = [f"Questions: {'; '.join(parts)}."] if parts else []
    taken = [
        f"{CONDITIONS[condition]} {seconds['median']:.2f} s ({seconds['p95']:.2f} s)"
        for condition, seconds in report["seconds_an_answer"].items()
        if seconds
    ]
    said += [f"From question to answer, many at a time (median, and 95 % within): {', '.join(taken)}."] if taken else []
    return " ".join(said)


def comparison_lines(comparison: dict[str, Any] | None) -> str:
    """Return the comparison with another run as Markdown; empty without one."""
    if not comparison:
        return ""
    rows = [
        [
            row["benchmark"],
            row["score"],
            f"{row['questions']:,}",
            f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            probability(row["p"]),
            ("higher" if row["value"] > 0 else "lower") if row["significant"] else "",
        ]
        for row in comparison["differences"]
    ]
    table = _table(["benchmark", "score", "questions", "difference", "p", "significantly"], rows, texts=2)
    left_out = [f"{count:,} of {name}" for name, count in comparison["left_out"].items()]
    table += ["", f"Not compared, as it has no answer to them: {', '.join(left_out)}."] if left_out else []
    return (
        "\n".join(["", f"Against `{comparison['against']}`, on the questions that both answered:", "", *table]) + "\n"
    )


def _titles(conditions: Sequence[str]) -> list[str]:
    return [CONDITIONS[name] for name in conditions]


def _cells(scores: Scores, conditions: Sequence[str]) -> list[str]:
    return [interval(scores[name]) if name in scores else "" for name in conditions]


def interval(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})"


def probability(p: float) -> str:
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _table(heads: list[str], rows: list[list[str]], texts: int = 1) -> list[str]:
    """Return a Markdown table whose first `texts` columns are texts and whose others are numbers."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]

    def line(cells: list[str]) -> str:
        aligned = [f"{c:{w}}" if n < texts else f"{c:>{w}}" for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(aligned) + " |"

    rule = [f"{'-' * (w + 2)}" if n < texts else f"{'-' * (w + 1)}:" for n, w in enumerate(widths)]
    return [line(heads), "|" + "|".join(rule) + "|", *map(line, rows)]


def page(report: dict[str, Any], examples: dict[str, list[Example]]) -> str:
    """Return the report as one HTML file that needs nothing beside it: pictures and sounds stand in it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files(__package__).joinpath("report.html").read_text())
    return template.render(
        report=report,
        conditions=CONDITIONS,
        of_main=of_main,
        notes=notes,
        by_name=by_name,
        probability=probability,
        left_over=left_over(report),
        overviews={unit: data_uri("image/png", picture) for unit, picture in overviews(report).items()},
        pictures={
            (name, axis): data_uri("image/png", bars(groups, axis, each["main"]))
            for name, each in report["benchmarks"].items()
            for axis, groups in each.get("groups", {}).items()
        },
        examples=examples,
        sounds=sounds({uri for own in examples.values() for example in own for uri in example.item.files}),
    )


def data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def sounds(uris: set[str]) -> dict[str, str]:
    """Return recordings by their URI, as data URIs of MP3; of what cannot be read the reason, in words."""
    played = {}
    for uri in sorted(uris):
        try:
            waveform = decode(read(ClipAddress(uri, "", uri), AudioLimits()), PLAYED_RATE)[
                : PLAYED_SECONDS * PLAYED_RATE
            ]
        except (AudioError, OSError) as error:  # a report is worth more than one of its players
            played[uri] = str(error)
            continue
        played[uri] = data_uri("audio/mpeg", encode(np.clip(waveform, -1.0, 1.0), PLAYED_RATE, "MP3"))
    return played


def overviews(report: dict[str, Any]) -> dict[str, bytes]:
    """Return a PNG of the benchmarks' main scores under each condition for every unit, such as accuracy or CIDEr."""
    rows: dict[str, dict[str, Scores]] = {}
    for name, each in report["benchmarks"].items():
        if "scores" in each:
            rows.setdefault(each["main"].partition(" (")[0], {})[name] = of_main(each)
    return {unit: _bar_chart(own, unit) for unit, own in rows.items()}


def bars(groups: dict[str, Any], axis: str, score: str) -> bytes:
    """Return a PNG of a score by category under each condition; of many categories the largest."""
    shown = sorted(groups, key=lambda name: -groups[name]["questions"])[:BARS_AT_MOST]
    kept = {f"{name} ({own['questions']})": own["scores"] for name, own in groups.items() if name in shown}
    return _bar_chart(kept, f"{score} by {axis} (questions)")


def _bar_chart(rows: dict[str, Scores], title: str) -> bytes:
    conditions = [name for name in CONDITIONS if any(name in scores for scores in rows.values())]
    height = 0.8 / max(1, len(conditions))
    figure = Figure(figsize=(8, 1.2 + len(rows) * (0.16 + 0.16 * len(conditions))), layout="constrained")
    panel = figure.subplots()
    for number, condition in enumerate(conditions):
        own = [(place, scores[condition]) for place, scores in enumerate(rows.values()) if condition in scores]
        places = [place + (number - (len(conditions) - 1) / 2) * height for place, _ in own]
        values = [score["value"] for _, score in own]
        ends = np.array([[max(0.0, s["value"] - s["low"]), max(0.0, s["high"] - s["value"])] for _, s in own])
        panel.barh(places, values, height, color=COLORS[condition], label=CONDITIONS[condition])
        if own:
            panel.errorbar(values, places, xerr=ends.T, fmt="none", ecolor="0.25", elinewidth=0.8, capsize=2)
    # A name with a sign of mathematics in it is a name.
    panel.set_yticks(range(len(rows)), list(rows), parse_math=False)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.set_title(title, loc="left", fontsize=10, parse_math=False)
    if conditions:
        figure.legend(loc="outside lower left", ncols=len(conditions), frameon=False)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()
