"""Asking on Ray Data: answers to fixed ranges of the questions, each written as a whole, so that a killed job goes on.

The output folder gets

    configuration.json     what is asked, of which model; written first
    answers/*.parquet      a row an answer; each file is a range of the questions under one condition, so that another
                           condition is asked for without asking the others again
    receipts/answers/      one JSON file a part, written after it: the part is done
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from pydantic import SecretStr

from mellow_platform import storage
from mellow_platform.config import EvaluateConfig
from mellow_platform.data import shards
from mellow_platform.evaluation.dataset import QuestionSource
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
from mellow_platform.inference.predict_job import model_digest
from mellow_platform.model import encoder_digest, load_encoder
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.progress import Progress

ANSWERS = "answers"
SERVED = "served_model"  # the field in configuration.json for what an endpoint calls its model
# Parts that an actor answers at the same time: while the last answers of one are written, slots of the engine would
# stand empty.
PARTS_AT_ONCE = 2
# Clips, the first that are asked about, whose mean stands for any of them where a model hears nothing.
CLIPS_OF_THE_MEAN = 64

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("seconds", pa.float64()),
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def listen(config: EvaluateConfig, asked: Sequence[ModelInput], source: QuestionSource) -> dict[str, list[Reply]]:
    """Return a model's replies to every question, in order, by condition; what is answered already is not asked again.

    Raises:
        ValueError: under a condition more than the allowed share of the questions has no answer, the shards were
            written by another encoder, or `output` holds other answers.
        ConnectionError: the endpoint cannot be asked; what it has answered is kept for the next run.
    """
    conditions = [name for name in config.conditions if name != "chance"]
    # Questions about the same clips stand together: they are read once, and found in the engine's caches.
    order = sorted(range(len(asked)), key=lambda row: (asked[row].clips, row))
    columns = {"row": order, "prompt": [asked[row].prompt for row in order]}
    questions = pa.table(columns | {"clips": [list(asked[row].clips) for row in order]})
    key = endpoint_key()
    model = _served_model(config, key) if config.is_remote else _model_of(config, source)
    claim(config, asked, model, source)
    parts = {
        f"{_asked_under(condition, config)}-{start // config.rows_per_part:06d}": {
            "condition": condition,
            "start": start,
        }
        for condition in conditions
        for start in range(0, len(questions), config.rows_per_part)
    }
    done = {name: each for name, each in shards.receipts(config.output, ANSWERS).items() if name in parts}
    works = any(receipt["questions"] > sum(receipt["failed"].values()) for receipt in done.values())
    if len(done) < len(parts) or any(are_too_many(own, len(asked), config) for own in _failed(done).values()):
        # What an endpoint did not answer may be had now; of a job that is done it is left as it is.
        done = {name: receipt for name, receipt in done.items() if UNANSWERED not in receipt["failed"]}
    there = sum(receipt["questions"] for receipt in done.values())
    progress = Progress("questions", len(asked) * len(conditions), there, rejected_are="without an answer")
    missing = [{"name": name} | part for name, part in parts.items() if name not in done]
    clips = list(dict.fromkeys(clip for question in asked for clip in question.clips))[:CLIPS_OF_THE_MEAN]
    failed = _failed(done)
    for receipt in _answer_parts(config, questions, missing, clips, key, model, works):
        progress.add(receipt["questions"], sum(receipt["failed"].values()))
        failed[receipt["condition"]].update(receipt["failed"])
        stop_if_too_many(failed[receipt["condition"]], receipt["first"], len(asked), config)
    for condition, counts in failed.items():
        first = next((each["first"] for each in done.values() if each["condition"] == condition and each["first"]), "")
        stop_if_too_many(counts, first, len(asked), config)
    storage.remove_partial(config.output)
    return {
        condition: _read(config, [name for name, part in parts.items() if part["condition"] == condition])
        for condition in conditions
    }


def _asked_under(condition: str, config: EvaluateConfig) -> str:
    """Return the name of a condition with what it depends on besides the questions, for its files."""
    return f"{condition}-{config.endpoint.text_only}" if config.is_remote and condition == "text_only" else condition


def _failed(receipts: dict[str, dict[str, Any]]) -> defaultdict[str, Counter[str]]:
    """Return how many questions of parts have no answer, by condition and reason."""
    failed: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for receipt in receipts.values():
        failed[receipt["condition"]].update(receipt["failed"])
    return failed


def _served_model(config: EvaluateConfig, key: SecretStr) -> str:
    """Return what the endpoint calls the model that is judged: by configuration, as it did before, or as it says.

    Raises:
        ConnectionError: it does not say.
    """
    if config.endpoint.model:
        return config.endpoint.model
    known = shards.claimed(config.output)
    return known[SERVED] if known.get("model") == config.model and SERVED in known else first_served_model(config, key)


def _model_of(config: EvaluateConfig, source: QuestionSource) -> str:
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


def claim(config: EvaluateConfig, asked: Sequence[ModelInput], model: str, source: QuestionSource) -> None:
    """Make `output` the folder of what `model` answers to these questions, or make sure that it is.

    Raises:
        ValueError: it holds others.
    """
    questions = hashlib.sha256()
    for question in asked:
        questions.update(json.dumps(asdict(question)).encode())
    depends_on = config.shaping | {
        # By `benchmark`, `limit`, and the files that they and their clips come from.
        "questions": questions.hexdigest(),
        "shards": source.manifest.content_hash if source.manifest else None,
        SERVED if config.is_remote else "weights": model,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    shards.claim(config.output, depends_on, digest, holds="answers")


def _answer_parts(
    config: EvaluateConfig,
    questions: pa.Table,
    parts: list[dict[str, Any]],
    clips: Sequence[str],
    key: SecretStr,
    model: str,
    works: bool,
) -> Iterator[dict[str, Any]]:
    """Have parts answered and written, and yield their receipts as they come."""
    if not parts:
        return
    store = ray.put(FeatureStore.load(config.shards, _clips_of(questions))) if config.shards else None
    dataset = ray.data.from_items(parts, override_num_blocks=len(parts))
    dataset.context.enable_progress_bars = False  # the job prints lines of its own, for a log
    written = dataset.map_batches(
        AnswerQuestions,
        fn_constructor_args=(config, ray.put(questions), store, clips, key, model, works),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=config.workers,
            max_concurrent_calls_per_actor=PARTS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_gpus=config.gpus_per_worker or None,
    )
    for row in written.iter_rows():
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
        """Answer what of one part has no answer yet, write it, and return its receipt."""
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
        return shards.write_shard(self.config.output, ANSWERS, name, table, receipt)


def stop_if_too_many(failed: Counter[str], detail: str | None, questions: int, config: EvaluateConfig) -> None:
    """Raise ValueError, with the reason of one in words, where more than the allowed share has no answer."""
    if not are_too_many(failed, questions, config):
        return
    clips = failed.keys() - {UNANSWERED}
    mend = f"mend that and delete {config.output}" if clips else "submit the job again to ask those again"
    since = f", one since {detail}" if detail else ""
    raise ValueError(
        f"{failed.total()} of {questions} questions have no answer ({in_words(failed)}) so far{since}; {mend}, "
        f"or raise max_failed_share (now {config.max_failed_share:g})"
    )


def are_too_many(failed: Counter[str], questions: int, config: EvaluateConfig) -> bool:
    return failed.total() > config.max_failed_share * questions


def in_words(failed: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(failed.items()))


def _clips_of(questions: pa.Table) -> list[str]:
    return pa.compute.unique(questions["clips"].combine_chunks().flatten()).to_pylist()


def _read(config: EvaluateConfig, parts: list[str]) -> list[Reply]:
    """Return the replies of one condition in the order of the questions."""
    uris = [storage.join(config.output, ANSWERS, f"{name}.parquet") for name in parts]
    rows = storage.read_tables(uris).sort_by("row").drop_columns("row").to_pylist()
    return [Reply(**row) for row in rows]
