"""A pass: every request of a list is answered once, however often the job is killed and started again.

A pass leaves in the job's folder

    answers/<pass>/*.parquet   a row an answer; each file is named after the requests that it answers, so that what
                               is asked otherwise is another file
    receipts/answers/<pass>/   one JSON file a part, written after it: the part has come, and its rows count
    arriving/<pass>/<part>/    answers of a part that is not whole yet, a file each, written as they come

Ray Data hands each part to an actor with a writer; the driver writes the part as soon as it is whole and deletes what
had arrived. A run that follows a kill leaves finished parts alone and takes what had arrived: asked again are only the
requests whose answers were on their way, at most as many as actors ask at once.

Of finished parts it asks again what failed on the way (`final` is false), and replaces the part's file by one with the
new answers, in one step: each request has one row at any time. A row says what its request cost in all runs.

`ray.data.checkpoint.CheckpointConfig` of Ray 2.60 is not used, for the reasons that `data.shards` gives, and because it
knows whole rows of a finished write only: of a part that was killed every answer would be paid for again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import pyarrow as pa
import ray

from mellow_platform import storage
from mellow_platform.data import shards
from mellow_platform.progress import Progress
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import ANSWER_SCHEMA, STOP, Writer, WriterAnswer, arrived

ANSWERS, ARRIVING = "answers", "arriving"
# Parts that an actor answers at the same time: while the last answers of one come, the next is begun.
PARTS_AT_ONCE = 2

Part = tuple[str, list[WritingRequest]]  # its name and its requests
# Takes the name of a pass, parts, and what requests of theirs came to in a run before; yields answers as they come,
# with the name of their part.
Answering = Callable[[str, list[Part], Mapping[str, WriterAnswer]], Iterator[tuple[str, list[WriterAnswer]]]]


def run_pass(
    name: str, requests: list[WritingRequest], answering: Answering, config: SynthesizeConfig
) -> tuple[list[WriterAnswer], list[WriterAnswer]]:
    """Have `requests` answered; return their answers in order, and all answers that the pass ever had.

    Whatever part holds it, what is answered for good is not asked again, and requests with the same id are asked once.

    Raises:
        ValueError: more than the allowed share of the requests has no answer; raised as soon as that is sure.
        RuntimeError: the writer cannot go on; what is answered is kept.
    """
    there = read_parts(name, config)
    known = {answer["request"]: answer for answers in there.values() for answer in answers}
    wanted = {request.id: request for request in requests}
    missing = [request for request in wanted.values() if request.id not in known]
    slices = [missing[start : start + config.rows_per_part] for start in range(0, len(missing), config.rows_per_part)]
    earlier = {request: answer for request, answer in known.items() if request in wanted and not answer["final"]}
    opened = {part: [wanted[a["request"]] for a in there[part] if a["request"] in earlier] for part in there}
    # New ones first: it is they that show whether the writer can go on.
    parts = {_part_name(asked): asked for asked in slices} | {part: asked for part, asked in opened.items() if asked}
    done = len(wanted) - sum(map(len, parts.values()))
    progress = Progress(f"{name}: requests", len(wanted), done, rejected_are="failed")
    failed = Counter(a["error"] for r, a in known.items() if a["error"] and r in wanted and r not in earlier)
    _stop_if_too_many(failed, name, len(wanted), config)
    waiting: dict[str, list[WriterAnswer]] = {}
    for part, answers in answering(name, list(parts.items()), earlier):
        if stopped := next((answer["detail"] for answer in answers if answer["error"] == STOP), None):
            kept = sum(known[r]["final"] for r in wanted if r in known) + _count_arrived(name, config)
            raise RuntimeError(
                f"{stopped}; {kept} of {len(wanted)} answers of pass {name} are kept in {config.output}: "
                "submit the job again with the same fields, and it goes on with the others"
            )
        waiting.setdefault(part, []).extend(answers)
        failed.update(answer["error"] for answer in answers if answer["error"])
        _stop_if_too_many(failed, name, len(wanted), config, answers)
        if len(waiting[part]) == len(parts[part]):
            came = {answer["request"]: answer for answer in waiting.pop(part)}
            if came.keys() != {request.id for request in parts[part]}:
                raise RuntimeError(f"pass {name}: part {part} has two answers to one request")
            known |= came
            order = [answer["request"] for answer in there.get(part, ())] or [request.id for request in parts[part]]
            _write_part(name, part, [known[request] for request in order], config)
            progress.add(len(came), sum(bool(answer["error"]) for answer in came.values()))
            del parts[part]
    if parts:
        raise RuntimeError(f"pass {name}: parts {', '.join(sorted(parts))} have no answer to some request")
    storage.delete_folder(storage.join(config.output, ARRIVING, name))
    return [known[request.id] for request in requests], list(known.values())


def read_parts(name: str, config: SynthesizeConfig) -> dict[str, list[WriterAnswer]]:
    """Return the answers of a pass by the part that holds them."""
    receipts = shards.receipts(config.output, f"{ANSWERS}/{name}")
    if not receipts:
        return {}
    files = [storage.join(config.output, receipt["file"]) for receipt in receipts.values()]
    answers = iter(storage.read_tables(files).to_pylist())
    return {part: list(islice(answers, receipt["requests"])) for part, receipt in receipts.items()}


def ask_actors(make: Callable[[], Writer], config: SynthesizeConfig) -> Answering:
    """Return how parts are answered by a pool of actors, each of which makes itself a writer."""

    def answering(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        if not parts:
            return
        tables = [_asked_table(part, requests, earlier) for part, requests in parts]
        dataset = ray.data.from_arrow(tables)
        dataset.context.enable_progress_bars = False  # the job prints lines of its own, for a log
        dataset = dataset.map_batches(
            AnswerRequests,
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


def _asked_table(part: str, requests: list[WritingRequest], earlier: Mapping[str, WriterAnswer]) -> pa.Table:
    """Return a part as a table of one row, the texts in it as JSON."""
    before = [earlier[request.id] for request in requests if request.id in earlier]
    columns = {"requests": [asdict(request) for request in requests], "earlier": before}
    return pa.table({"part": [part]} | {k: [json.dumps(v, ensure_ascii=False)] for k, v in columns.items()})


class AnswerRequests:
    """Ray Data actor that answers parts; several of its calls run at a time."""

    def __init__(self, make: Callable[[], Writer], arriving: str):
        self.writer, self.arriving = make(), arriving

    def __call__(self, parts: pa.Table) -> pa.Table:
        """Return the part in a table of one row (`_asked_table`) with its `answers`."""
        (row,) = parts.to_pylist()
        requests = [_request(fields) for fields in json.loads(row["requests"])]
        earlier = {answer["request"]: answer for answer in json.loads(row["earlier"])}
        answers = self.writer.answers(requests, storage.join(self.arriving, row["part"]), earlier)
        schema = pa.schema([("part", pa.string()), ("answers", pa.list_(pa.struct(list(ANSWER_SCHEMA))))])
        return pa.Table.from_pylist([{"part": row["part"], "answers": answers}], schema=schema)


def _request(fields: dict[str, Any]) -> WritingRequest:
    return WritingRequest(**fields | {"clips": tuple(fields["clips"])})


def _part_name(requests: list[WritingRequest]) -> str:
    """Return a part's name: the first request's and a hash of all.

    It has no number, since that of a part is another one when parts before it are done.
    """
    return f"{requests[0].id}-{hashlib.sha256(''.join(request.id for request in requests).encode()).hexdigest()[:8]}"


def _write_part(name: str, part: str, answers: list[WriterAnswer], config: SynthesizeConfig) -> None:
    """Write a part of a pass, or write it anew."""
    table = pa.Table.from_pylist(answers, schema=ANSWER_SCHEMA)
    shards.write_shard(config.output, f"{ANSWERS}/{name}", part, table, {"requests": len(answers)})
    storage.delete_folder(storage.join(config.output, ARRIVING, name, part))


def _count_arrived(name: str, config: SynthesizeConfig) -> int:
    folder = storage.join(config.output, ARRIVING, name)
    return sum(len(arrived(f"{folder}/{part}")) for part in storage.list_folder(folder))


def _stop_if_too_many(
    failed: Counter[str], name: str, requests: int, config: SynthesizeConfig, answers: list[WriterAnswer] | None = None
) -> None:
    if failed.total() <= config.max_failed_share * requests:
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(failed.items()))
    last = next((answer["detail"] for answer in reversed(answers or []) if answer["error"]), "")
    raise ValueError(
        f"{failed.total()} of {requests} requests of pass {name} have no answer ({counts}) so far"
        f"{last and f', the last: {last}'}; submit the job again to ask once more for what failed on the way, raise "
        f"max_failed_share (now {config.max_failed_share:g}) to go on without them, or mend what the prompts ask for "
        f"and choose another output than {config.output}"
    )
