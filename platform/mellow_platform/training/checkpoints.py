"""Checkpoints of a run, whole or not at all, and the log of steps that they commit.

A run's folder holds

    checkpoints/step-00000500-<attempt>/   state.safetensors, progress.json, and complete.json, written last
    log/00000451-00000500.parquet          step, epoch, loss and examples of the steps since the checkpoint before
    position.json                          how far the run has come, committed or not

A checkpoint is whole when its marker `complete.json` is there; the hashes in it are checked when it is read. The log
of a run is the pieces that its latest checkpoint names: steps that a killed attempt computed after its last checkpoint
are in none of them.

Ray Train 2.60 has `ray.train.report(checkpoint=..., checkpoint_upload_mode=ASYNC)`. It is not used because one
failed upload ends the training function; the list of checkpoints is one JSON file that is overwritten in place, so
that a driver killed at that moment leaves a run that cannot be resumed; and that file is refused by any other version
of Ray.
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
    """A whole checkpoint: the state after `step` steps."""

    step: int
    uri: str


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints and the log of the run whose folder is `run`."""

    run: str

    def saved(self) -> list[SavedCheckpoint]:
        """Return the whole checkpoints, oldest first."""
        found = []
        for name in storage.list_folder(storage.join(self.run, FOLDER)):
            uri = storage.join(self.run, FOLDER, name)
            if storage.exists(storage.join(uri, MARKER)):
                found.append(SavedCheckpoint(step_of(name), uri))
        return sorted(found)

    def progress_of(self, saved: SavedCheckpoint) -> dict[str, Any]:
        """Return what a checkpoint says besides its tensors."""
        return storage.read_json(storage.join(saved.uri, PROGRESS))

    def load_latest(self, step: int | None = None) -> tuple[SavedCheckpoint, Tensors, dict[str, Any]] | None:
        """Return the latest whole checkpoint (of `step`) with its tensors and progress; None where there is none.

        A checkpoint whose bytes are not those that were written is passed over with a warning.
        """
        for saved in reversed(self.saved()):
            if step in (None, saved.step):
                try:
                    return saved, *self.load(saved)
                except ValueError as error:
                    logger.warning("%s, and is passed over", error)
        return None

    def load(self, saved: SavedCheckpoint) -> tuple[Tensors, dict[str, Any]]:
        """Return tensors and progress of a checkpoint.

        Raises:
            ValueError: its files are not those that were written.
        """
        folder = storage.local_copy(saved.uri)
        for name, digest in storage.read_json(str(folder / MARKER)).items():
            if not (folder / name).is_file() or storage.sha256(folder / name) != digest:
                raise ValueError(f"checkpoint {saved.uri}: {name} is damaged or missing")
        return load_file(folder / STATE), storage.read_json(str(folder / PROGRESS))

    def write(self, step: int, attempt: str, tensors: Tensors, progress: dict[str, Any]) -> SavedCheckpoint:
        """Write a checkpoint, its marker last.

        Args:
            attempt: name of this start of the run: a torn checkpoint of an earlier one is never added to.
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
        """Delete all but the latest `keep` whole checkpoints and those of the steps `besides`, and what was torn.

        What is torn but not older than these may still be in writing, by another start of the run.
        """
        whole = self.saved()
        latest, also = whole[-keep:], set(besides)
        kept = {saved.uri for saved in latest} | {saved.uri for saved in whole if saved.step in also}
        for name in storage.list_folder(storage.join(self.run, FOLDER)):
            uri = storage.join(self.run, FOLDER, name)
            if uri not in kept and step_of(name) < latest[0].step:
                # A whole checkpoint stops being one before anything of it goes.
                storage.delete_folder(storage.join(uri, MARKER))
                storage.delete_folder(uri)

    def write_log(self, rows: list[dict[str, Any]]) -> str:
        """Write one piece of the log, of consecutive steps, and return its name."""
        name = f"{rows[0]['step']:08d}-{rows[-1]['step']:08d}.parquet"
        table = pa.Table.from_pylist(rows, schema=LOG_SCHEMA)
        storage.write_table(storage.join(self.run, LOG, name), table)
        return name

    def read_log(self) -> pa.Table:
        """Return the committed log of the run: a row a step, in order."""
        whole = self.saved()
        if not whole:
            return LOG_SCHEMA.empty_table()
        pieces = self.progress_of(whole[-1])["log"]
        return storage.read_tables([storage.join(self.run, LOG, name) for name in pieces])


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(name.split("-")[1])
