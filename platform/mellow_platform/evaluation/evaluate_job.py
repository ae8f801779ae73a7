"""Evaluation job: answer the questions of benchmarks under each condition, score the answers, write a report.

Conditions: clips (`audio`), Gaussian noise instead of clips (`noise`), no clips (`text_only`: Mellow receives the mean
of many clips, an endpoint the question or also silence), and random answers (`chance`, whose scores are expected values
over the choices of a question). A model that uses its audio is right under `audio`, and near chance otherwise.
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
from mellow_platform.evaluation.collect import claim_output, collect_replies
from mellow_platform.evaluation.comparison import PREDICTIONS, compare, read_baseline
from mellow_platform.evaluation.dataset import BenchmarkItem, QuestionSource
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.evaluation_report import Example, markdown, page
from mellow_platform.evaluation.models import ModelInput, Reply
from mellow_platform.evaluation.scoring import AnsweredBenchmark, score, summarise
from mellow_platform.resumable import REPORT, FailureBudget

SUBMISSION = "mmau.json"
TEXTS = pa.list_(pa.string())
PREDICTION_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("benchmark", "condition", "id")),
        pa.field("clips", TEXTS, nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", TEXTS, nullable=False),
        pa.field("answer", TEXTS, nullable=False),  # reference answers; empty if they are not public
        pa.field("prediction", pa.string(), nullable=False),  # empty on failure
        pa.field("score", pa.float64()),  # 1 or 0; of a description, the score to sort by
        pa.field("seconds", pa.float64()),  # null without a model
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("groups", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Answer and score; write `predictions.parquet`, `report.json`, `report.md` and `report.html`; return the report.

    Raises:
        FileNotFoundError: questions, shards or model do not exist.
        ValueError: a benchmark has no questions, too many questions have no answer, `output` contains other answers, or
            the evaluation `against` contains none of the questions.
        ConnectionError: the endpoint cannot be reached.
    """
    source = QuestionSource(config)
    questions = select(config, source)
    baseline = read_baseline(config, questions)
    # Without duplicates: benchmarks share questions.
    inputs = list(dict.fromkeys(ModelInput(b.prompt(item), item.clips) for b, items in questions for item in items))
    collected = _by_question(collect_replies(config, inputs, source)) if config.runs_model else []
    replies = dict(zip(inputs, collected, strict=config.runs_model))
    answered = [score(b, items, _replies_to(b, items, replies, config)) for b, items in questions]
    for each in answered:
        check_failures(each, config)
    if not config.runs_model:  # claimed only now: a failed run without a model leaves no answers to resume from
        claim_output(config, inputs, "", source)
    report = {
        "model": config.model,
        "split": config.split,
        "records": len(inputs),
        "conditions": list(answered[0].replies),
        "benchmarks": {each.benchmark.name: summarise(each, config) for each in answered},
        **_statistics(answered, config),
        # Questions of all splits that are not in the shards, because their clips cannot be used.
        "dropped": source.manifest.counts["records_dropped"] if source.manifest else 0,
    }
    if config.against:
        report["comparison"] = compare(answered, baseline, config)
    write(config, answered, report)
    for each in answered:
        if isinstance(each.benchmark, MMAU) and "audio" in each.replies:
            write_submission(config, source, each)
    return report


def check_failures(answered: AnsweredBenchmark, config: EvaluateConfig) -> None:
    """Check the share of failed questions per benchmark: a small benchmark may have many, although all have few.

    Raises:
        ValueError: more than the allowed share of a benchmark's questions failed.
    """
    for condition, reasons in answered.without_answer.items():
        items = f"questions of benchmark {answered.benchmark.name} under {condition}"
        detail = next((reply.detail for reply in answered.replies[condition] if reply.error), None)
        FailureBudget(items, len(answered.items), config.max_failed_share, "Repair them").add(reasons, detail)


def _by_question(replies: dict[str, list[Reply]]) -> list[dict[str, Reply]]:
    return [dict(zip(replies, row, strict=True)) for row in zip(*replies.values(), strict=True)]


def _replies_to(
    benchmark: Benchmark,
    items: list[BenchmarkItem],
    collected: dict[ModelInput, dict[str, Reply]],
    config: EvaluateConfig,
) -> dict[str, list[Reply]]:
    """Return the replies to a benchmark's items by condition: the model's collected ones, or a baseline's."""
    replies: dict[str, list[Reply]] = {}
    if config.runs_model:
        for condition in (name for name in config.conditions if name != "chance"):
            pairs = [(item, collected[ModelInput(benchmark.prompt(item), item.clips)][condition]) for item in items]
            replies[condition] = [replace(reply, text=benchmark.reply(item, reply.text)) for item, reply in pairs]
    elif config.model == "random":
        replies["audio"] = draw_answers(items, config.seed)
    elif config.model.startswith("constant:"):
        replies["audio"] = [Reply(config.model.removeprefix("constant:"))] * len(items)
    else:
        replies["audio"] = read_answers(benchmark.name, items, config.model.removeprefix("predictions:"))
    if "chance" in config.conditions:
        replies["chance"] = draw_answers(items, config.seed)
    return replies


def _statistics(answered: Sequence[AnsweredBenchmark], config: EvaluateConfig) -> dict[str, Any]:
    """Return failures, truncations and seconds per answer by condition."""
    # By model input, so that a reply is counted once, even if several benchmarks score it.
    distinct: dict[str, dict[ModelInput | str, Reply]] = {}
    for each in answered:
        questions = [
            ModelInput(each.benchmark.prompt(item), item.clips) if config.runs_model else item.id for item in each.items
        ]
        for condition, replies in each.replies.items():
            distinct.setdefault(condition, {}).update(zip(questions, replies, strict=True))
    counted = {condition: list(replies.values()) for condition, replies in distinct.items()}
    return {
        "no_answer": {name: dict(Counter(r.error for r in replies if r.error)) for name, replies in counted.items()},
        "cut": {name: _cut(replies) for name, replies in counted.items()},
        "seconds_an_answer": {name: _quantiles(replies) for name, replies in counted.items()},
    }


def _cut(replies: Sequence[Reply]) -> dict[str, int]:
    return dict(Counter(reply.detail for reply in replies if reply.detail and not reply.error))


def _quantiles(replies: Sequence[Reply]) -> dict[str, float]:
    """Return quantiles of the seconds per answer; empty if no reply was timed."""
    seconds = [reply.seconds for reply in replies if reply.seconds is not None]
    shares = {"median": 0.5, "p95": 0.95, "max": 1.0} if seconds else {}
    return {name: round(float(np.quantile(seconds, share)), 4) for name, share in shares.items()}


def select(config: EvaluateConfig, source: QuestionSource) -> list[tuple[Benchmark, list[BenchmarkItem]]]:
    """Return the benchmarks in `config` with their questions; `all` selects the benchmarks that have questions.

    Raises:
        ValueError: a benchmark in `config` has no questions, or `all` selects none.
    """
    every = "all" in config.benchmark
    selected = []
    for name in BENCHMARKS if every else dict.fromkeys(config.benchmark):
        benchmark = BENCHMARKS[name]()
        # Only `mmau` needs neither shards nor corpus.
        items = benchmark.records(source) if not every or name == "mmau" or config.shards or config.corpus else []
        if items:
            selected.append((benchmark, items[: config.limit]))
        elif not every:
            families = Counter(item.family for item in source.records) if config.shards or config.corpus else {}
            found = ", ".join(sorted(families)) or "none"
            raise ValueError(
                f"benchmark {name}: split {config.split!r} has no such questions; families in it: {found}"
                + ("; set `mmau`, the benchmark's file" if name == "mmau" else "")
            )
    if not selected:
        raise ValueError(f"split {config.split!r} has no questions of any benchmark")
    return selected


def write(config: EvaluateConfig, answered: Sequence[AnsweredBenchmark], report: dict[str, Any]) -> None:
    """Write the predictions, and the report as JSON, Markdown and HTML."""
    tables = [table for each in answered for table in _predictions(each)]
    storage.write_table(storage.join(config.output, PREDICTIONS), pa.concat_tables(tables))
    storage.write_json(storage.join(config.output, REPORT), report)
    storage.write_bytes(storage.join(config.output, "report.md"), markdown(report).encode())
    examples = {each.benchmark.name: _worst(each, config.examples) for each in answered}
    storage.write_bytes(storage.join(config.output, "report.html"), page(report, examples).encode())


def _predictions(answered: AnsweredBenchmark) -> Iterator[pa.Table]:
    """Yield the answers under each condition (`PREDICTION_SCHEMA`)."""
    items = answered.items
    questions = {
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
        columns = questions | {"condition": [condition] * len(items), "score": scores}
        columns |= {name: [getattr(reply, name) for reply in replies] for name in ("seconds", "error", "detail")}
        columns["prediction"] = [reply.text for reply in replies]
        yield pa.table({field.name: columns[field.name] for field in PREDICTION_SCHEMA}, schema=PREDICTION_SCHEMA)


def _worst(answered: AnsweredBenchmark, count: int) -> list[Example]:
    """Return the questions with the lowest scores with audio; equal scores are in a random but reproducible order."""
    if "audio" not in answered.scores:
        return []
    scores = answered.scores["audio"].per_item
    draws = [zlib.crc32(answered.items[row].id.encode()) for row in answered.scored_rows]
    order = sorted(range(len(scores)), key=lambda index: (scores[index], draws[index]))[:count]
    rows = [(int(answered.scored_rows[index]), float(scores[index])) for index in order]
    return [
        Example(
            item=answered.items[row],
            score=value,
            predictions={condition: replies[row] for condition, replies in answered.replies.items()},
        )
        for row, value in rows
    ]


def write_submission(config: EvaluateConfig, source: QuestionSource, answered: AnsweredBenchmark) -> None:
    """Write MMAU's entries with `model_output` added, for its script and leaderboard; other questions are omitted."""
    replies = answered.replies["audio"]
    output = {item.id: reply.text for item, reply in zip(answered.items, replies, strict=True)}
    entries = [
        entry | {"model_output": output[f"mmau/{entry['id']}"]}
        for entry in source.mmau_entries
        if f"mmau/{entry['id']}" in output
    ]
    storage.write_json(storage.join(config.output, SUBMISSION), entries)
