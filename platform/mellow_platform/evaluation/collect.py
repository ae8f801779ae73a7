"""Replies of a model to the questions of benchmarks, collected on Ray Data in parts that a resumed job skips.

A part (`mellow_platform.resumable`) is a range of the questions under one condition, so that a condition can be added
later without repeating the others. Questions that an endpoint left unanswered are retried until the job is finished.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from pydantic import SecretStr

from mellow_platform import storage
from mellow_platform.evaluation.dataset import QuestionSource
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.models import (
    UNANSWERED,
    EvaluatedModel,
    LocalModel,
    ModelInput,
    RemoteModel,
    Reply,
    endpoint_key,
    first_served_model,
)
from mellow_platform.model import encoder_digest, load_encoder
from mellow_platform.model.folder import model_digest
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.progress import Progress
from mellow_platform.resumable import (
    ANSWERS,
    REPORT,
    FailureBudget,
    claim,
    claimed_options,
    dataset_of_parts,
    digest,
    map_on_actors,
    part_ranges,
    read_receipts,
    write_part,
)

SERVED = "served_model"  # field in configuration.json: name of the model at the endpoint
MEAN_CLIPS = 64  # clips whose mean is the input under the condition text_only

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("seconds", pa.float64()),
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def collect_replies(
    config: EvaluateConfig, questions: Sequence[ModelInput], source: QuestionSource
) -> dict[str, list[Reply]]:
    """Return a model's replies to all questions, in order, by condition; answered questions are not repeated.

    Raises:
        ValueError: more than the allowed share of the questions under a condition failed, the shards were written by
            another encoder, or `output` contains other answers.
        ConnectionError: the endpoint cannot be reached; its answers are kept for the next run.
    """
    conditions = [name for name in config.conditions if name != "chance"]
    # Sorted by clips, so that the clips of neighbouring questions are read once and are in the engine's caches.
    order = sorted(range(len(questions)), key=lambda row: (questions[row].clips, row))
    columns = {"row": order, "prompt": [questions[row].prompt for row in order]}
    table = pa.table(columns | {"clips": [list(questions[row].clips) for row in order]})
    key = endpoint_key()
    model = _served_model(config, key) if config.is_remote else _model_digest(config, source)
    claim_output(config, questions, model, source)
    ranges = part_ranges(len(table), config.rows_per_part)
    parts = {
        f"{_file_prefix(condition, config)}-{name}": {"condition": condition, "start": rows.start}
        for condition in conditions
        for name, rows in ranges.items()
    }
    finished = {name: each for name, each in read_receipts(config.output, ANSWERS).items() if name in parts}
    works = any(receipt["questions"] > sum(receipt["failed"].values()) for receipt in finished.values())
    budgets = _budgets(finished, conditions, table, config)
    if len(finished) < len(parts) or any(budget.is_exceeded for budget in budgets.values()):
        # Questions that an endpoint did not answer are retried, except those of a finished job.
        finished = {name: receipt for name, receipt in finished.items() if UNANSWERED not in receipt["failed"]}
        budgets = _budgets(finished, conditions, table, config)
    for condition, budget in budgets.items():
        details = (each["first"] for each in finished.values() if each["condition"] == condition and each["first"])
        budget.add({}, next(details, None))
    progress = Progress(
        "questions",
        len(table) * len(conditions),
        sum(receipt["questions"] for receipt in finished.values()),
        rejected_are="without an answer",
    )
    missing = [{"name": name} | part for name, part in parts.items() if name not in finished]
    clips = list(dict.fromkeys(clip for question in questions for clip in question.clips))[:MEAN_CLIPS]
    for receipt in _answer_parts(config, table, missing, clips, key, model, works):
        progress.add(receipt["questions"], sum(receipt["failed"].values()))
        budgets[receipt["condition"]].add(receipt["failed"], receipt["first"])
    storage.remove_partial(config.output)
    return {
        condition: _read(config, [name for name, part in parts.items() if part["condition"] == condition])
        for condition in conditions
    }


def _budgets(
    receipts: dict[str, dict[str, Any]], conditions: Sequence[str], questions: pa.Table, config: EvaluateConfig
) -> dict[str, FailureBudget]:
    """Return the failure budget of each condition, with the failed questions of finished parts."""
    remedy = f"Submit the job again to retry unanswered questions; repair unusable clips and delete {config.output}"
    budgets = {
        condition: FailureBudget(f"questions under {condition}", len(questions), config.max_failed_share, remedy)
        for condition in conditions
    }
    for receipt in receipts.values():
        budgets[receipt["condition"]].failed.update(receipt["failed"])
    return budgets


def _file_prefix(condition: str, config: EvaluateConfig) -> str:
    """Return the prefix of a condition's files, with the option that its answers depend on."""
    return f"{condition}-{config.endpoint.text_only}" if config.is_remote and condition == "text_only" else condition


def _served_model(config: EvaluateConfig, key: SecretStr) -> str:
    """Return the name of the model at the endpoint: from the options, an earlier run's claim, or the endpoint's list.

    Raises:
        ConnectionError: the endpoint does not list its models.
    """
    if config.endpoint.model:
        return config.endpoint.model
    claimed = claimed_options(config.output)
    has_name = claimed.get("model") == config.model and SERVED in claimed
    return claimed[SERVED] if has_name else first_served_model(config, key)


def _model_digest(config: EvaluateConfig, source: QuestionSource) -> str:
    """Return the SHA-256 of the model folder, after a check that its encoder wrote the shards.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: another encoder wrote the shards.
    """
    if not storage.exists(config.model):
        raise FileNotFoundError(
            f"model {config.model}: no such folder; expected a folder, a URL (http://...), constant:TEXT, random or "
            "predictions:FILE"
        )
    if source.manifest and source.manifest.encoder != encoder_digest(load_encoder(config.model)):
        raise ValueError(
            f"{config.shards} was written by another encoder than that of {config.model}; set shards of this encoder "
            "(jobs/preprocess.py --encoder), or `corpus` with `audio_root`"
        )
    return model_digest(storage.local_copy(config.model))


def claim_output(config: EvaluateConfig, questions: Sequence[ModelInput], model: str, source: QuestionSource) -> None:
    """Claim `output` for the answers of `model` to these questions.

    `model` is its name at the endpoint or the SHA-256 of its folder; empty for baselines.

    Raises:
        ValueError: `output` contains other answers.
    """
    content = hashlib.sha256()
    for question in questions:
        content.update(json.dumps(asdict(question)).encode())
    options = config.identity | {
        # Covers `benchmark`, `limit`, the text of questions and the keys of clips.
        "questions": content.hexdigest(),
        "shards": source.manifest.content_hash if source.manifest else None,
        SERVED if config.is_remote else "weights": model,
    }
    claim(config.output, options, digest(options), "answers", REPORT)


def _answer_parts(
    config: EvaluateConfig,
    questions: pa.Table,
    parts: list[dict[str, Any]],
    clips: Sequence[str],
    key: SecretStr,
    model: str,
    works: bool,
) -> Iterator[dict[str, Any]]:
    """Answer and write parts; yield their receipts as they arrive."""
    if not parts:
        return
    store = ray.put(FeatureStore.load(config.shards, _clips_of(questions))) if config.shards else None
    dataset = dataset_of_parts([pa.Table.from_pylist([part]) for part in parts])
    arguments = (config, ray.put(questions), store, clips, key, model, works)
    for rows in map_on_actors(dataset, AnswerQuestions, arguments, config.workers, config.gpus_per_worker):
        for row in rows:
            yield json.loads(row["receipt"])


class AnswerQuestions:
    """Ray Data actor that answers ranges of the questions and writes them."""

    def __init__(
        self,
        config: EvaluateConfig,
        questions: ray.ObjectRef,
        store: ray.ObjectRef | None,
        clips: Sequence[str],
        key: SecretStr,
        model: str,
        works: bool,
    ):
        self.config = config
        self.questions: pa.Table = ray.get(questions)
        self.answerer: EvaluatedModel = (
            RemoteModel(config, key, model, works)
            if config.is_remote
            else LocalModel(config, ray.get(store) if store else None, clips)
        )

    def __call__(self, parts: pa.Table) -> pa.Table:
        receipts = [json.dumps(self._write(**part)) for part in parts.to_pylist()]
        return pa.table({"receipt": pa.array(receipts, pa.string())})

    def _write(self, name: str, condition: str, start: int) -> dict[str, Any]:
        """Answer the questions of a part that have no answer yet, write the part, and return its receipt."""
        rows = self.questions.slice(start, self.config.rows_per_part).to_pylist()
        uri = storage.join(self.config.output, ANSWERS, f"{name}.parquet")
        existing = storage.read_tables([uri]).to_pylist() if storage.exists(uri) else []
        by_row = {answer["row"]: answer for answer in existing if answer["error"] != UNANSWERED}
        missing = [row for row in rows if row["row"] not in by_row]
        replies = self.answerer.answer([ModelInput(row["prompt"], tuple(row["clips"])) for row in missing], condition)
        by_row |= {row["row"]: {"row": row["row"]} | asdict(reply) for row, reply in zip(missing, replies, strict=True)}
        answers = [by_row[row["row"]] for row in rows]
        receipt = {
            "condition": condition,
            "questions": len(rows),
            "failed": dict(Counter(answer["error"] for answer in answers if answer["error"])),
            "first": next((answer["detail"] for answer in answers if answer["error"]), None),
        }
        table = pa.Table.from_pylist(answers, schema=ANSWER_SCHEMA)
        return write_part(self.config.output, ANSWERS, name, table, receipt)


def _clips_of(questions: pa.Table) -> list[str]:
    return pa.compute.unique(questions["clips"].combine_chunks().flatten()).to_pylist()


def _read(config: EvaluateConfig, parts: list[str]) -> list[Reply]:
    """Return the replies of one condition in the order of the questions."""
    uris = [storage.join(config.output, ANSWERS, f"{name}.parquet") for name in parts]
    rows = storage.read_tables(uris).sort_by("row").drop_columns("row").to_pylist()
    return [Reply(**row) for row in rows]
