"""A pass of synthesis: every request of a list gets one answer, however often the job is killed and submitted again.

A pass is written in parts (`mellow_platform.resumable`) of the kind `answers/<pass>`. Besides, the folder
`arriving/<pass>/<part>/` contains a file per answer of a part that is not complete, written as answers arrive.

Ray Data gives each part to an actor with a writer; the driver writes a complete part and deletes its arrived answers.
After a kill, finished parts are skipped and arrived answers are taken over: only requests in flight are repeated, at
most as many as the actors send at once.

A part's name follows from its requests, so that other requests are another part. Failed requests of finished parts that
may succeed later (`final` is false) are retried, and the part's file is replaced in one step: a request has one row at
any time, which counts what the request cost in all runs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.progress import Progress
from mellow_platform.resumable import (
    FailureBudget,
    dataset_of_parts,
    map_on_actors,
    part_ranges,
    read_receipts,
    write_part,
)
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import ANSWER_SCHEMA, STOP, Writer, WriterAnswer, arrived

ANSWERS, ARRIVING = "answers", "arriving"

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
    new = [missing[rows.start : rows.stop] for rows in part_ranges(len(missing), config.rows_per_part).values()]
    earlier = {request: answer for request, answer in known.items() if request in wanted and not answer["final"]}
    retried = {part: [wanted[a["request"]] for a in there[part] if a["request"] in earlier] for part in there}
    # New parts first, because they show whether the writer works.
    parts = {_part_name(members): members for members in new} | {part: each for part, each in retried.items() if each}
    done = len(wanted) - sum(map(len, parts.values()))
    progress = Progress(f"{name}: requests", len(wanted), done, rejected_are="failed")
    remedy = f"Submit the job again to retry; for other prompts, choose another output than {config.output}"
    budget = FailureBudget(f"requests of pass {name}", len(wanted), config.max_failed_share, remedy)
    budget.add(Counter(a["error"] for r, a in known.items() if a["error"] and r in wanted and r not in earlier))
    waiting: dict[str, list[WriterAnswer]] = {}
    for part, answers in answering(name, list(parts.items()), earlier):
        if stopped := next((answer["detail"] for answer in answers if answer["error"] == STOP), None):
            kept = sum(known[r]["final"] for r in wanted if r in known) + _count_arrived(name, config)
            raise RuntimeError(
                f"{stopped}; {kept} of {len(wanted)} answers of pass {name} are kept in {config.output}: "
                "submit the job again with the same options to resume"
            )
        waiting.setdefault(part, []).extend(answers)
        details = (answer["detail"] for answer in reversed(answers) if answer["error"])
        budget.add(Counter(answer["error"] for answer in answers if answer["error"]), next(details, None))
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
    receipts = read_receipts(config.output, f"{ANSWERS}/{name}")
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
        dataset = dataset_of_parts([_part_table(part, requests, earlier) for part, requests in parts])
        arguments = (make, storage.join(config.output, ARRIVING, name))
        for rows in map_on_actors(dataset, AnswerRequests, arguments, config.workers):
            for row in rows:
                yield row["part"], row["answers"]

    return answering


def _part_table(part: str, requests: list[WritingRequest], earlier: Mapping[str, WriterAnswer]) -> pa.Table:
    """Return a part as a table of one row, the texts in it as JSON."""
    before = [earlier[request.id] for request in requests if request.id in earlier]
    columns = {"requests": [asdict(request) for request in requests], "earlier": before}
    return pa.table({"part": [part]} | {k: [json.dumps(v, ensure_ascii=False)] for k, v in columns.items()})


class AnswerRequests:
    """Ray Data actor that answers parts; several of its calls run at a time."""

    def __init__(self, make: Callable[[], Writer], arriving: str):
        self.writer, self.arriving = make(), arriving

    def __call__(self, parts: pa.Table) -> pa.Table:
        """Return the part in a table of one row (`_part_table`) with its `answers`."""
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
    write_part(config.output, f"{ANSWERS}/{name}", part, table, {"requests": len(answers)})
    storage.delete_folder(storage.join(config.output, ARRIVING, name, part))


def _count_arrived(name: str, config: SynthesizeConfig) -> int:
    folder = storage.join(config.output, ARRIVING, name)
    return sum(len(arrived(f"{folder}/{part}")) for part in storage.list_folder(folder))
