"""The synthesis job: from captions to a corpus of questions, however often it is killed and submitted again.

Its output folder contains, besides `configuration.json`, answers and receipts (`mellow_platform.resumable`):

    answers/<pass>/          answers of the pass `write` and of each check, in parts (`runner`)
    arriving/                answers of parts that are not complete
    rejected/, failed/       rejected questions with the reason, and requests without an answer
    records/<split>.parquet  the corpus, each record with its kind, aspect and request
    train.json, val.json, test.json   the corpus in ReasonAQA's format, the input of jobs/preprocess.py
    report.md, report.json   written last

With other filters or checks, another share of synthetic questions or other existing ones, the corpus is built again
from the same answers; only checks of other questions or with other prompts, and failed requests, are sent again.
"""

import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, groupby
from typing import Any

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data.caption_tables import read_captions
from mellow_platform.data.records import SPLITS, write_records
from mellow_platform.extras import require
from mellow_platform.resumable import RECEIPTS, claim, dataset_of_parts, digest
from mellow_platform.synthesis import requests as writing_requests
from mellow_platform.synthesis import verification
from mellow_platform.synthesis.candidates import CANDIDATE_SCHEMA, RECORD_SCHEMA, Candidate, candidates
from mellow_platform.synthesis.caption_parser import pool
from mellow_platform.synthesis.endpoint import Access, EndpointWriter
from mellow_platform.synthesis.filters import check_languages, contradictions, near_duplicates, reason_of
from mellow_platform.synthesis.mixture import Pair, check_share, describe, existing_pairs, mix
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.rules import RuleWriter
from mellow_platform.synthesis.runner import ANSWERS, Answering, ask_actors, read_parts, run_pass
from mellow_platform.synthesis.schemas import WRITTEN_ONE_BY_ONE
from mellow_platform.synthesis.synthesis_report import markdown, pass_counts
from mellow_platform.synthesis.synthesize_config import FiltersSection, SynthesizeConfig
from mellow_platform.synthesis.vllm_engine import ask_vllm
from mellow_platform.synthesis.writer import WriterAnswer

REPORT = "report.json"
# Pairs that an answer does not hold: rules write no more than the caption holds; of a model's last attempt, what is in
# form is taken.
UNWRITTEN, TOO_FEW = "nothing_left_to_ask", "too_few_written"
FILTERED_AT_ONCE = 4096  # questions of a filtering task, and more until a clip is whole
REASON_SCHEMA = pa.schema([CANDIDATE_SCHEMA.field("id"), CANDIDATE_SCHEMA.field("reason")])
FAILED_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("request", "kind", "material", "reason", "detail")]
)


def synthesize(config: SynthesizeConfig) -> dict[str, Any]:
    """Write the corpus that `config` describes, and return its report; what is done is left as it is.

    Raises:
        FileNotFoundError: a file or folder is absent.
        ValueError: the input cannot be read or there is nothing to ask of it, too many requests have no answer, or
            `output` holds another corpus.
        RuntimeError: the endpoint cannot be asked; what it has answered is kept for the next run.
    """
    begun = time.monotonic()
    require("datasketch", "py3langid", extra="synthesis")
    captions = read_captions(config.captions, config.taskname, config.clip_name, config.limit)
    existing = existing_pairs(captions, config)
    requests = writing_requests.plan(captions, config)
    if not requests:  # of each caption all other kinds are asked
        raise ValueError("kinds: difference needs, in one split and task, two clips with different captions to compare")
    prompts = Prompts.read([*config.kinds, *verification.CHECKS], config.prompts)
    access = Access.from_environment() if config.writer == "endpoint" else None
    model = access.model if access else config.vllm.model
    depends_on = {
        "fields": config.identity,
        "requests": writing_requests.content_digest(requests),
        "model": model,
        "prompts": prompts.digest(config.kinds) if model else "",
    }
    check_languages(config.filters)
    check_share(existing, sum(r.pairs for r in requests if r.split == "train"), config)
    if model:
        _try_prompts(requests, prompts, config)
    if access:
        make_writer = functools.partial(EndpointWriter, config, prompts, access, digest(depends_on))
        make_writer()  # refused here, rather than in actors, is what no client can be made of
        answering = ask_actors(make_writer, config)
    elif config.writer == "vllm":
        answering = ask_vllm(config, prompts)
    else:
        sounds = pool(caption.text for caption in captions)
        answering = ask_actors(functools.partial(RuleWriter, config.seed, sounds), config)
    claim(config.output, config.identity | {"model": model}, digest(depends_on), "questions", REPORT)
    told: dict[str, str] = {name: prompts.texts[name] if model else "" for name in config.checks}
    sifted = _sifting_digest(existing, told, config)
    report_uri = storage.join(config.output, REPORT)
    if storage.exists(report_uri) and (report := storage.read_json(report_uri))["sifted"] == sifted:
        print(f"{config.output} is finished: nothing to do", flush=True)
        return report

    written, failed, passes = _write_and_check(requests, told, answering, config)

    accepted = [candidate for candidate in written if not candidate["reason"]]
    rejected = [candidate for candidate in written if candidate["reason"]]
    mixed = mix(existing, accepted, config)
    # A folder with a report is finished: while it gets other tables it is not.
    storage.delete_folder(report_uri)
    _write_tables(rejected, failed, mixed, config)
    report = {
        "output": config.output,
        "writer": model or "rules",
        "captions": len(captions),
        "clips": len({caption.clip for caption in captions}),
        **_pair_counts(requests, written, failed, config),
        "passes": passes,
        "cost_usd": round(_cost(passes, config), 4),
        "mixture": describe(mixed),
        "sifted": sifted,
        "seconds": round(time.monotonic() - begun, 1),  # of the run that finished the job
    }
    storage.remove_partial(config.output)
    storage.write_bytes(storage.join(config.output, "report.md"), markdown(report).encode())
    storage.write_json(report_uri, report)
    return report


def _try_prompts(requests: list[WritingRequest], prompts: Prompts, config: SynthesizeConfig) -> None:
    """Fill in each template once, lest a bad one be found when others are paid for.

    Raises:
        ValueError: a template asks for what there is not; the message names it.
    """
    for request in {request.kind: request for request in requests}.values():
        prompts.render(request)
    questions = [{"question": "what?", "choices": ["a", "b"], "answer": "a"}]
    for name in config.checks:
        prompts.render(
            WritingRequest("", name, 1, {"captions": requests[0].material["captions"], "questions": questions})
        )


def _sifting_digest(existing: dict[str, list[Pair]], told: dict[str, str], config: SynthesizeConfig) -> str:
    """Return the SHA-256 over what decides, of what is written, what the corpus gets."""
    digest = hashlib.sha256(json.dumps([config.sifting, told], sort_keys=True).encode())
    for pairs in existing.values():
        for pair in pairs:
            digest.update(json.dumps(asdict(pair.record)).encode())
    return digest.hexdigest()


def _write_and_check(
    requests: list[WritingRequest], told: dict[str, str], answering: Answering, config: SynthesizeConfig
) -> tuple[list[Candidate], list[tuple[WritingRequest, WriterAnswer]], dict[str, Any]]:
    """Run all passes; return the questions with their reasons, failed requests, and counts by pass.

    A question that a filter leaves out is not given to a check, nor one that fails a check to the next.

    Args:
        told: the prompt of each check, empty for rules.
    """
    answers, ever = run_pass(writing_requests.PASS, requests, answering, config)
    passes = {writing_requests.PASS: pass_counts(ever)}
    failed = [(r, answer) for r, answer in zip(requests, answers, strict=True) if answer["error"]]
    written: list[Candidate] = []
    for request, answer in zip(requests, answers, strict=True):
        if not answer["error"]:
            written += candidates(request, json.loads(answer["content"]))
    written = filter_questions(written, config.filters)
    for name, prompt in told.items():
        check = verification.CHECKS[name](written, config.seed, prompt)
        answers, ever = run_pass(name, check.requests, answering, config)
        verification.apply(check, [None if a["error"] else json.loads(a["content"]) for a in answers])
        failed += [(r, answer) for r, answer in zip(check.requests, answers, strict=True) if answer["error"]]
        passes[name] = pass_counts(ever)
    # A check that was asked for once was paid for, and may be asked for again.
    for name in storage.list_folder(storage.join(config.output, RECEIPTS, ANSWERS)):
        if name not in passes:
            passes[name] = pass_counts(list(chain.from_iterable(read_parts(name, config).values())))
    return written, failed, passes


def filter_questions(written: list[Candidate], limits: FiltersSection) -> list[Candidate]:
    """Return the questions in their order, each with the reason to leave it out, if any; filtered on Ray Data."""
    if not written:
        return []
    tables = [pa.Table.from_pylist(block, schema=CANDIDATE_SCHEMA) for block in _blocks(written)]
    dataset = dataset_of_parts(tables).map_batches(
        _filter_block, batch_size=None, batch_format="pyarrow", fn_kwargs={"limits": limits}
    )
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    reasons = {row["id"]: row["reason"] for table in tables for row in table.to_pylist()}
    return [candidate | {"reason": reasons[candidate["id"]]} for candidate in written]


def _blocks(written: list[Candidate]) -> Iterator[list[Candidate]]:
    """Cut the questions into blocks with all questions of a clip in one; they stand together."""
    block: list[Candidate] = []
    for _, group in groupby(written, key=lambda candidate: candidate["clips"][0]):
        block += group
        if len(block) >= FILTERED_AT_ONCE:
            yield block
            block = []
    if block:
        yield block


def _filter_block(block: pa.Table, limits: FiltersSection) -> pa.Table:
    rows = block.to_pylist()
    for row in rows:
        row["reason"] = reason_of(row, limits)
    repeated = functools.partial(near_duplicates, similarity=limits.similarity)
    for reason, find in (("contradiction", contradictions), ("near_duplicate", repeated)):
        found = find([row for row in rows if not row["reason"]])
        for row in rows:
            row["reason"] = reason if row["id"] in found else row["reason"]
    return pa.Table.from_pylist([{"id": row["id"], "reason": row["reason"]} for row in rows], schema=REASON_SCHEMA)


def _pair_counts(
    requests: list[WritingRequest],
    written: list[Candidate],
    failed: list[tuple[WritingRequest, WriterAnswer]],
    config: SynthesizeConfig,
) -> dict[str, Any]:
    """Return what became of every pair that was asked for: requested = accepted + rejected + failed.

    Raises:
        RuntimeError: some are lost, or there twice.
    """
    requested = sum(request.pairs for request in requests)
    rejected = Counter(candidate["reason"] for candidate in written if candidate["reason"])
    errors = {request.id: answer["error"] for request, answer in failed}
    by_request = Counter(candidate["request"] for candidate in written)
    unwritten: Counter[str] = Counter()
    lost = by_request.keys() - {request.id for request in requests}
    for request in requests:
        missing = request.pairs - by_request[request.id]
        reason = errors.get(request.id) or (UNWRITTEN if config.writer == "rules" else TOO_FEW)
        unwritten[reason] += missing
        if not _may_miss(request, missing, reason):
            lost.add(request.id)
    counts = {
        "requested": requested,
        "accepted": len(written) - rejected.total(),
        "rejected": rejected.total(),
        "failed": unwritten.total(),
        "rejected_by_reason": dict(rejected.most_common()),
        "failed_by_reason": dict((+unwritten).most_common()),
    }
    if lost or len({candidate["id"] for candidate in written}) < len(written):
        raise RuntimeError(
            f"the answers hold {len(written)} questions where {requested} were asked for: {counts}; not those of "
            f"{', '.join(sorted(lost)[:5]) or 'one request: some are there twice'}"
        )
    return counts


def _may_miss(request: WritingRequest, missing: int, reason: str) -> bool:
    """Return whether so many of a request's pairs may be absent: all where it failed, else what was not written."""
    if reason == UNWRITTEN:
        return 0 <= missing <= request.pairs
    if reason == TOO_FEW:
        return missing == 0 or (request.kind in WRITTEN_ONE_BY_ONE and 0 < missing < request.pairs)
    return missing == request.pairs


def _cost(passes: dict[str, Any], config: SynthesizeConfig) -> float:
    """Return the price in USD of all tokens that came and went."""
    prices = {"prompt_tokens": config.endpoint.price_input, "completion_tokens": config.endpoint.price_output}
    return sum(counts[name] * price / 1e6 for counts in passes.values() for name, price in prices.items())


def _write_tables(
    rejected: list[Candidate],
    failed: list[tuple[WritingRequest, WriterAnswer]],
    mixed: dict[str, list[Pair]],
    config: SynthesizeConfig,
) -> None:
    def write(name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        storage.write_table(storage.join(config.output, name), pa.Table.from_pylist(rows, schema=schema))

    write("rejected/questions.parquet", rejected, CANDIDATE_SCHEMA)
    unanswered = [
        {
            "request": request.id,
            "kind": request.kind,
            "material": json.dumps(asdict(request), ensure_ascii=False),
            "reason": answer["error"],
            "detail": answer["detail"],
        }
        for request, answer in failed
    ]
    write("failed/requests.parquet", unanswered, FAILED_SCHEMA)
    for split in SPLITS:
        rows = [asdict(p.record) | {"kind": p.kind, "aspect": p.aspect, "request": p.request} for p in mixed[split]]
        write(f"records/{split}.parquet", rows, RECORD_SCHEMA)
        write_records(storage.join(config.output, f"{split}.json"), [pair.record for pair in mixed[split]])
