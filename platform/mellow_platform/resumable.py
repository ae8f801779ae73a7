"""What a job needs to be resumed after a kill: preprocess, predict, evaluate and synthesize are built on this.

A job cuts its work into parts, each a fixed range of its input. Its output folder contains

    configuration.json            options that the output depends on, with a digest of them and of the input; first
    <kind>/<part>.parquet         rows of a part, written as one file
    receipts/<kind>/<part>.json   written after the part's file: the part is done

Name and bytes of a part's file are a function of options and input. A job that was killed skips parts with a receipt;
a part that is done twice overwrites itself.

`ray.data.checkpoint.CheckpointConfig` of Ray 2.60 is not used. It skips rows that were written and batches the others
again, so that file names contain a new uuid per run and their rows depend on the moment of the kill; it commits by
renaming, which object storage does not have; it skips rows only behind a Read operator, by an id that one output row
may have, although a question can have several answers; and it deletes its ids at the end of a run, so that a finished
job would do everything again.
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
# Ray repeats the work of a lost worker or node without limit; an error of the project's own code ends the job at once.
RETRY_LOST_WORKERS = {"max_retries": -1}
CALLS_PER_ACTOR = 2  # the next part starts while the last answers of one are written; one would leave an engine idle


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def part_name(number: int) -> str:
    """Return the name of part `number`, which its file and its receipt have: 000007."""
    return f"{number:06d}"


def part_ranges(items: int, size: int) -> dict[str, range]:
    """Return the items of each part, `size` of them but for the last, by the part's name."""
    starts = range(0, items, size)
    return {part_name(number): range(start, min(start + size, items)) for number, start in enumerate(starts)}


def claim(folder: str, options: dict[str, Any], depends_on: str, contents: str, marker: str) -> None:
    """Reserve an output folder for a job, or check that it is reserved for this one.

    Args:
        options: options that the output depends on, for the error.
        depends_on: digest of everything that the output depends on: options, input, model.
        contents: noun of the output in errors ("shards").
        marker: file that the job writes last.

    Raises:
        ValueError: the folder is reserved for another job, finished or not; the message names the options that differ.
    """
    uri = storage.join(folder, CONFIGURATION)
    if not storage.exists(uri):
        if storage.exists(storage.join(folder, marker)):
            raise ValueError(f"{folder} contains {contents} of an earlier version; choose another output or delete it")
        storage.write_json(uri, {"digest": depends_on, "configuration": options})
        return
    claimed = storage.read_json(uri)
    if claimed["digest"] == depends_on:
        return
    differing = [name for name, value in options.items() if claimed["configuration"].get(name) != value]
    raise ValueError(
        f"{folder} contains {contents} of another configuration (different: {', '.join(differing) or 'the input'}); "
        f"set output to {folder}-{depends_on[:8]}, or delete the folder"
    )


def claimed_options(folder: str) -> dict[str, Any]:
    """Return the options that a folder is reserved with; empty if it is not reserved."""
    uri = storage.join(folder, CONFIGURATION)
    return storage.read_json(uri)["configuration"] if storage.exists(uri) else {}


def is_finished(folder: str, marker: str) -> bool:
    """Return whether a job wrote its last file, `marker`; if so, say it in the log."""
    finished = storage.exists(storage.join(folder, marker))
    if finished:
        print(f"{folder} is finished: nothing to do", flush=True)
    return finished


def read_receipts(folder: str, kind: str) -> dict[str, dict[str, Any]]:
    """Return the receipts of the parts of a kind (`clips`, `records/test`, `answers`) that are done, by name."""
    files = set(storage.list_folder(storage.join(folder, kind)))
    names = [name.removesuffix(".json") for name in storage.list_folder(storage.join(folder, RECEIPTS, kind))]
    names = [name for name in names if f"{name}.parquet" in files]
    with ThreadPoolExecutor(16) as pool:
        uris = [storage.join(folder, RECEIPTS, kind, f"{name}.json") for name in names]
        return dict(zip(names, pool.map(storage.read_json, uris), strict=True))


def write_part(folder: str, kind: str, name: str, table: "pa.Table", receipt: dict[str, Any]) -> dict[str, Any]:
    """Write a part's file, then its receipt; return the receipt with the file's path in the folder and its SHA-256."""
    file = f"{kind}/{name}.parquet"
    receipt = receipt | {"file": file, "digest": storage.write_table(storage.join(folder, file), table)}
    storage.write_json(storage.join(folder, RECEIPTS, kind, f"{name}.json"), receipt)
    return receipt


@dataclass
class FailureBudget:
    """Failed items of a job, counted by reason, against the share of them that is allowed.

    Attributes:
        items: noun of the items in the error ("clips").
        total: number of items.
        max_share: largest share of failed items.
        remedy: start of the advice in the error.
    """

    items: str
    total: int
    max_share: float
    remedy: str
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, reasons: Mapping[str, int], detail: str | None = None) -> None:
        """Count failed items by reason.

        Args:
            detail: error of one of them.

        Raises:
            ValueError: more items failed than the share allows.
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
    """Return a Ray Data set with one block per part, without progress bars: a job's log is lines of text."""
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
    """Call `actor(*arguments)`, which maps a table to a table, on every block; yield the rows of each result.

    Args:
        workers: largest number of actors. Ray Data starts with one: a fixed number could take every CPU of the cluster
            and wait for input from tasks that wait for a CPU.
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
    # Parts are written as soon as they arrive: a prefetched one would be lost with the driver.
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield batch.to_pylist()
