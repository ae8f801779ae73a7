"""A pass of synthesis: one answer per request, resumed after kills.

A pass is written in parts (`mellow_platform.resumable`) of the kind `answers/<pass>`. While a part is incomplete, the
folder `arriving/<pass>/<part>/` contains a file per answer, written as soon as the answer arrives.

Ray Data gives each part to an actor with a writer; the driver writes a complete part and deletes its answer files.
A resumed pass skips complete parts and reads stored answers: only requests in flight are repeated, at most as many as
the actors send at once.

A part's name is derived from its requests, so that other requests are another part. Failed requests of complete parts
that may succeed later (`final` is false) are retried, and the part's file is replaced in one step: a request has one
row at any time, with its usage over all runs.
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
    ANSWERS,
    FailureBudget,
    dataset_of_parts,
    map_on_actors,
    part_ranges,
    read_receipts,
    write_part,
)
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import ANSWER_SCHEMA, STOP, Writer, WriterAnswer, stored_files

ARRIVING = "arriving"

Part = tuple[str, list[WritingRequest]]  # name and requests
# Takes the name of a pass, its parts, and answers of earlier runs that are not final; yields answers as they arrive,
# with the name of their part.
AnswerParts = Callable[[str, list[Part], Mapping[str, WriterAnswer]], Iterator[tuple[str, list[WriterAnswer]]]]


def run_pass(
    name: str, requests: list[WritingRequest], answer_parts: AnswerParts, config: SynthesizeConfig
) -> tuple[list[WriterAnswer], list[WriterAnswer]]:
    """Answer `requests`; return their answers in order, and all stored answers of the pass.

    Requests with a final answer in any part are skipped; requests with the same id are sent once.

    Raises:
        ValueError: the share of failed requests exceeds `max_failed_share`; raised as soon as this is certain.
        RuntimeError: the writer ended the job; answers remain stored.
    """
    stored = read_parts(name, config)
    known = {answer["request"]: answer for answers in stored.values() for answer in answers}
    by_id = {request.id: request for request in requests}
    missing = [request for request in by_id.values() if request.id not in known]
    new = [missing[rows.start : rows.stop] for rows in part_ranges(len(missing), config.rows_per_part).values()]
    earlier = {request: answer for request, answer in known.items() if request in by_id and not answer["final"]}
    retries = {part: [by_id[a["request"]] for a in stored[part] if a["request"] in earlier] for part in stored}
    # New parts first, because they show whether the writer works.
    parts = {_part_name(group): group for group in new} | {part: group for part, group in retries.items() if group}
    done = len(by_id) - sum(map(len, parts.values()))
    progress = Progress(f"{name}: requests", len(by_id), done, rejected_are="failed")
    remedy = f"Submit the job again to retry; for other prompts, choose another output than {config.output}"
    budget = FailureBudget(f"requests of pass {name}", len(by_id), config.max_failed_share, remedy)
    budget.add(Counter(a["error"] for r, a in known.items() if a["error"] and r in by_id and r not in earlier))
    incomplete: dict[str, list[WriterAnswer]] = {}
    for part, answers in answer_parts(name, list(parts.items()), earlier):
        if stop := next((answer["detail"] for answer in answers if answer["error"] == STOP), None):
            count = sum(known[r]["final"] for r in by_id if r in known) + _count_stored(name, config)
            raise RuntimeError(
                f"{stop}; {count} of {len(by_id)} answers of pass {name} are stored in {config.output}: "
                "submit the job again with the same options to resume"
            )
        incomplete.setdefault(part, []).extend(answers)
        details = (answer["detail"] for answer in reversed(answers) if answer["error"])
        budget.add(Counter(answer["error"] for answer in answers if answer["error"]), next(details, None))
        if len(incomplete[part]) == len(parts[part]):
            complete = {answer["request"]: answer for answer in incomplete.pop(part)}
            if complete.keys() != {request.id for request in parts[part]}:
                raise RuntimeError(f"pass {name}: part {part} has several answers to one request")
            known |= complete
            order = [answer["request"] for answer in stored.get(part, ())] or [request.id for request in parts[part]]
            _write_part(name, part, [known[request] for request in order], config)
            progress.add(len(complete), sum(bool(answer["error"]) for answer in complete.values()))
            del parts[part]
    if parts:
        raise RuntimeError(f"pass {name}: answers are missing in parts {', '.join(sorted(parts))}")
    storage.delete_folder(storage.join(config.output, ARRIVING, name))
    return [known[request.id] for request in requests], list(known.values())


def read_parts(name: str, config: SynthesizeConfig) -> dict[str, list[WriterAnswer]]:
    """Return the answers of a pass by part."""
    receipts = read_receipts(config.output, f"{ANSWERS}/{name}")
    if not receipts:
        return {}
    files = [storage.join(config.output, receipt["file"]) for receipt in receipts.values()]
    answers = iter(storage.read_tables(files).to_pylist())
    return {part: list(islice(answers, receipt["requests"])) for part, receipt in receipts.items()}


def answer_on_actors(make_writer: Callable[[], Writer], config: SynthesizeConfig) -> AnswerParts:
    """Return a function that answers parts on Ray Data actors, each with a writer from `make_writer`."""

    def answer_parts(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        if not parts:
            return
        dataset = dataset_of_parts([_part_table(part, requests, earlier) for part, requests in parts])
        arguments = (make_writer, storage.join(config.output, ARRIVING, name))
        for rows in map_on_actors(dataset, AnswerRequests, arguments, config.workers):
            for row in rows:
                yield row["part"], row["answers"]

    return answer_parts


def _part_table(part: str, requests: list[WritingRequest], earlier: Mapping[str, WriterAnswer]) -> pa.Table:
    """Return a part as a table of one row: name, and requests and earlier answers as JSON."""
    answers = [earlier[request.id] for request in requests if request.id in earlier]
    columns = {"requests": [asdict(request) for request in requests], "earlier": answers}
    return pa.table({"part": [part]} | {k: [json.dumps(v, ensure_ascii=False)] for k, v in columns.items()})


class AnswerRequests:
    """Ray Data actor that answers parts; several calls run at the same time."""

    def __init__(self, make_writer: Callable[[], Writer], folder: str):
        self.writer, self.folder = make_writer(), folder

    def __call__(self, parts: pa.Table) -> pa.Table:
        """Return the name and the answers of a part (`_part_table`), as a table of one row."""
        (row,) = parts.to_pylist()
        requests = [_request(fields) for fields in json.loads(row["requests"])]
        earlier = {answer["request"]: answer for answer in json.loads(row["earlier"])}
        answers = self.writer.answers(requests, storage.join(self.folder, row["part"]), earlier)
        schema = pa.schema([("part", pa.string()), ("answers", pa.list_(pa.struct(list(ANSWER_SCHEMA))))])
        return pa.Table.from_pylist([{"part": row["part"], "answers": answers}], schema=schema)


def _request(fields: dict[str, Any]) -> WritingRequest:
    return WritingRequest(**fields | {"clips": tuple(fields["clips"])})


def _part_name(requests: list[WritingRequest]) -> str:
    """Return a part's name: the id of its first request and a hash of all ids.

    A number would change as soon as earlier parts are complete.
    """
    return f"{requests[0].id}-{hashlib.sha256(''.join(request.id for request in requests).encode()).hexdigest()[:8]}"


def _write_part(name: str, part: str, answers: list[WriterAnswer], config: SynthesizeConfig) -> None:
    """Write or replace a part of a pass, and delete its answer files."""
    table = pa.Table.from_pylist(answers, schema=ANSWER_SCHEMA)
    write_part(config.output, f"{ANSWERS}/{name}", part, table, {"requests": len(answers)})
    storage.delete_folder(storage.join(config.output, ARRIVING, name, part))


def _count_stored(name: str, config: SynthesizeConfig) -> int:
    folder = storage.join(config.output, ARRIVING, name)
    return sum(len(stored_files(f"{folder}/{part}")) for part in storage.list_folder(folder))
