"""The evaluation job: the questions of benchmarks are answered under each condition, scored, and reported.

Conditions: the clips themselves (`audio`), Gaussian noise in their place (`noise`), no clip (`text_only`: Mellow hears
the mean of many, an endpoint gets the question alone), and an answer drawn without looking at anything (`chance`, whose
scores are expected ones: every choice of a question is as likely). A model that listens is right with audio, and near
chance with the others.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from mellow_platform import storage
from mellow_platform.evaluation.baselines import draw_answers, read_answers
from mellow_platform.evaluation.benchmarks import BENCHMARKS, MMAU, Benchmark
from mellow_platform.evaluation.collect import REPORT, claim_output, collect_replies
from mellow_platform.evaluation.comparison import PREDICTIONS, compare, read_baseline
from mellow_platform.evaluation.dataset import BenchmarkItem, QuestionSource
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.evaluation_report import Example, markdown, page
from mellow_platform.evaluation.models import ModelInput, Reply
from mellow_platform.evaluation.scoring import AnsweredBenchmark, score, summarise
from mellow_platform.resumable import FailureBudget

SUBMISSION = "mmau.json"
TEXTS = pa.list_(pa.string())
PREDICTION_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("benchmark", "condition", "id")),
        pa.field("clips", TEXTS, nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", TEXTS, nullable=False),
        pa.field("answer", TEXTS, nullable=False),  # the right ones; empty where they are not public
        pa.field("prediction", pa.string(), nullable=False),  # empty where there is none
        pa.field("score", pa.float64()),  # 1 or 0, or of a description the score that they are compared by
        pa.field("seconds", pa.float64()),  # null of an answer that no model gave
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("groups", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Answer and score; write `predictions.parquet`, `report.json`, `report.md` and `report.html`; return the report.

    Raises:
        FileNotFoundError: questions, clips, shards or model are absent.
        ValueError: there are no questions of a benchmark, too many have no answer, `output` holds other answers, or
            the evaluation to compare with has none of the questions.
        ConnectionError: the endpoint cannot be asked.
    """
    source = QuestionSource(config)
    questions = select(config, source)
    before = read_baseline(config, questions)
    # What several benchmarks ask alike is asked once.
    asked = list(dict.fromkeys(ModelInput(b.prompt(item), item.clips) for b, items in questions for item in items))
    replies = _by_question(collect_replies(config, asked, source)) if config.listens else []
    said = dict(zip(asked, replies, strict=config.listens))
    answered = [score(b, items, _replies_to(b, items, said, config)) for b, items in questions]
    for each in answered:
        check_failures(each, config)
    if not config.listens:  # nothing is kept that a failed run could go on with
        claim_output(config, asked, "", source)
    report = {
        "model": config.model,
        "split": config.split,
        "records": len(asked),
        "conditions": list(answered[0].replies),
        "benchmarks": {each.benchmark.name: summarise(each, config) for each in answered},
        **_asking(answered, config),
        # Questions of all splits that the shards do not have, as their clips cannot be used.
        "dropped": source.manifest.counts["records_dropped"] if source.manifest else 0,
    }
    if config.against:
        report["comparison"] = compare(answered, before, config)
    write(config, answered, report)
    for each in answered:
        if isinstance(each.benchmark, MMAU) and "audio" in each.replies:
            write_submission(config, source, each)
    return report


def check_failures(answered: AnsweredBenchmark, config: EvaluateConfig) -> None:
    """Check each benchmark's failed questions, which may be many in a small benchmark and few over all.

    Raises:
        ValueError: more than the allowed share of a benchmark's questions failed.
    """
    for condition, reasons in answered.without_answer.items():
        items = f"questions of benchmark {answered.benchmark.name} under {condition}"
        detail = next((reply.detail for reply in answered.replies[condition] if reply.error), None)
        FailureBudget(items, len(answered.items), config.max_failed_share, "Repair them").add(reasons, detail)


def _by_question(replies: dict[str, list[Reply]]) -> list[dict[str, Reply]]:
    return [dict(zip(replies, of_one, strict=True)) for of_one in zip(*replies.values(), strict=True)]


def _replies_to(
    benchmark: Benchmark, items: list[BenchmarkItem], said: dict[ModelInput, dict[str, Reply]], config: EvaluateConfig
) -> dict[str, list[Reply]]:
    """Return the replies to a benchmark's items by condition: what a model said, or what is answered without one."""
    own: dict[str, list[Reply]] = {}
    if config.listens:
        for condition in (name for name in config.conditions if name != "chance"):
            replies = [said[ModelInput(benchmark.prompt(item), item.clips)][condition] for item in items]
            pairs = zip(items, replies, strict=True)
            own[condition] = [replace(reply, text=benchmark.reply(item, reply.text)) for item, reply in pairs]
    elif config.model == "random":
        own["audio"] = draw_answers(items, config.seed)
    elif config.model.startswith("constant:"):
        own["audio"] = [Reply(config.model.removeprefix("constant:"))] * len(items)
    else:
        own["audio"] = read_answers(benchmark.name, items, config.model.removeprefix("predictions:"))
    if "chance" in config.conditions:
        own["chance"] = draw_answers(items, config.seed)
    return own


def _asking(answered: Sequence[AnsweredBenchmark], config: EvaluateConfig) -> dict[str, Any]:
    """Return by condition what was not answered as it was asked, and how long answers took."""
    # Each reply once, however many benchmarks it counts in: what a model said is known by what it was asked.
    replies: dict[str, dict[ModelInput | str, Reply]] = {}
    for each in answered:
        questions = [
            ModelInput(each.benchmark.prompt(item), item.clips) if config.listens else item.id for item in each.items
        ]
        for condition, own in each.replies.items():
            replies.setdefault(condition, {}).update(zip(questions, own, strict=True))
    found = {condition: list(own.values()) for condition, own in replies.items()}
    return {
        "no_answer": {name: dict(Counter(reply.error for reply in own if reply.error)) for name, own in found.items()},
        "cut": {name: _cut(own) for name, own in found.items()},
        "seconds_an_answer": {name: _quantiles(own) for name, own in found.items()},
    }


def _cut(replies: Sequence[Reply]) -> dict[str, int]:
    return dict(Counter(reply.detail for reply in replies if reply.detail and not reply.error))


def _quantiles(replies: Sequence[Reply]) -> dict[str, float]:
    """Return how long answers took, of those whose time was taken."""
    seconds = [reply.seconds for reply in replies if reply.seconds is not None]
    shares = {"median": 0.5, "p95": 0.95, "max": 1.0} if seconds else {}
    return {name: round(float(np.quantile(seconds, share)), 4) for name, share in shares.items()}


def select(config: EvaluateConfig, source: QuestionSource) -> list[tuple[Benchmark, list[BenchmarkItem]]]:
    """Return the benchmarks that are asked for with their questions; of `all`, those that there are questions of.

    Raises:
        ValueError: there are no questions of a benchmark that was named.
    """
    every = "all" in config.benchmark
    chosen = []
    for name in BENCHMARKS if every else dict.fromkeys(config.benchmark):
        benchmark = BENCHMARKS[name]()
        # MMAU's file alone is enough for MMAU.
        there = benchmark.records(source) if not every or name == "mmau" or config.shards or config.corpus else []
        if there:
            chosen.append((benchmark, there[: config.limit]))
        elif not every:
            families = Counter(item.family for item in source.records) if config.shards or config.corpus else {}
            found = ", ".join(sorted(families)) or "none"
            raise ValueError(
                f"benchmark {name}: split {config.split!r} has no such questions; families there: {found}"
                + ("; give `mmau`, the benchmark's file" if name == "mmau" else "")
            )
    if not chosen:
        raise ValueError(f"split {config.split!r} has no questions of any benchmark")
    return chosen


def write(config: EvaluateConfig, answered: Sequence[AnsweredBenchmark], report: dict[str, Any]) -> None:
    """Write predictions and report."""
    tables = [table for each in answered for table in _predictions(each)]
    storage.write_table(storage.join(config.output, PREDICTIONS), pa.concat_tables(tables))
    storage.write_json(storage.join(config.output, REPORT), report)
    storage.write_bytes(storage.join(config.output, "report.md"), markdown(report).encode())
    examples = {each.benchmark.name: _worst(each, config.examples) for each in answered}
    storage.write_bytes(storage.join(config.output, "report.html"), page(report, examples).encode())


def _predictions(answered: AnsweredBenchmark) -> Iterator[pa.Table]:
    """Yield the answers under each condition (`PREDICTION_SCHEMA`)."""
    items = answered.items
    asked = {
        "benchmark": [answered.benchmark.name] * len(items),
        "id": [item.id for item in items],
        "clips": [item.files or item.paths for item in items],
        "question": [item.question for item in items],
        "choices": [item.choices for item in items],
        "answer": [item.references for item in items],
        "groups": [list(item.groups.items()) for item in items],
    }
    for condition, replies in answered.replies.items():
        scores: list[float | None] = [None] * len(items)
        if condition in answered.scores:
            for row, score in zip(answered.scored_rows, answered.scores[condition].per_item, strict=True):
                scores[row] = float(score)
        said = {name: [getattr(reply, name) for reply in replies] for name in ("seconds", "error", "detail")}
        columns = asked | said | {"condition": [condition] * len(items), "score": scores}
        columns["prediction"] = [reply.text for reply in replies]
        yield pa.table({field.name: columns[field.name] for field in PREDICTION_SCHEMA}, schema=PREDICTION_SCHEMA)


def _worst(answered: AnsweredBenchmark, count: int) -> list[Example]:
    """Return the questions with the lowest scores with audio; of equal ones any, but the same each time."""
    if "audio" not in answered.scores:
        return []
    each = answered.scores["audio"].per_item
    draw = [zlib.crc32(answered.items[row].id.encode()) for row in answered.scored_rows]
    order = sorted(range(len(each)), key=lambda place: (each[place], draw[place]))[:count]
    rows = [(int(answered.scored_rows[place]), float(each[place])) for place in order]
    return [
        Example(
            item=answered.items[row],
            score=value,
            predictions={condition: replies[row] for condition, replies in answered.replies.items()},
        )
        for row, value in rows
    ]


def write_submission(config: EvaluateConfig, source: QuestionSource, answered: AnsweredBenchmark) -> None:
    """Write MMAU's file with `model_output` in every entry that was asked, for its own script or its leaderboard."""
    replies = answered.replies["audio"]
    output = {item.id: reply.text for item, reply in zip(answered.items, replies, strict=True)}
    entries = [
        entry | {"model_output": output[f"mmau/{entry['id']}"]}
        for entry in source.mmau_entries
        if f"mmau/{entry['id']}" in output
    ]
    storage.write_json(storage.join(config.output, SUBMISSION), entries)
