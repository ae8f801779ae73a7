"""Prediction job: answers to questions about many clips, resumable after a kill.

Its output folder contains, as that of every resumable job (`mellow_platform.resumable`), `configuration.json`, answers
and receipts, and `report.json`, written last. `answers/*.parquet` has a row per answer in the order of the questions.

Ray Data decodes in CPU tasks and answers on a pool of actors with engines; the driver sorts answers and writes a part
as soon as it is complete.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from mellow_platform import storage
from mellow_platform.data.audio import AudioError, try_decode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.clip_reader import ClipAddress, read_clips
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.engine_protocol import InferenceEngine
from mellow_platform.inference.predict_config import PredictConfig
from mellow_platform.inference.question_table import TEXT_COLUMNS, QuestionTable, read_question_table
from mellow_platform.inference.request import Request
from mellow_platform.inference.windows import windows
from mellow_platform.model import MellowFeatureExtractor
from mellow_platform.model.folder import load_processor, model_digest
from mellow_platform.progress import Progress
from mellow_platform.resumable import (
    ANSWERS,
    REPORT,
    RETRY_LOST_WORKERS,
    FailureBudget,
    claim,
    dataset_of_parts,
    digest,
    is_finished,
    map_on_actors,
    part_name,
    part_ranges,
    read_receipts,
    write_part,
)

GROUP_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),  # of the first question; the others follow it
        pa.field("uris", pa.list_(pa.string())),
        pa.field("questions", pa.list_(pa.string())),
        pa.field("choices", pa.list_(pa.list_(pa.string()))),
    ]
)
WINDOW_SCHEMA = pa.schema(
    [
        *(GROUP_SCHEMA.field(name) for name in ("row", "questions", "choices")),
        pa.field("clips", pa.list_(pa.list_(pa.large_binary()))),  # one or two per window, as float32
        pa.field("seconds", pa.list_(pa.list_(pa.list_(pa.float64())))),  # start and end of each clip
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("answer", pa.string()),  # null if there is an error
        pa.field("finish_reason", pa.string()),  # stop, length, or choice
        pa.field("tokens", pa.int32()),  # generated, including the end marker; null for choices
        pa.field("heard", pa.list_(pa.struct({"start": pa.float64(), "end": pa.float64()}))),  # seconds of each clip
        pa.field(  # of the choices, most likely first
            "scores",
            pa.list_(pa.struct({"choice": pa.string(), "logprob": pa.float64(), "probability": pa.float64()})),
        ),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("error", pa.string()),  # short name for counts
        pa.field("detail", pa.string()),
    ]
)


def predict(config: PredictConfig) -> dict[str, Any]:
    """Answer the questions of `config`, write answers and report, and return the report; finished parts are kept.

    Raises:
        FileNotFoundError: model, folder or table is missing.
        ValueError: the input is invalid, too many questions failed, or `output` contains other predictions.
    """
    start = time.monotonic()
    questions = read_question_table(config)
    model = storage.local_copy(config.model)
    extractor = load_processor(config.model).feature_extractor
    depends_on = {"fields": config.identity, "input": questions.digest, "model": model_digest(model)}
    claim(config.output, config.identity, digest(depends_on), "predictions", REPORT)
    if is_finished(config.output, REPORT):
        return storage.read_json(storage.join(config.output, REPORT))
    receipts = read_receipts(config.output, ANSWERS)
    remedy = f"Repair the input and delete {config.output}"
    budget = FailureBudget("questions", len(questions), config.max_failed_share, remedy)
    for receipt in receipts.values():
        budget.add(receipt["failed"])
    done = sum(map(itemgetter("questions"), receipts.values()))
    progress = Progress("questions", len(questions), done, budget.failed.total(), rejected_are="failed")
    clips: set[str] = set()
    parts = part_ranges(len(questions), config.rows_per_part)
    missing = {name: rows for name, rows in parts.items() if name not in receipts}
    for receipt in answer_parts(questions, missing, config, extractor, budget):
        receipts[receipt["name"]] = receipt
        clips |= questions.clips(parts[receipt["name"]])
        progress.add(receipt["questions"], sum(receipt["failed"].values()))
    storage.remove_partial(config.output)
    rows, failed = sum(map(itemgetter("rows"), receipts.values())), budget.failed
    seconds = time.monotonic() - start
    report = {
        "output": config.output,
        "questions": len(questions),
        "rows": rows,
        "answered": rows - failed.total(),
        "failed": failed.total(),
        "failed_by_reason": dict(sorted(failed.items())),
        "clips": len(questions.clips(range(len(questions)))),
        # Time of the run that finished the job, and rate of the clips that it decoded.
        "seconds": round(seconds, 1),
        "clips_per_second": round(len(clips) / seconds, 2),
    }
    storage.write_json(storage.join(config.output, REPORT), report)
    return report


def answer_parts(
    questions: QuestionTable,
    parts: dict[str, range],
    config: PredictConfig,
    extractor: MellowFeatureExtractor,
    budget: FailureBudget,
) -> Iterator[dict[str, Any]]:
    """Answer and write parts of the questions, and yield their receipts.

    Raises:
        ValueError: more than the allowed share of the questions failed; raised as soon as that is certain.
        RuntimeError: an answer is missing.
    """
    size = config.rows_per_part
    waiting: dict[int, list[dict[str, Any]]] = {}  # answers by part number
    for answers in answer_groups([questions.groups(rows) for rows in parts.values()], config, extractor):
        for answer in answers:
            waiting.setdefault(answer["row"] // size, []).append(answer)
            if answer["error"]:
                budget.add({answer["error"]: 1}, answer["detail"])
        for number in sorted({answer["row"] // size for answer in answers}):
            answered = sum(answer["window"] == 0 for answer in waiting[number])
            if answered == len(parts[part_name(number)]):
                yield write_answers(part_name(number), waiting.pop(number), questions, config)
    if waiting:
        raise RuntimeError(f"parts {', '.join(map(part_name, sorted(waiting)))}: a question has no answer or several")


def answer_groups(
    parts: list[list[dict[str, Any]]], config: PredictConfig, extractor: MellowFeatureExtractor
) -> Iterator[list[dict[str, Any]]]:
    """Decode and answer groups of questions (`QuestionTable.groups`) on Ray Data; yield answers as they arrive."""
    if not parts:
        return
    dataset = dataset_of_parts([pa.Table.from_pylist(groups, schema=GROUP_SCHEMA) for groups in parts])
    # A decoding task emits blocks of about one actor's batch, however many clips are in a part.
    dataset.context.target_max_block_size = config.batch_size * extractor.clip_samples * np.dtype(np.float32).itemsize
    dataset = dataset.map_batches(
        decode_groups,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"extractor": extractor, "limits": config.limits, "rule": config.window},
        **RETRY_LOST_WORKERS,
    )
    # An actor keeps its CPU to the end: on a cluster with one CPU, none would be left for decoding.
    num_cpus = 0 if ray.cluster_resources().get("CPU") == 1 else None
    yield from map_on_actors(dataset, AnswerGroups, [config], config.workers, config.gpus_per_worker, num_cpus)


def decode_groups(
    groups: pa.Table, extractor: MellowFeatureExtractor, limits: AudioLimits, rule: str
) -> Iterator[pa.Table]:
    """Read and decode the clips of groups of questions; yield the windows of each group (`WINDOW_SCHEMA`).

    Clips of the previous group are reused, so at most four recordings are in memory at a time.
    """
    rows = groups.to_pylist()
    previous = [[], *(row["uris"] for row in rows)]
    new_clips = [
        ClipAddress(uri, "", uri)
        for row, previous_uris in zip(rows, previous, strict=False)
        for uri in dict.fromkeys(row["uris"])
        if uri not in previous_uris
    ]
    files = read_clips(new_clips, limits)
    decoded: dict[str, np.ndarray | AudioError] = {}
    for row in rows:
        decoded = {
            uri: decoded[uri] if uri in decoded else try_decode(next(files)[1], extractor.sampling_rate, limits)
            for uri in dict.fromkeys(row["uris"])
        }
        group = {name: row[name] for name in ("row", "questions", "choices")} | _cut(decoded, row, extractor, rule)
        yield pa.Table.from_pylist([group], schema=WINDOW_SCHEMA)


def _cut(
    decoded: dict[str, np.ndarray | AudioError], row: dict[str, Any], extractor: MellowFeatureExtractor, rule: str
) -> dict[str, Any]:
    """Return the windows of a group's recordings with their seconds, or the error."""
    recordings = []
    for uri in row["uris"]:
        recording = decoded[uri]
        if isinstance(recording, AudioError):
            name = f"clip {uri}: " if len(row["uris"]) > 1 else ""
            return {"clips": [], "seconds": [], "error": recording.reason, "detail": f"{name}{recording}"}
        recordings.append(recording)
    parts = windows(recordings, extractor.clip_samples, extractor.sampling_rate, rule)
    return {
        "clips": [[clip.astype(np.float32).tobytes() for clip in window.clips] for window in parts],
        "seconds": [window.seconds for window in parts],
    }


class AnswerGroups:
    """Ray Data actor that answers groups of questions; several calls run at a time."""

    def __init__(self, config: PredictConfig):
        self.config = config
        self.engine: InferenceEngine = Engine.load_for_batches(
            config.model, dtype=config.dtype, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens
        )

    def __call__(self, groups: pa.Table) -> pa.Table:
        """Return the answers (`ANSWER_SCHEMA`) about windows (`WINDOW_SCHEMA`): one row per question and window."""
        rows: list[dict[str, Any]] = []
        pending_rows, pending_requests = [], []
        for group, clips in zip(groups.drop_columns("clips").to_pylist(), groups["clips"], strict=True):
            window_clips = [
                tuple(np.frombuffer(clip.as_buffer(), np.float32).copy() for clip in window.values)
                for window in clips.values
            ]
            questions = zip(group["questions"], group["choices"], strict=True)
            for number, (question, choices) in enumerate(questions, group["row"]):
                if error := self._error(group, question):
                    rows.append({"row": number, "window": 0} | error)
                    continue
                for window, seconds in enumerate(group["seconds"]):
                    spans = [{"start": start, "end": end} for start, end in seconds]
                    row: dict[str, Any] = {"row": number, "window": window, "heard": spans}
                    rows.append(row)
                    request = self._request(question, window_clips[window], row)
                    if choices:
                        row |= self._score(request, choices)
                    else:
                        pending_rows.append(row)
                        pending_requests.append(request)
        for row, answer in zip(pending_rows, self.engine.generate(pending_requests), strict=True):
            row |= {"answer": answer.text, "finish_reason": answer.finish_reason}
            row |= {"tokens": len(answer.tokens), "logprobs": answer.logprobs}
        return pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA)

    def _error(self, group: dict[str, Any], question: str) -> dict[str, str] | None:
        """Return the error of a question that cannot be answered."""
        if group["error"]:
            return {"error": group["error"], "detail": group["detail"]}
        tokens, limit = self.engine.prompt_tokens(question), self.engine.prompt_length
        if tokens > limit:
            detail = f"the question takes {tokens} tokens, the model reads {limit}: shorten it"
            return {"error": "question_too_long", "detail": detail}
        return None

    def _request(self, question: str, clips: tuple[np.ndarray, ...], row: dict[str, Any]) -> Request:
        config = self.config
        return Request(
            question,
            clips,
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            seed=answer_seed(config.seed, row["row"], row["window"]),
            logprobs=config.logprobs,
        )

    def _score(self, request: Request, choices: list[str]) -> dict[str, Any]:
        scores = self.engine.score(request, choices)
        return {"answer": scores[0].choice, "finish_reason": "choice", "scores": [asdict(score) for score in scores]}


def answer_seed(seed: int, row: int, window: int) -> int:
    """Return the seed of one answer, so that equal questions have different seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row} {window}".encode()).digest()[:4], "big")


def write_answers(
    name: str, answers: list[dict[str, Any]], questions: QuestionTable, config: PredictConfig
) -> dict[str, Any]:
    """Write the answers to a part of the questions; return the part's receipt."""
    table = pa.Table.from_pylist(sorted(answers, key=itemgetter("row", "window")), schema=ANSWER_SCHEMA)
    rows = questions.table.take(table["row"])
    excluded = {"row", "window"}
    excluded |= set() if questions.has("choices") else {"scores"}
    excluded |= set() if config.logprobs else {"logprobs"}
    columns = {column: rows[column] for column in TEXT_COLUMNS if questions.has(column)}
    columns |= {column: table[column] for column in table.column_names if column not in excluded}
    columns |= {column: rows[column] for column in questions.extra_columns}
    receipt = {
        "name": name,
        "questions": len({answer["row"] for answer in answers}),
        "rows": len(answers),
        "failed": dict(Counter(answer["error"] for answer in answers if answer["error"])),
    }
    return write_part(config.output, ANSWERS, name, pa.table(columns), receipt)
