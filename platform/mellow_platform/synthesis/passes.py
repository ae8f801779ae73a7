"""A pass: every request of a list is answered once, however often the job is killed and started again.

A pass leaves in the job's folder

    answers/<pass>/*.parquet   a row an answer; each file is named after the requests that it answers, so that what
                               is asked otherwise is another file
    receipts/answers/<pass>/   one JSON file a part, written after it: the part is done
    arriving/<pass>/<part>/    answers of a part that is not whole yet, a file each, written as they come

Ray Data hands each part to an actor with a writer; the driver writes the part as soon as it is whole and deletes what
had arrived. A run that follows a kill leaves finished parts alone and takes what had arrived: asked again are only the
requests whose answers were on their way, at most as many as actors ask at once.

`ray.data.checkpoint.CheckpointConfig` of Ray 2.60 is not used, for the reasons that `data.shards` gives, and because it
knows whole rows of a finished write only: of a part that was killed every answer would be paid for again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray

from mellow_platform import storage
from mellow_platform.config import SynthesizeConfig
from mellow_platform.data import shards
from mellow_platform.progress import Progress
from mellow_platform.synthesis.answers import ANSWER_SCHEMA, STOP, Answer, Writer
from mellow_platform.synthesis.asked import Request

ANSWERS, ARRIVING = "answers", "arriving"
# Parts that an actor answers at the same time: while the last answers of one come, the next is begun.
PARTS_AT_ONCE = 2

Part = tuple[str, list[Request]]  # its name and its requests
Answering = Callable[[str, list[Part]], Iterator[tuple[str, list[Answer]]]]


def run_pass(
    name: str, requests: list[Request], answering: Answering, config: SynthesizeConfig
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Have `requests` answered; return their answers in order, and the receipts of all parts that the pass ever had.

    Whatever part holds it, what is answered is not asked again, and requests with the same id are asked once.

    Args:
        answering: takes the name of the pass and parts, and yields answers as they come, each with its part's name.

    Raises:
        ValueError: more than the allowed share of the requests has no answer; raised as soon as that is sure.
        RuntimeError: the writer cannot go on; what is answered is kept.
    """
    receipts = shards.receipts(config.output, f"{ANSWERS}/{name}")
    known = {answer["request"]: answer for answer in read_answers(list(receipts.values()), config)}
    wanted = {request.id: request for request in requests}
    missing = [request for request in wanted.values() if request.id not in known]
    slices = [missing[start : start + config.rows_per_part] for start in range(0, len(missing), config.rows_per_part)]
    parts = {_part_name(asked): asked for asked in slices}
    progress = Progress(f"{name}: requests", len(wanted), len(wanted) - len(missing), rejected_are="failed")
    failed = Counter(known[request]["error"] for request in wanted if request in known and known[request]["error"])
    _stop_if_too_many(failed, name, len(wanted), config)
    waiting: dict[str, list[Answer]] = {}
    for part, answers in answering(name, list(parts.items())):
        if stopped := next((answer["detail"] for answer in answers if answer["error"] == STOP), None):
            kept = _kept(name, progress.done, config)
            raise RuntimeError(
                f"{stopped}; {kept} of {len(wanted)} answers of pass {name} are kept in {config.output}: "
                "submit the job again with the same fields, and it goes on with the others"
            )
        waiting.setdefault(part, []).extend(answers)
        failed.update(answer["error"] for answer in answers if answer["error"])
        _stop_if_too_many(failed, name, len(wanted), config, answers)
        if len(waiting[part]) == len(parts[part]):
            known |= {answer["request"]: answer for answer in waiting[part]}
            receipts[part] = _write_part(name, part, waiting.pop(part), parts[part], config)
            progress.add(len(parts[part]), sum(receipts[part]["failed"].values()))
    if unanswered := sorted(parts.keys() - receipts.keys()):
        raise RuntimeError(f"pass {name}: parts {', '.join(unanswered)} have no answer to some request")
    storage.delete_folder(storage.join(config.output, ARRIVING, name))
    return [known[request.id] for request in requests], [receipts[part] for part in sorted(receipts)]


def read_answers(receipts: list[dict[str, Any]], config: SynthesizeConfig) -> list[Answer]:
    """Return the answers in the parts of a pass."""
    if not receipts:
        return []
    return storage.read_tables([storage.join(config.output, receipt["file"]) for receipt in receipts]).to_pylist()


def ask_actors(make: Callable[[], Writer], config: SynthesizeConfig) -> Answering:
    """Return how parts are answered by a pool of actors, each of which makes itself a writer."""

    def answering(name: str, parts: list[Part]) -> Iterator[tuple[str, list[Answer]]]:
        if not parts:
            return
        tables = [
            pa.table({"part": [part], "requests": [json.dumps([asdict(r) for r in requests], ensure_ascii=False)]})
            for part, requests in parts
        ]
        dataset = ray.data.from_arrow(tables)
        dataset.context.enable_progress_bars = False  # the job prints lines of its own, for a log
        dataset = dataset.map_batches(
            AnswerPart,
            fn_constructor_args=(make, storage.join(config.output, ARRIVING, name)),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=config.workers,
                max_concurrent_calls_per_actor=PARTS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield row["part"], row["answers"]

    return answering


class AnswerPart:
    """Ray Data actor that answers parts; several of its calls run at a time."""

    def __init__(self, make: Callable[[], Writer], arriving: str):
        self.writer, self.arriving = make(), arriving

    def __call__(self, parts: pa.Table) -> pa.Table:
        """Return the part in a table of one row (`part`, `requests` as JSON) with its `answers`."""
        (row,) = parts.to_pylist()
        requests = [_request(fields) for fields in json.loads(row["requests"])]
        answers = self.writer.answers(requests, storage.join(self.arriving, row["part"]))
        schema = pa.schema([("part", pa.string()), ("answers", pa.list_(pa.struct(list(ANSWER_SCHEMA))))])
        return pa.Table.from_pylist([{"part": row["part"], "answers": answers}], schema=schema)


def _request(fields: dict[str, Any]) -> Request:
    return Request(**fields | {"clips": tuple(fields["clips"])})


def _part_name(requests: list[Request]) -> str:
    """Return a part's name: the first request's and a hash of all.

    It has no number, since that of a part is another one when parts before it are done.
    """
    return f"{requests[0].id}-{hashlib.sha256(''.join(request.id for request in requests).encode()).hexdigest()[:8]}"


def _write_part(
    name: str, part: str, answers: list[Answer], requests: list[Request], config: SynthesizeConfig
) -> dict[str, Any]:
    """Write the answers to one range of the requests, and return the part's receipt."""
    by_id = {answer["request"]: answer for answer in answers}
    if len(by_id) < len(answers):
        raise RuntimeError(f"pass {name}: part {part} has two answers to one request")
    ordered = [by_id[request.id] for request in requests]
    counts = ("completions", "retries", "prompt_tokens", "completion_tokens")
    receipt = {
        "requests": len(requests),
        "failed": dict(Counter(answer["error"] for answer in ordered if answer["error"])),
        **{count: sum(answer[count] for answer in ordered) for count in counts},
    }
    table = pa.Table.from_pylist(ordered, schema=ANSWER_SCHEMA)
    receipt = shards.write_shard(config.output, f"{ANSWERS}/{name}", part, table, receipt)
    storage.delete_folder(storage.join(config.output, ARRIVING, name, part))
    return receipt


def _kept(name: str, in_parts: int, config: SynthesizeConfig) -> int:
    """Return how many answers are there: those in parts, and those that arrived."""
    folder = storage.join(config.output, ARRIVING, name)
    return in_parts + sum(len(storage.list_folder(f"{folder}/{part}")) for part in storage.list_folder(folder))


def _stop_if_too_many(
    failed: Counter[str], name: str, requests: int, config: SynthesizeConfig, answers: list[Answer] | None = None
) -> None:
    if failed.total() <= config.max_failed_share * requests:
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(failed.items()))
    last = next((answer["detail"] for answer in reversed(answers or []) if answer["error"]), "")
    raise ValueError(
        f"{failed.total()} of {requests} requests of pass {name} have no answer ({counts}) so far"
        f"{last and f', the last: {last}'}; raise max_failed_share (now {config.max_failed_share:g}) to go on without "
        f"them, or mend what the prompts ask for and choose another output than {config.output}"
    )
