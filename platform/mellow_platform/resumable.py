"""Jobs that resume after a kill: output folders, parts, receipts and failure budgets of the four resumable jobs.

Preprocess, predict, evaluate and synthesize divide their input into parts, which are processed in parallel on Ray. A
job first claims its output folder, so that a job with other options or input is refused there, and then writes parts:

    configuration.json            the claim: options that the output depends on, and a digest of options and input
    <kind>/<part>.parquet         rows of one part, written as one file
    receipts/<kind>/<part>.json   counts of the part, written after its file: the part is finished

A job that is submitted again skips finished parts; in these, evaluate and synthesize only retry requests that may still
succeed. A part keeps its name in every run, so that a part that is processed twice replaces its file and does not add
one. Each job counts failed items (clips, questions, requests) and stops as soon as they exceed its failure budget.

`ray.data.checkpoint.CheckpointConfig` of Ray 2.60 does not fit: it writes file names with a new uuid per run, whose
rows depend on the moment of the kill; it commits by renaming, which object storage does not support; it skips rows only
after a Read operator, by an id that one output row may have, although a question can have several answers; and it
deletes its ids when a run succeeds, so that a finished job would repeat all work.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mellow_platform import storage

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

CONFIGURATION, RECEIPTS = "configuration.json", "receipts"
ANSWERS, REPORT = "answers", "report.json"  # kind of parts, and last file, of the jobs that collect answers
# Ray retries tasks of a lost worker or node without limit; an error of the project's own code ends the job at once.
RETRY_LOST_WORKERS = {"max_retries": -1}
CALLS_PER_ACTOR = 2  # with one, an engine would be idle between the last answers of a block and the next block


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def part_name(number: int) -> str:
    """Return the name of part `number`, for its file and its receipt: 000007."""
    return f"{number:06d}"


def part_ranges(items: int, size: int) -> dict[str, range]:
    """Return the range of items of each part, by part name; the last part may have fewer than `size` items."""
    starts = range(0, items, size)
    return {part_name(number): range(start, min(start + size, items)) for number, start in enumerate(starts)}


def claim(folder: str, options: dict[str, Any], job_digest: str, contents: str, marker: str) -> None:
    """Claim an output folder for a job, or check that an earlier run of the same job claimed it.

    Args:
        options: options that the output depends on; the error names those that differ.
        job_digest: digest of everything that the output depends on: options, input, model.
        contents: noun of the output in errors ("shards").
        marker: manifest or report of a finished job; without a claim, an earlier version of the project wrote it.

    Raises:
        ValueError: the folder contains output of another job, finished or not.
    """
    uri = storage.join(folder, CONFIGURATION)
    if not storage.exists(uri):
        if storage.exists(storage.join(folder, marker)):
            raise ValueError(f"{folder} contains {contents} of an earlier version; choose another output or delete it")
        storage.write_json(uri, {"digest": job_digest, "configuration": options})
        return
    claimed = storage.read_json(uri)
    if claimed["digest"] == job_digest:
        return
    differing = [name for name, value in options.items() if claimed["configuration"].get(name) != value]
    raise ValueError(
        f"{folder} contains {contents} of another configuration (different: {', '.join(differing) or 'the input'}); "
        f"set output to {folder}-{job_digest[:8]}, or delete the folder"
    )


def claimed_options(folder: str) -> dict[str, Any]:
    """Return the options in the claim of a folder; empty if the folder is not claimed."""
    uri = storage.join(folder, CONFIGURATION)
    return storage.read_json(uri)["configuration"] if storage.exists(uri) else {}


def is_finished(folder: str, marker: str) -> bool:
    """Return whether a folder contains `marker`, the file that its job writes last; log it if so."""
    finished = storage.exists(storage.join(folder, marker))
    if finished:
        print(f"{folder} is finished: nothing to do", flush=True)
    return finished


def read_receipts(folder: str, kind: str) -> dict[str, dict[str, Any]]:
    """Return the receipts of finished parts of a kind (`clips`, `records/test`, `answers`), by part name."""
    files = set(storage.list_folder(storage.join(folder, kind)))
    names = [name.removesuffix(".json") for name in storage.list_folder(storage.join(folder, RECEIPTS, kind))]
    names = [name for name in names if f"{name}.parquet" in files]
    with ThreadPoolExecutor(16) as pool:
        uris = [storage.join(folder, RECEIPTS, kind, f"{name}.json") for name in names]
        return dict(zip(names, pool.map(storage.read_json, uris), strict=True))


def write_part(folder: str, kind: str, name: str, table: "pa.Table", receipt: dict[str, Any]) -> dict[str, Any]:
    """Write a part's file, then its receipt; return the receipt with the path (`file`) and SHA-256 (`digest`) added."""
    file = f"{kind}/{name}.parquet"
    receipt = receipt | {"file": file, "digest": storage.write_table(storage.join(folder, file), table)}
    storage.write_json(storage.join(folder, RECEIPTS, kind, f"{name}.json"), receipt)
    return receipt


@dataclass
class FailureBudget:
    """Failed items of a job by reason, and the share of items that may fail.

    Attributes:
        items: noun of the items in the error ("clips").
        total: number of items, failed or not.
        max_share: largest share of `total` that may fail.
        remedy: first part of the advice in the error.
    """

    items: str
    total: int
    max_share: float
    remedy: str
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, reasons: Mapping[str, int], detail: str | None = None) -> None:
        """Add failed items, as counts by reason.

        Args:
            detail: error message of one of these items, as an example.

        Raises:
            ValueError: more than `max_share` of the items failed.
        """
        self.failed.update(reasons)
        if self.is_exceeded:
            example = f"; one of them: {detail}" if detail else ""
            failed = f"{self.failed.total()} of {self.total} {self.items} failed ({self.reasons}){example}"
            raise ValueError(f"{failed}. {self.remedy}, or raise max_failed_share (now {self.max_share:g})")

    @property
    def is_exceeded(self) -> bool:
        return self.failed.total() > self.max_share * self.total

    @property
    def reasons(self) -> str:
        """Failures as text: `missing 3, truncated 1`."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.failed.items()))


def dataset_of_parts(parts: Sequence["pa.Table"]) -> "ray.data.Dataset":
    """Return a Ray dataset with one block per part, without progress bars, which would garble a job's log."""
    import ray.data

    dataset = ray.data.from_arrow(list(parts))
    dataset.context.enable_progress_bars = False
    return dataset


def map_on_actors(
    dataset: "ray.data.Dataset",
    actor: type,
    arguments: Sequence[Any],
    workers: int,
    num_gpus: float = 0.0,
    num_cpus: float | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Map every block to a table on a pool of actors `actor(*arguments)`; yield the rows of each result.

    Args:
        workers: largest number of actors. Ray Data starts with one: a fixed number could take every CPU of the cluster
            and then wait for input from tasks that wait for a CPU.
        num_cpus: logical CPUs per actor; None is Ray Data's default.
    """
    import ray.data

    dataset = dataset.map_batches(
        actor,
        fn_constructor_args=tuple(arguments),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=workers,
            max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
            enable_true_multi_threading=True,
        ),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
    )
    # Callers write or count a result when it arrives; a prefetched one would be lost with the driver.
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield batch.to_pylist()
