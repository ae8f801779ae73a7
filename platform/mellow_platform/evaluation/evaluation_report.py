"""Reports of an evaluation: Markdown tables, and one HTML page with tables, bar charts and audio examples."""

import base64
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np

from mellow_platform.data.audio import AudioError, decode, encode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.clip_reader import ClipAddress, read
from mellow_platform.evaluation.dataset import BenchmarkItem
from mellow_platform.markdown import markdown_table
from mellow_platform.plot_style import BLUE, DARK, GREY, LIGHT_GREY, ORANGE, png, styled_figure

CONDITIONS = {"audio": "audio", "noise": "noise", "text_only": "text only", "chance": "chance"}
COLORS = {"audio": BLUE, "noise": ORANGE, "text_only": GREY, "chance": LIGHT_GREY}
PLAYER_RATE = 32_000  # Hz
PLAYER_SECONDS = 10  # the part of a recording that a model receives
MAX_BARS = 40  # categories in one chart

Scores = dict[str, dict[str, float]]  # by condition: value, low, high


@dataclass(frozen=True)
class Example:
    """A question with its recordings, and the prediction under each condition."""

    item: BenchmarkItem
    score: float
    predictions: dict[str, Any]  # Reply by condition


def markdown(report: dict[str, Any]) -> str:
    """Return the report's tables: main scores by condition, then all scores and categories of each benchmark."""
    conditions = report["conditions"]
    titles = [CONDITIONS[name] for name in conditions]

    def cells(scores: Scores) -> list[str]:
        return [interval(scores[name]) if name in scores else "" for name in conditions]

    def score_table(summary: dict[str, Any]) -> str:
        rows = [[score, *cells(values)] for score, values in by_score(summary["scores"]).items()]
        return markdown_table(["score", *titles], rows)

    mains = [
        [name, summary["main"], f"{summary['scored']:,}", *cells(main_score(summary))]
        for name, summary in report["benchmarks"].items()
        if "scores" in summary
    ]
    parts = [
        f"Model `{report['model']}`, split {report['split']}, {report['records']:,} questions.",
        markdown_table(["benchmark", "score", "questions", *titles], mains, text_columns=2),
    ]
    for name, summary in report["benchmarks"].items():
        parts.append(f"**{name}**: {summary['title']}, {summary['questions']:,} questions.")
        if "scores" not in summary:
            parts.append("Reference answers are not public; submit `mmau.json`.")
            continue
        parts.append(score_table(summary))
        for axis, groups in summary["groups"].items():
            rows = [[name, f"{group['questions']:,}", *cells(group["scores"])] for name, group in groups.items()]
            parts.append(markdown_table([axis, "questions", *titles], rows))
        if lines := notes(summary):
            parts.append("\n".join(f"- {line}" for line in lines))
        for family, subset in summary.get("data_sets", {}).items():
            parts += [f"{family} only, {subset['questions']:,} questions:", score_table(subset)]
    parts.append(f"95 % intervals by bootstrap over clips. {question_counts(report)}".rstrip())
    if report.get("comparison"):
        parts += comparison_parts(report["comparison"])
    return "\n\n".join(parts) + "\n"


def by_score(scores: dict[str, Scores]) -> dict[str, Scores]:
    """Return scores keyed by condition, then name, as scores keyed by name, then condition."""
    names = next(iter(scores.values()))
    return {name: {condition: values[name] for condition, values in scores.items()} for name in names}


def main_score(summary: dict[str, Any]) -> Scores:
    """Return the main score of a benchmark, by condition."""
    return {condition: scores[summary["main"]] for condition, scores in summary["scores"].items()}


def notes(summary: dict[str, Any]) -> list[str]:
    """Return notes on a benchmark's scores: differences to the control conditions, failures, unavailable scores."""
    lines = [
        f"Audio minus {CONDITIONS[name]}: {summary['main']} {difference['value']:+.3f} "
        f"({difference['low']:+.3f} to {difference['high']:+.3f}, p {probability(difference['p'])})."
        for name, difference in summary["control"].items()
    ]
    lines += [
        f"No answer under {CONDITIONS[condition]}, scored as wrong: "
        f"{', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}."
        for condition, reasons in summary["no_answer"].items()
    ]
    return lines + [f"No {name}: {reason}." for name, reason in summary["unavailable"].items()]


def question_counts(report: dict[str, Any]) -> str:
    """Return one line with the counts of failed, cut and dropped questions, and the answer times."""
    counts = [
        f"{count:,} {text.format(reason)} ({CONDITIONS[condition]})"
        for field, text in (("no_answer", "without an answer: {}"), ("cut", "{}"))
        for condition, reasons in report[field].items()
        for reason, count in reasons.items()
    ]
    counts += [f"{report['dropped']:,} dropped by preprocess with unusable clips"] if report["dropped"] else []
    sentences = [f"Questions: {'; '.join(counts)}."] if counts else []
    times = [
        f"{CONDITIONS[condition]} {seconds['median']:.2f} s ({seconds['p95']:.2f} s)"
        for condition, seconds in report["seconds_an_answer"].items()
        if seconds
    ]
    sentences += [f"Time per answer, with many concurrent questions: median (p95) {', '.join(times)}."] if times else []
    return " ".join(sentences)


def comparison_parts(comparison: dict[str, Any]) -> list[str]:
    """Return the comparison with another evaluation as Markdown paragraphs."""
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
    header = ["benchmark", "score", "questions", "difference", "p", "significantly"]
    parts = [
        f"Against `{comparison['against']}`, on the questions that both answered:",
        markdown_table(header, rows, text_columns=2),
    ]
    counts = [f"{count:,} of {name}" for name, count in comparison["left_out"].items()]
    return parts + ([f"Not compared, unanswered there: {', '.join(counts)}."] if counts else [])


def interval(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})"


def probability(p: float) -> str:
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def page(report: dict[str, Any], examples: dict[str, list[Example]]) -> str:
    """Return the report as one self-contained HTML file with embedded charts and recordings."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files(__package__).joinpath("report.html").read_text())
    return template.render(
        report=report,
        conditions=CONDITIONS,
        main_score=main_score,
        notes=notes,
        by_score=by_score,
        probability=probability,
        question_counts=question_counts(report),
        overviews={unit: data_uri("image/png", chart) for unit, chart in overviews(report).items()},
        charts={
            (name, axis): data_uri("image/png", bars(groups, axis, summary["main"]))
            for name, summary in report["benchmarks"].items()
            for axis, groups in summary.get("groups", {}).items()
        },
        examples=examples,
        players=players({uri for rows in examples.values() for example in rows for uri in example.item.files}),
    )


def data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def players(uris: set[str]) -> dict[str, str]:
    """Return each recording as a data URI of MP3, or the reason why it cannot be read."""
    sources = {}
    for uri in sorted(uris):
        try:
            data = read(ClipAddress(uri, "", uri), AudioLimits())
            waveform = decode(data, PLAYER_RATE)[: PLAYER_SECONDS * PLAYER_RATE]
        except (AudioError, OSError) as error:  # one unreadable recording must not cost the report
            sources[uri] = str(error)
            continue
        sources[uri] = data_uri("audio/mpeg", encode(np.clip(waveform, -1.0, 1.0), PLAYER_RATE, "MP3"))
    return sources


def overviews(report: dict[str, Any]) -> dict[str, bytes]:
    """Return, per score name such as accuracy or CIDEr, a PNG of the benchmarks' main scores by condition."""
    rows: dict[str, dict[str, Scores]] = {}
    for name, summary in report["benchmarks"].items():
        if "scores" in summary:
            rows.setdefault(summary["main"].partition(" (")[0], {})[name] = main_score(summary)
    return {unit: _bar_chart(scores, unit) for unit, scores in rows.items()}


def bars(groups: dict[str, Any], axis: str, score: str) -> bytes:
    """Return a PNG of a score by category and condition, for the `MAX_BARS` largest categories."""
    largest = sorted(groups, key=lambda name: -groups[name]["questions"])[:MAX_BARS]
    rows = {f"{name} ({groups[name]['questions']})": groups[name]["scores"] for name in groups if name in largest}
    return _bar_chart(rows, f"{score} by {axis} (questions)")


def _bar_chart(rows: dict[str, Scores], title: str) -> bytes:
    conditions = [name for name in CONDITIONS if any(name in scores for scores in rows.values())]
    thickness = 0.8 / max(1, len(conditions))
    with styled_figure(8, 1.2 + len(rows) * (0.16 + 0.16 * len(conditions))) as figure:
        axes = figure.subplots()
        for number, condition in enumerate(conditions):
            offset = (number - (len(conditions) - 1) / 2) * thickness
            bars = [
                (row + offset, scores[condition]) for row, scores in enumerate(rows.values()) if condition in scores
            ]
            positions, values = [row for row, _ in bars], [score["value"] for _, score in bars]
            errors = np.array([[max(0.0, s["value"] - s["low"]), max(0.0, s["high"] - s["value"])] for _, s in bars]).T
            axes.barh(positions, values, thickness, color=COLORS[condition], label=CONDITIONS[condition])
            axes.errorbar(values, positions, xerr=errors, fmt="none", ecolor=DARK, elinewidth=0.8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.set_title(title)
        if conditions:
            figure.legend(loc="outside lower left", ncols=len(conditions))
        return png(figure)
