"""Checkpoints of a run, and the log of steps that they commit.

The folder of a run contains

    checkpoints/step-00000500-<attempt>/   state.safetensors, progress.json, and complete.json, written last
    log/00000451-00000500.parquet          step, epoch, loss, learning rate, examples: steps since the last checkpoint
    position.json                          last step, committed or not, and the number of repeated steps

A checkpoint with the marker `complete.json` is complete; loading it checks the hashes in the marker. The log of a run
consists of the files that its latest complete checkpoint names: steps that a killed attempt computed after its last
checkpoint are in none of them.

Ray Train 2.60 has `ray.train.report(checkpoint=..., checkpoint_upload_mode=ASYNC)`. It is not used because one failed
upload ends the training function; its list of checkpoints is a JSON file that is overwritten in place, so that a
driver killed at that moment leaves a run that cannot be resumed; and other versions of Ray reject that file.
"""

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from mellow_platform import storage

logger = logging.getLogger(__name__)

FOLDER, LOG, POSITION = "checkpoints", "log", "position.json"
STATE, PROGRESS, MARKER = "state.safetensors", "progress.json", "complete.json"
LOG_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("examples", pa.list_(pa.string()), nullable=False),
    ]
)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, order=True)
class SavedCheckpoint:
    """A complete checkpoint: the state after `step` steps."""

    step: int
    uri: str


@dataclass(frozen=True)
class CheckpointStore:
    """Checkpoints and log of the run in the folder `run`."""

    run: str

    def checkpoints(self) -> list[SavedCheckpoint]:
        """Return the complete checkpoints, oldest first."""
        complete = []
        for name in storage.list_folder(storage.join(self.run, FOLDER)):
            uri = storage.join(self.run, FOLDER, name)
            if storage.exists(storage.join(uri, MARKER)):
                complete.append(SavedCheckpoint(step_of(name), uri))
        return sorted(complete)

    def read_progress(self, saved: SavedCheckpoint) -> dict[str, Any]:
        """Return the progress of a checkpoint: step, metrics, best validation, log files, number of workers."""
        return storage.read_json(storage.join(saved.uri, PROGRESS))

    def load_latest(self, step: int | None = None) -> tuple[SavedCheckpoint, Tensors, dict[str, Any]] | None:
        """Return the latest complete checkpoint (of `step`) with its tensors and progress; None if there is none.

        A damaged checkpoint is skipped with a warning.
        """
        for saved in reversed(self.checkpoints()):
            if step in (None, saved.step):
                try:
                    return saved, *self.load(saved)
                except ValueError as error:
                    logger.warning("%s; skipped", error)
        return None

    def load(self, saved: SavedCheckpoint) -> tuple[Tensors, dict[str, Any]]:
        """Return the tensors and the progress of a checkpoint.

        Raises:
            ValueError: a file is missing, or its hash differs from the marker.
        """
        folder = storage.local_copy(saved.uri)
        for name, digest in storage.read_json(str(folder / MARKER)).items():
            if not (folder / name).is_file() or storage.sha256(folder / name) != digest:
                raise ValueError(f"checkpoint {saved.uri}: {name} is damaged or missing")
        return load_file(folder / STATE), storage.read_json(str(folder / PROGRESS))

    def write(self, step: int, attempt: str, tensors: Tensors, progress: dict[str, Any]) -> SavedCheckpoint:
        """Write a checkpoint, its marker last.

        Args:
            attempt: name of this start of the run, so that no incomplete checkpoint of an earlier one is added to.
        """
        saved = SavedCheckpoint(step, storage.join(self.run, FOLDER, f"step-{step:08d}-{attempt}"))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(tensors, folder / STATE)
            storage.write_json(str(folder / PROGRESS), progress)
            digests = {file.name: storage.sha256(file) for file in sorted(folder.iterdir())}
            storage.upload(folder, saved.uri)
        storage.write_json(storage.join(saved.uri, MARKER), digests)
        return saved

    def prune(self, keep: int, besides: Iterable[int] = ()) -> None:
        """Delete checkpoints older than the latest `keep` complete ones, except complete ones of the steps `besides`.

        Newer incomplete ones are kept: another attempt of the run may be writing them.
        """
        complete = self.checkpoints()
        latest, steps = complete[-keep:], set(besides)
        kept = {saved.uri for saved in latest} | {saved.uri for saved in complete if saved.step in steps}
        for name in storage.list_folder(storage.join(self.run, FOLDER)):
            uri = storage.join(self.run, FOLDER, name)
            if uri not in kept and step_of(name) < latest[0].step:
                # The marker first: without it the rest is an incomplete checkpoint.
                storage.delete_folder(storage.join(uri, MARKER))
                storage.delete_folder(uri)

    def write_log(self, rows: list[dict[str, Any]]) -> str:
        """Write a log file of consecutive steps, and return its name."""
        name = f"{rows[0]['step']:08d}-{rows[-1]['step']:08d}.parquet"
        table = pa.Table.from_pylist(rows, schema=LOG_SCHEMA)
        storage.write_table(storage.join(self.run, LOG, name), table)
        return name

    def read_log(self) -> pa.Table:
        """Return the committed log of the run: one row per step, in order."""
        complete = self.checkpoints()
        if not complete:
            return LOG_SCHEMA.empty_table()
        names = self.read_progress(complete[-1])["log"]
        return storage.read_tables([storage.join(self.run, LOG, name) for name in names])


def step_of(name: str) -> int:
    """Return the step of a checkpoint from the name of its folder."""
    return int(name.split("-")[1])
