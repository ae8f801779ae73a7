"""Replies of a model to the questions of benchmarks, collected on Ray Data in parts that a resumed job skips.

A part (`mellow_platform.resumable`) is a range of the questions under one condition, so that a further condition is
answered without repeating the others.
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

ANSWERS, REPORT = "answers", "report.json"
SERVED = "served_model"  # the field in configuration.json for what an endpoint calls its model
CLIPS_OF_THE_MEAN = 64  # clips whose mean is the input under the condition text_only

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
    """Return a model's replies to all questions, in order, by condition; questions that have a reply are skipped.

    Raises:
        ValueError: under a condition more than the allowed share of the questions failed, the shards were written by
            another encoder, or `output` contains other answers.
        ConnectionError: the endpoint cannot be reached; its answers are kept for the next run.
    """
    conditions = [name for name in config.conditions if name != "chance"]
    # Questions about the same clips are neighbours: their clips are read once, and found in the engine's caches.
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
    done = {name: each for name, each in read_receipts(config.output, ANSWERS).items() if name in parts}
    works = any(receipt["questions"] > sum(receipt["failed"].values()) for receipt in done.values())
    if len(done) < len(parts) or any(
        budget.is_exceeded for budget in _budgets(done, conditions, table, config).values()
    ):
        # Questions that an endpoint did not answer are retried, but not those of a finished job.
        done = {name: receipt for name, receipt in done.items() if UNANSWERED not in receipt["failed"]}
    budgets = _budgets(done, conditions, table, config)
    for condition, budget in budgets.items():
        details = (each["first"] for each in done.values() if each["condition"] == condition and each["first"])
        budget.add({}, next(details, None))
    progress = Progress(
        "questions",
        len(table) * len(conditions),
        sum(receipt["questions"] for receipt in done.values()),
        rejected_are="without an answer",
    )
    missing = [{"name": name} | part for name, part in parts.items() if name not in done]
    clips = list(dict.fromkeys(clip for question in questions for clip in question.clips))[:CLIPS_OF_THE_MEAN]
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
    """Return by condition how many questions of finished parts failed, against the share that may."""
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
    """Return what the endpoint calls the model that is judged: by configuration, as it did before, or as it says.

    Raises:
        ConnectionError: it does not say.
    """
    if config.endpoint.model:
        return config.endpoint.model
    known = claimed_options(config.output)
    return known[SERVED] if known.get("model") == config.model and SERVED in known else first_served_model(config, key)


def _model_digest(config: EvaluateConfig, source: QuestionSource) -> str:
    """Return the SHA-256 of the model's folder, having made sure that its encoder wrote the shards.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: another encoder wrote them.
    """
    if not storage.exists(config.model):
        raise FileNotFoundError(
            f"model {config.model}: no such folder, and no address (http://...), constant:TEXT, random or "
            "predictions:FILE"
        )
    if source.manifest and source.manifest.encoder != encoder_digest(load_encoder(config.model)):
        raise ValueError(
            f"{config.shards} was written by an encoder with other weights than {config.model} has: give shards of its "
            "own (jobs/preprocess.py --encoder), or `corpus` with `audio_root`"
        )
    return model_digest(storage.local_copy(config.model))


def claim_output(config: EvaluateConfig, questions: Sequence[ModelInput], model: str, source: QuestionSource) -> None:
    """Reserve `output` for the answers of `model` to these questions.

    Raises:
        ValueError: it contains other answers.
    """
    content = hashlib.sha256()
    for question in questions:
        content.update(json.dumps(asdict(question)).encode())
    depends_on = config.identity | {
        # Covers `benchmark`, `limit`, and the files of questions and clips.
        "questions": content.hexdigest(),
        "shards": source.manifest.content_hash if source.manifest else None,
        SERVED if config.is_remote else "weights": model,
    }
    claim(config.output, depends_on, digest(depends_on), "answers", REPORT)


def _answer_parts(
    config: EvaluateConfig,
    questions: pa.Table,
    parts: list[dict[str, Any]],
    clips: Sequence[str],
    key: SecretStr,
    model: str,
    works: bool,
) -> Iterator[dict[str, Any]]:
    """Answer and write parts, and yield their receipts as they arrive."""
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
        before = storage.read_tables([uri]).to_pylist() if storage.exists(uri) else []
        known = {answer["row"]: answer for answer in before if answer["error"] != UNANSWERED}
        open_rows = [row for row in rows if row["row"] not in known]
        replies = self.answerer.answer([ModelInput(row["prompt"], tuple(row["clips"])) for row in open_rows], condition)
        known |= {
            row["row"]: {"row": row["row"]} | asdict(reply) for row, reply in zip(open_rows, replies, strict=True)
        }
        answers = [known[row["row"]] for row in rows]
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
