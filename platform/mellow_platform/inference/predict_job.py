"""The prediction job: questions about many clips to a folder of answers, however often it is killed and started again.

The folder gets

    configuration.json     what is asked, of which model; written first
    answers/*.parquet      a row per answer, in the order of the question table; each file is a fixed range of questions
    receipts/answers/      one JSON file a part, written after it: the part is done
    report.json            written last

Ray Data decodes in CPU tasks and answers in a pool of actors that hold the engine; the driver puts answers in order
and writes a part as soon as it is whole. What is in a part depends on nothing but configuration and input, so a job
that was killed goes on with the parts that have no receipt.

`ray.data.checkpoint.CheckpointConfig` of Ray 2.60 is not used, for the reasons that `data.shards` gives and three more.
It leaves rows out behind a Read operator only, and those about one clip are to stay together. A row is known by an id
that no other output row may have, and a question has as many answers as the window rule hears windows. And it keeps ids
alone, where failures of all runs are to be counted, and deletes these with the end of a run, so that a finished job
would do everything again.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from mellow_platform import storage
from mellow_platform.config import PredictConfig
from mellow_platform.data import shards
from mellow_platform.data.audio import AudioError, Limits, decode
from mellow_platform.data.clip_reader import ClipAddress, read_clips
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.engine_protocol import InferenceEngine
from mellow_platform.inference.question_table import TEXT_COLUMNS, QuestionTable, read_question_table
from mellow_platform.inference.request import Request
from mellow_platform.inference.windows import windows
from mellow_platform.model import MellowFeatureExtractor
from mellow_platform.model.card import CARD
from mellow_platform.model.folder import load_processor
from mellow_platform.preprocessing.clip_shards import RETRIED
from mellow_platform.progress import Progress

ANSWERS, REPORT = "answers", "report.json"
# Blocks that an actor answers at the same time: while the last answers of one are written, slots of the engine would
# stand empty.
BLOCKS_AT_ONCE = 2

GROUP_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),  # of the first question; the others follow it
        pa.field("uris", pa.list_(pa.string())),
        pa.field("questions", pa.list_(pa.string())),
        pa.field("choices", pa.list_(pa.list_(pa.string()))),
    ]
)
HEARD_SCHEMA = pa.schema(
    [
        *(GROUP_SCHEMA.field(name) for name in ("row", "questions", "choices")),
        pa.field("clips", pa.list_(pa.list_(pa.large_binary()))),  # one or two of each window, as float32
        pa.field("seconds", pa.list_(pa.list_(pa.list_(pa.float64())))),  # start and end of each of these
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("answer", pa.string()),  # null where there is an error
        pa.field("finish_reason", pa.string()),  # stop, length, or choice
        pa.field("tokens", pa.int32()),  # written, the end marker included; null of a choice
        pa.field("heard", pa.list_(pa.struct({"start": pa.float64(), "end": pa.float64()}))),  # seconds of each clip
        pa.field(  # of the choices, the likeliest first
            "scores",
            pa.list_(pa.struct({"choice": pa.string(), "logprob": pa.float64(), "probability": pa.float64()})),
        ),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("error", pa.string()),  # short name to count by
        pa.field("detail", pa.string()),
    ]
)


def predict(config: PredictConfig) -> dict[str, Any]:
    """Answer what `config` asks, write answers and report, and return the report; what is done is left as it is.

    Raises:
        FileNotFoundError: model, folder or table is absent.
        ValueError: the input cannot be asked, too many questions have no answer, or `output` holds other predictions.
    """
    begun = time.monotonic()
    asked = read_question_table(config)
    model = storage.local_copy(config.model)
    extractor = load_processor(config.model).feature_extractor
    depends_on = {"fields": config.shaping, "input": asked.digest, "model": model_digest(model)}
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    shards.claim(config.output, config.shaping, digest, holds="predictions")
    if storage.exists(storage.join(config.output, REPORT)):
        print(f"{config.output} is finished: nothing to do", flush=True)
        return storage.read_json(storage.join(config.output, REPORT))
    receipts = list(shards.receipts(config.output, ANSWERS).values())
    progress = Progress("questions", len(asked), sum(map(itemgetter("questions"), receipts)), rejected_are="failed")
    progress.rejected = count_failed(receipts).total()
    clips: set[str] = set()
    for receipt in answer_parts(asked, receipts, config, extractor):
        receipts.append(receipt)
        start = int(receipt["name"]) * config.rows_per_part
        clips |= asked.clips(start, start + config.rows_per_part)
        progress.add(receipt["questions"], sum(receipt["failed"].values()))
    storage.remove_partial(config.output)
    failed, rows = count_failed(receipts), sum(map(itemgetter("rows"), receipts))
    seconds = time.monotonic() - begun
    report = {
        "output": config.output,
        "questions": len(asked),
        "rows": rows,
        "answered": rows - failed.total(),
        "failed": failed.total(),
        "failed_by_reason": dict(sorted(failed.items())),
        "clips": len(asked.clips(0, len(asked))),
        # Of the run that finished the job, and the clips that it heard:
        "seconds": round(seconds, 1),
        "clips_per_second": round(len(clips) / seconds, 2),
    }
    storage.write_json(storage.join(config.output, REPORT), report)
    return report


def model_digest(folder: Path) -> str:
    """Return the SHA-256 of what is in a model's folder, but for its card."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CARD)
    lines = "".join(f"{file.relative_to(folder)} {storage.sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def answer_parts(
    asked: QuestionTable, done: list[dict[str, Any]], config: PredictConfig, extractor: MellowFeatureExtractor
) -> Iterator[dict[str, Any]]:
    """Write the parts that have no receipt among those `done`, and yield their receipts.

    Raises:
        ValueError: more than the allowed share of the questions has no answer; raised as soon as that is sure.
        RuntimeError: an answer is missing.
    """
    size = config.rows_per_part
    failed = count_failed(done)
    stop_if_too_many(failed, len(asked), config)
    names = {receipt["name"] for receipt in done}
    starts = [start for start in range(0, len(asked), size) if part_name(start // size) not in names]
    waiting: dict[int, list[dict[str, Any]]] = {}  # answers by the number of their part
    for answers in answer_groups([asked.groups(start, start + size) for start in starts], config, extractor):
        for answer in answers:
            waiting.setdefault(answer["row"] // size, []).append(answer)
            if answer["error"]:
                failed[answer["error"]] += 1
                stop_if_too_many(failed, len(asked), config, answer["detail"])
        for number in sorted({answer["row"] // size for answer in answers}):
            answered = sum(answer["window"] == 0 for answer in waiting[number])
            if answered == min(size, len(asked) - number * size):
                yield write_part(number, waiting.pop(number), asked, config)
    if waiting:
        raise RuntimeError(f"parts {', '.join(map(part_name, sorted(waiting)))}: not every question has one answer")


def count_failed(receipts: list[dict[str, Any]]) -> Counter[str]:
    """Return how many questions have no answer, by reason."""
    return sum((Counter(receipt["failed"]) for receipt in receipts), Counter())


def part_name(number: int) -> str:
    return f"{number:06d}"


def stop_if_too_many(failed: Counter[str], questions: int, config: PredictConfig, last: str = "") -> None:
    if failed.total() <= config.max_failed_share * questions:
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(failed.items()))
    raise ValueError(
        f"{failed.total()} of {questions} questions have no answer ({counts}) so far{last and f', the last: {last}'}; "
        f"mend them and delete {config.output}, or raise max_failed_share (now {config.max_failed_share:g})"
    )


def answer_groups(
    parts: list[list[dict[str, Any]]], config: PredictConfig, extractor: MellowFeatureExtractor
) -> Iterator[list[dict[str, Any]]]:
    """Decode and answer groups of questions (`QuestionTable.groups`) on Ray Data; yield answers as they come."""
    if not parts:
        return
    tables = [pa.Table.from_pylist(groups, schema=GROUP_SCHEMA) for groups in parts]
    dataset = ray.data.from_arrow(tables)
    dataset.context.enable_progress_bars = False  # the job prints lines of its own, for a log
    # What a task hands on: about as much as an actor answers at once, however many clips are in a part.
    dataset.context.target_max_block_size = config.batch_size * extractor.clip_samples * np.dtype(np.float32).itemsize
    dataset = dataset.map_batches(
        decode_groups,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"extractor": extractor, "limits": Limits(**config.limits.model_dump()), "rule": config.window},
        **RETRIED,
    )
    dataset = dataset.map_batches(
        AnswerGroups,
        fn_constructor_args=(config,),
        batch_size=None,
        batch_format="pyarrow",
        # Of a fixed number Ray starts all, and where they take every CPU decoding waits for them, and they for it.
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=config.workers,
            max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        # An actor keeps its CPU to the end: of a cluster's only one, nothing would be left to decode with.
        num_cpus=0 if ray.cluster_resources().get("CPU") == 1 else None,
        num_gpus=config.gpus_per_worker or None,
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield batch.to_pylist()


def decode_groups(groups: pa.Table, extractor: MellowFeatureExtractor, limits: Limits, rule: str) -> Iterator[pa.Table]:
    """Read and decode the clips of groups of questions; yield what is heard of each (`HEARD_SCHEMA`).

    A clip that the group before has too is taken over from there: no more than four recordings are held at a time.
    """
    rows = groups.to_pylist()
    before = [[], *(row["uris"] for row in rows)]
    fresh = [
        ClipAddress(uri, "", uri)
        for row, known in zip(rows, before, strict=False)
        for uri in dict.fromkeys(row["uris"])
        if uri not in known
    ]
    files = read_clips(fresh, limits)
    decoded: dict[str, np.ndarray | AudioError] = {}
    for row in rows:
        decoded = {
            uri: decoded[uri] if uri in decoded else decode_or_reason(next(files)[1], extractor.sampling_rate, limits)
            for uri in dict.fromkeys(row["uris"])
        }
        heard = {name: row[name] for name in ("row", "questions", "choices")} | _heard(decoded, row, extractor, rule)
        yield pa.Table.from_pylist([heard], schema=HEARD_SCHEMA)


def decode_or_reason(data: bytes | AudioError, rate: int, limits: Limits) -> np.ndarray | AudioError:
    """Return a recording's waveform [samples] at `rate` Hz, or why there is none."""
    if isinstance(data, AudioError):
        return data
    try:
        waveform = decode(data, rate, limits)
    except AudioError as error:
        return error
    return waveform if len(waveform) else AudioError("no_samples", f"0 samples are left at {rate} Hz")


def _heard(
    decoded: dict[str, np.ndarray | AudioError], row: dict[str, Any], extractor: MellowFeatureExtractor, rule: str
) -> dict[str, Any]:
    """Return the windows of a group's recordings with their seconds, or why there are none."""
    recordings = []
    for uri in row["uris"]:
        recording = decoded[uri]
        if isinstance(recording, AudioError):
            which = f"clip {uri}: " if len(row["uris"]) > 1 else ""
            return {"clips": [], "seconds": [], "error": recording.reason, "detail": f"{which}{recording}"}
        recordings.append(recording)
    heard = windows(recordings, extractor.clip_samples, extractor.sampling_rate, rule)
    return {
        "clips": [[clip.astype(np.float32).tobytes() for clip in window.clips] for window in heard],
        "seconds": [window.seconds for window in heard],
    }


class AnswerGroups:
    """Ray Data actor that answers groups of questions; several of its calls run at a time."""

    def __init__(self, config: PredictConfig):
        self.config = config
        self.engine: InferenceEngine = Engine.load(
            config.model,
            dtype=config.dtype,
            slots=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            max_waiting=config.batch_size,
            cpu_threads=1,
        )

    def __call__(self, groups: pa.Table) -> pa.Table:
        """Return the answers (`ANSWER_SCHEMA`) to what was heard (`HEARD_SCHEMA`): a row a question and window."""
        rows: list[dict[str, Any]] = []
        open_rows, open_requests = [], []
        for group, clips in zip(groups.drop_columns("clips").to_pylist(), groups["clips"], strict=True):
            heard = [
                tuple(np.frombuffer(clip.as_buffer(), np.float32).copy() for clip in window.values)
                for window in clips.values
            ]
            asked = zip(group["questions"], group["choices"], strict=True)
            for number, (question, choices) in enumerate(asked, group["row"]):
                if error := self._refusal(group, question):
                    rows.append({"row": number, "window": 0} | error)
                    continue
                for window, seconds in enumerate(group["seconds"]):
                    spans = [{"start": start, "end": end} for start, end in seconds]
                    row: dict[str, Any] = {"row": number, "window": window, "heard": spans}
                    rows.append(row)
                    request = self._request(question, heard[window], row)
                    if choices:
                        row |= self._scored(request, choices)
                    else:
                        open_rows.append(row)
                        open_requests.append(request)
        for row, answer in zip(open_rows, self.engine.generate(open_requests), strict=True):
            row |= {"answer": answer.text, "finish_reason": answer.finish_reason}
            row |= {"tokens": len(answer.tokens), "logprobs": answer.logprobs}
        return pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA)

    def _refusal(self, group: dict[str, Any], question: str) -> dict[str, str] | None:
        """Return why a question cannot be asked, if so."""
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
            seed=draw_seed(config.seed, row["row"], row["window"]),
            logprobs=config.logprobs,
        )

    def _scored(self, request: Request, choices: list[str]) -> dict[str, Any]:
        scores = self.engine.score(request, choices)
        return {"answer": scores[0].choice, "finish_reason": "choice", "scores": [asdict(score) for score in scores]}


def draw_seed(seed: int, row: int, window: int) -> int:
    """Return the seed of one answer: its own, so that the same question asked twice is drawn twice."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row} {window}".encode()).digest()[:4], "big")


def write_part(
    number: int, answers: list[dict[str, Any]], asked: QuestionTable, config: PredictConfig
) -> dict[str, Any]:
    """Write the answers to one range of the questions, and return the part's receipt."""
    answers = sorted(answers, key=lambda answer: (answer["row"], answer["window"]))
    table = pa.Table.from_pylist(answers, schema=ANSWER_SCHEMA)
    questions = asked.table.take(table["row"])
    left_out = {"row", "window"}
    left_out |= set() if asked.has("choices") else {"scores"}
    left_out |= set() if config.logprobs else {"logprobs"}
    parts = {name: questions[name] for name in TEXT_COLUMNS if asked.has(name)}
    parts |= {name: table[name] for name in table.column_names if name not in left_out}
    parts |= {name: questions[name] for name in asked.passed}
    name = part_name(number)
    receipt = {
        "name": name,
        "questions": len({answer["row"] for answer in answers}),
        "rows": len(answers),
        "failed": dict(Counter(answer["error"] for answer in answers if answer["error"])),
    }
    return shards.write_shard(config.output, ANSWERS, name, pa.table(parts), receipt)
