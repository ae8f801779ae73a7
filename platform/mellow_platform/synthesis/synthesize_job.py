"""The synthesis job: writes a corpus of questions from captions, resumed after kills.

Its output folder contains, besides `configuration.json`, answers and receipts (`mellow_platform.resumable`):

    answers/<pass>/          answers of the pass `write` and of each check, in parts (`runner`)
    arriving/                answers of incomplete parts
    rejected/, failed/       rejected questions with the reason, and requests without an answer
    records/<split>.parquet  the corpus, each record with its kind, aspect and request
    train.json, val.json, test.json   the corpus in ReasonAQA's format, the input of jobs/preprocess.py
    report.md, report.json   written last

With other filters, checks, synthetic_share or existing questions, the corpus is built again from the same answers;
only checks of other questions or with other prompts, and failed requests that may succeed later, are sent again.
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
from mellow_platform.resumable import ANSWERS, RECEIPTS, REPORT, claim, dataset_of_parts, digest, is_finished
from mellow_platform.synthesis import requests as writing_requests
from mellow_platform.synthesis import verification
from mellow_platform.synthesis.candidates import CANDIDATE_SCHEMA, RECORD_SCHEMA, Candidate, candidates
from mellow_platform.synthesis.caption_parser import sound_names
from mellow_platform.synthesis.endpoint import Access, EndpointWriter
from mellow_platform.synthesis.filters import check_languages, contradictions, near_duplicates, reason_of
from mellow_platform.synthesis.mixture import Pair, check_share, describe, existing_pairs, mix
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.rules import RuleWriter
from mellow_platform.synthesis.runner import AnswerParts, answer_on_actors, read_parts, run_pass
from mellow_platform.synthesis.schemas import INDEPENDENT_QUESTIONS
from mellow_platform.synthesis.synthesis_report import markdown, pass_counts
from mellow_platform.synthesis.synthesize_config import FiltersSection, SynthesizeConfig
from mellow_platform.synthesis.vllm_engine import answer_on_vllm
from mellow_platform.synthesis.writer import WriterAnswer

# Reasons of requested pairs that are missing in an answer: rules write only questions that a caption supports; the last
# attempt of a model may contain fewer valid questions.
UNWRITTEN, TOO_FEW = "nothing_left_to_ask", "too_few_written"
BLOCK_SIZE = 4096  # fewest questions per filtering task, and the rest of the last clip
REASON_SCHEMA = pa.schema([CANDIDATE_SCHEMA.field("id"), CANDIDATE_SCHEMA.field("reason")])
FAILED_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("request", "kind", "material", "reason", "detail")]
)


def synthesize(config: SynthesizeConfig) -> dict[str, Any]:
    """Write the corpus of `config` and return its report; a finished job only returns its report.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the input is malformed or has no request, too many requests failed, or `output` contains another
            corpus.
        RuntimeError: the endpoint ended the job; stored answers are reused by the next run.
    """
    start = time.monotonic()
    require("datasketch", "py3langid", extra="synthesis")
    captions = read_captions(config.captions, config.taskname, config.clip_name, config.limit)
    existing = existing_pairs(captions, config)
    requests = writing_requests.plan(captions, config)
    if not requests:  # kinds other than difference have a request per caption
        raise ValueError("kinds: difference requires two clips with different captions per split and task; add a kind")
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
        _render_prompts(requests, prompts, config)
    if access:
        make_writer = functools.partial(EndpointWriter, config, prompts, access, digest(depends_on))
        make_writer()  # raises errors of the client here instead of in actors
        answer_parts = answer_on_actors(make_writer, config)
    elif config.writer == "vllm":
        answer_parts = answer_on_vllm(config, prompts)
    else:
        names = sound_names(caption.text for caption in captions)
        answer_parts = answer_on_actors(functools.partial(RuleWriter, config.seed, names), config)
    claim(config.output, config.identity | {"model": model}, digest(depends_on), "questions", REPORT)
    check_prompts: dict[str, str] = {name: prompts.texts[name] if model else "" for name in config.checks}
    selection = _selection_digest(existing, check_prompts, config)
    report_uri = storage.join(config.output, REPORT)
    report = storage.read_json(report_uri) if storage.exists(report_uri) else {}
    if report.get("sifted") == selection and is_finished(config.output, REPORT):
        return report

    questions, failed, passes = _write_and_check(requests, check_prompts, answer_parts, config)

    accepted = [candidate for candidate in questions if not candidate["reason"]]
    rejected = [candidate for candidate in questions if candidate["reason"]]
    mixed = mix(existing, accepted, config)
    # The report marks a finished job; without it, a kill while tables are replaced is noticed.
    storage.delete_folder(report_uri)
    _write_tables(rejected, failed, mixed, config)
    report = {
        "output": config.output,
        "writer": model or "rules",
        "captions": len(captions),
        "clips": len({caption.clip for caption in captions}),
        **_pair_counts(requests, questions, failed, config),
        "passes": passes,
        "cost_usd": round(_cost(passes, config), 4),
        "mixture": describe(mixed),
        "sifted": selection,
        "seconds": round(time.monotonic() - start, 1),  # of the run that finished the job
    }
    storage.remove_partial(config.output)
    storage.write_bytes(storage.join(config.output, "report.md"), markdown(report).encode())
    storage.write_json(report_uri, report)
    return report


def _render_prompts(requests: list[WritingRequest], prompts: Prompts, config: SynthesizeConfig) -> None:
    """Render each template once at the start, so that a broken one fails before any paid request.

    Raises:
        ValueError: a template is broken; the message names it (`Prompts.render`).
    """
    for request in {request.kind: request for request in requests}.values():
        prompts.render(request)
    questions = [{"question": "what?", "choices": ["a", "b"], "answer": "a"}]
    for name in config.checks:
        prompts.render(
            WritingRequest("", name, 1, {"captions": requests[0].material["captions"], "questions": questions})
        )


def _selection_digest(existing: dict[str, list[Pair]], check_prompts: dict[str, str], config: SynthesizeConfig) -> str:
    """Return the SHA-256 of the options and inputs that select the records of the corpus."""
    digest = hashlib.sha256(json.dumps([config.selection, check_prompts], sort_keys=True).encode())
    for pairs in existing.values():
        for pair in pairs:
            digest.update(json.dumps(asdict(pair.record)).encode())
    return digest.hexdigest()


def _write_and_check(
    requests: list[WritingRequest], check_prompts: dict[str, str], answer_parts: AnswerParts, config: SynthesizeConfig
) -> tuple[list[Candidate], list[tuple[WritingRequest, WriterAnswer]], dict[str, Any]]:
    """Run all passes; return the questions with their reasons, failed requests, and counts by pass.

    A question that a filter or a check rejects is not sent to later checks.

    Args:
        check_prompts: prompt of each check, empty for rules.
    """
    answers, stored = run_pass(writing_requests.PASS, requests, answer_parts, config)
    passes = {writing_requests.PASS: pass_counts(stored)}
    failed = [(r, answer) for r, answer in zip(requests, answers, strict=True) if answer["error"]]
    questions: list[Candidate] = []
    for request, answer in zip(requests, answers, strict=True):
        if not answer["error"]:
            questions += candidates(request, json.loads(answer["content"]))
    questions = filter_questions(questions, config.filters)
    for name, prompt in check_prompts.items():
        check = verification.CHECKS[name](questions, config.seed, prompt)
        answers, stored = run_pass(name, check.requests, answer_parts, config)
        verification.apply(check, [None if a["error"] else json.loads(a["content"]) for a in answers])
        failed += [(r, answer) for r, answer in zip(check.requests, answers, strict=True) if answer["error"]]
        passes[name] = pass_counts(stored)
    # Checks of earlier runs that are no longer selected count towards the cost.
    for name in storage.list_folder(storage.join(config.output, RECEIPTS, ANSWERS)):
        if name not in passes:
            passes[name] = pass_counts(list(chain.from_iterable(read_parts(name, config).values())))
    return questions, failed, passes


def filter_questions(questions: list[Candidate], limits: FiltersSection) -> list[Candidate]:
    """Return the questions in order, each with the reason of a rejection or ""; filtered on Ray Data."""
    if not questions:
        return []
    tables = [pa.Table.from_pylist(block, schema=CANDIDATE_SCHEMA) for block in _blocks(questions)]
    dataset = dataset_of_parts(tables).map_batches(
        _filter_block, batch_size=None, batch_format="pyarrow", fn_kwargs={"limits": limits}
    )
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    reasons = {row["id"]: row["reason"] for table in tables for row in table.to_pylist()}
    return [candidate | {"reason": reasons[candidate["id"]]} for candidate in questions]


def _blocks(questions: list[Candidate]) -> Iterator[list[Candidate]]:
    """Yield blocks of questions; the questions of a clip are consecutive, and in one block."""
    block: list[Candidate] = []
    for _, group in groupby(questions, key=lambda candidate: candidate["clips"][0]):
        block += group
        if len(block) >= BLOCK_SIZE:
            yield block
            block = []
    if block:
        yield block


def _filter_block(block: pa.Table, limits: FiltersSection) -> pa.Table:
    rows = block.to_pylist()
    for row in rows:
        row["reason"] = reason_of(row, limits)
    duplicates = functools.partial(near_duplicates, similarity=limits.similarity)
    for reason, find in (("contradiction", contradictions), ("near_duplicate", duplicates)):
        found = find([row for row in rows if not row["reason"]])
        for row in rows:
            row["reason"] = reason if row["id"] in found else row["reason"]
    return pa.Table.from_pylist([{"id": row["id"], "reason": row["reason"]} for row in rows], schema=REASON_SCHEMA)


def _pair_counts(
    requests: list[WritingRequest],
    questions: list[Candidate],
    failed: list[tuple[WritingRequest, WriterAnswer]],
    config: SynthesizeConfig,
) -> dict[str, Any]:
    """Return the outcome of all requested pairs: requested = accepted + rejected + failed.

    Raises:
        RuntimeError: a pair is missing without a reason, or occurs twice.
    """
    requested = sum(request.pairs for request in requests)
    rejected = Counter(candidate["reason"] for candidate in questions if candidate["reason"])
    errors = {request.id: answer["error"] for request, answer in failed}
    by_request = Counter(candidate["request"] for candidate in questions)
    missing_by_reason: Counter[str] = Counter()
    wrong = by_request.keys() - {request.id for request in requests}
    for request in requests:
        missing = request.pairs - by_request[request.id]
        reason = errors.get(request.id) or (UNWRITTEN if config.writer == "rules" else TOO_FEW)
        missing_by_reason[reason] += missing
        if not _is_expected(request, missing, reason):
            wrong.add(request.id)
    counts = {
        "requested": requested,
        "accepted": len(questions) - rejected.total(),
        "rejected": rejected.total(),
        "failed": missing_by_reason.total(),
        "rejected_by_reason": dict(rejected.most_common()),
        "failed_by_reason": dict((+missing_by_reason).most_common()),
    }
    if wrong or len({candidate["id"] for candidate in questions}) < len(questions):
        raise RuntimeError(
            f"answers contain {len(questions)} of {requested} requested questions: {counts}; wrong counts in requests: "
            f"{', '.join(sorted(wrong)[:5]) or 'none, but an id occurs twice'}"
        )
    return counts


def _is_expected(request: WritingRequest, missing: int, reason: str) -> bool:
    """Return whether this number of missing pairs is expected for a reason: all pairs if the request failed."""
    if reason == UNWRITTEN:
        return 0 <= missing <= request.pairs
    if reason == TOO_FEW:
        return missing == 0 or (request.kind in INDEPENDENT_QUESTIONS and 0 < missing < request.pairs)
    return missing == request.pairs


def _cost(passes: dict[str, Any], config: SynthesizeConfig) -> float:
    """Return the price in USD of all prompt and completion tokens."""
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
