"""Clips to shards of features on Ray Data: decoding, resampling, log-mel, and the frozen encoder once per clip.

A shard is a fixed range of the clips and one row of the Ray dataset. It is decoded, encoded in fixed batches and
written as a whole, so the same input gives files with the same bytes on any worker.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import torch

from mellow_platform.data import shards
from mellow_platform.data.audio import AudioError, decode, encode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.clip_reader import ClipAddress, read_clips
from mellow_platform.data.log_mel import FrontEnd, LogMel
from mellow_platform.data.partners import SILENCE
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.resumable import RETRY_LOST_WORKERS, dataset_of_parts, part_ranges, write_part

if TYPE_CHECKING:
    from mellow_platform.model.encoders import AudioEncoderConfig

ENCODER_BATCH = 16
SILENCE_ID = hashlib.sha256(SILENCE.encode()).hexdigest()
MIN_LEVEL = -120.0  # dB, level of digital silence

Shapes = dict[str, list[int]]


def feature_shapes(config: PreprocessConfig, front_end: FrontEnd, encoder: "AudioEncoderConfig") -> Shapes:
    """Return the shapes of a clip's stored arrays by name; [-1] is a recording of any length."""
    if config.features == "encoder":
        return {"frames": [encoder.num_frames, encoder.frame_size], "latent": [encoder.hidden_size]}
    if config.features == "waveform":
        return {"waveform": [-1]}
    return {"log_mel": [front_end.num_frames, front_end.feature_size]}


def shard_rows(clips: list[tuple[str, ClipAddress]], clips_per_shard: int) -> list[dict[str, Any]]:
    """Return one row per shard of `clips`, pairs of clip id and address in the set's order."""
    rows = []
    for name, places in part_ranges(len(clips), clips_per_shard).items():
        part = clips[places.start : places.stop]
        addresses = json.dumps([asdict(address) for _, address in part])
        rows.append({"name": name, "clip_ids": [clip_id for clip_id, _ in part], "addresses": addresses})
    return rows


def write_clip_shards(
    rows: list[dict[str, Any]], config: PreprocessConfig, log_mel: LogMel, shapes: Shapes
) -> Iterator[dict[str, Any]]:
    """Write the shards of `rows` on Ray Data, and yield each receipt when its shard is written."""
    if not rows:
        return
    dataset = dataset_of_parts([pa.Table.from_pylist([row]) for row in rows])
    decoding = ray.data.TaskPoolStrategy(size=config.decode_workers)
    dataset = dataset.map(
        decode_shard,
        fn_kwargs={
            "log_mel": log_mel,
            "limits": config.limits,
            "min_seconds": config.min_seconds,
            "whole": config.features == "waveform",
        },
        compute=decoding,
        **RETRY_LOST_WORKERS,
    )
    if config.encoder:
        dataset = dataset.map(
            EncodeShard,
            fn_constructor_args=(config.encoder,),
            # A fixed number of actors could take every CPU and wait for decoding tasks that wait for a CPU. Ray Data
            # restarts actors anyway; without `RETRY_LOST_WORKERS`, decoding is not fused into the processes with a GPU.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.encoder_workers),
            num_gpus=config.gpus_per_worker or None,
        )
    # After an encoder, writing takes no CPU: a shard is written as soon as it is encoded, even if decoding tasks take
    # every CPU. The number of these tasks is bounded, because each would start a process. Without an encoder, writing
    # is fused into the decoding task, which needs the same pool.
    after_encoder = {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=config.encoder_workers)}
    writing: dict[str, Any] = RETRY_LOST_WORKERS | (after_encoder if config.encoder else {"compute": decoding})
    written = dataset.map(write_clip_shard, fn_kwargs={"output": config.output, "shapes": shapes}, **writing)
    for row in written.iter_rows():
        yield json.loads(row["receipt"])


def decode_shard(
    row: dict[str, Any], log_mel: LogMel, limits: AudioLimits, min_seconds: float, whole: bool
) -> dict[str, Any]:
    """Decode the clips of a shard row.

    Adds `log_mel` fp16 [usable, frames, bands], or `waveform`, a FLAC file per clip, if `whole` recordings are stored;
    id, path, split, duration and level of usable clips; and `rejected`, JSON of clip id, reason and detail of others.

    Raises:
        ValueError: the bytes of a clip differ from the inventory.
    """
    torch.set_num_threads(1)
    front_end = log_mel.front_end
    rate = front_end.sampling_rate
    out: dict[str, Any] = {"name": row["name"], "expected": len(row["clip_ids"])}
    out |= {"clip_ids": [], "filepaths": [], "splits": [], "seconds": [], "levels": []}
    flacs: list[bytes] = []
    clips = 0 if whole else len(row["clip_ids"])
    features = np.empty((clips, front_end.num_frames, front_end.feature_size), np.float16)
    rejected = []
    addresses = [ClipAddress(**values) for values in json.loads(row["addresses"])]
    ids = dict(zip((address.path for address in addresses), row["clip_ids"], strict=True))
    recordings = [address for address in addresses if address.path != SILENCE]
    silence = [(address, b"") for address in addresses if address.path == SILENCE]
    for address, data in itertools.chain(read_clips(recordings, limits), silence):
        clip_id = ids[address.path]
        try:
            waveform = _decode_clip(address, data, clip_id, rate, limits, min_seconds, front_end.clip_samples)
        except AudioError as error:
            rejected.append({"clip_id": clip_id, "reason": error.reason, "detail": str(error)})
            continue
        power = float(np.dot(waveform, waveform)) / len(waveform)
        if whole:
            flacs.append(encode(np.clip(waveform, -1.0, 1.0), rate))
        else:
            features[len(out["clip_ids"])] = log_mel(log_mel.fit(waveform)[None])[0].numpy()
        out["clip_ids"].append(clip_id)
        out["filepaths"].append(address.path)
        out["splits"].append(address.split)
        out["seconds"].append(len(waveform) / rate)
        out["levels"].append(max(MIN_LEVEL, 10 * float(np.log10(power + 1e-30))))
    out["rejected"] = json.dumps(rejected)
    return out | ({"waveform": flacs} if whole else {"log_mel": features[: len(out["clip_ids"])]})


def _decode_clip(
    address: ClipAddress, data: Any, clip_id: str, rate: int, limits: AudioLimits, min_seconds: float, silence: int
) -> np.ndarray:
    if address.path == SILENCE:
        return np.zeros(silence, np.float32)
    if isinstance(data, AudioError) or hashlib.sha256(data).hexdigest() != clip_id:
        raise ValueError(
            f"clip {address.path}: {address.uri} has changed since the inventory was made; "
            "delete the output or choose another, and start again"
        )
    waveform = decode(data, rate, limits)
    if len(waveform) < min_seconds * rate:
        raise AudioError("too_short", f"{len(waveform) / rate:.2f} s long: the minimum is {min_seconds:g} s")
    return waveform


class EncodeShard:
    """Ray Data actor that replaces a shard row's `log_mel` with the output of the frozen encoder."""

    def __init__(self, encoder: str):
        from mellow_platform.model import load_encoder  # loads for seconds; decoding processes do not need it

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(1)
        self.encoder = load_encoder(encoder).eval().to(self.device)

    @torch.no_grad()
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        frames, latents = [], []
        for batch in torch.tensor(row.pop("log_mel")).split(ENCODER_BATCH):
            encoded = self.encoder(batch.to(self.device).float())
            frames.append(encoded.frames.half().cpu().numpy())
            latents.append(encoded.latent.half().cpu().numpy())
        config = self.encoder.config
        row["frames"] = np.concatenate([np.empty((0, config.num_frames, config.frame_size), np.float16), *frames])
        row["latent"] = np.concatenate([np.empty((0, config.hidden_size), np.float16), *latents])
        return row


def write_clip_shard(row: dict[str, Any], output: str, shapes: Shapes) -> dict[str, str]:
    """Write one shard of clips; return its receipt as JSON, with `expected`, `read` and `rejected` clips."""
    columns = {
        "clip_id": list(row["clip_ids"]),
        "filepath": list(row["filepaths"]),
        "split": list(row["splits"]),
        "seconds": list(row["seconds"]),
        "level": list(row["levels"]),
    }
    for name in shapes:
        columns[name] = [
            value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes() for value in row[name]
        ]
    receipt = {
        "name": row["name"],
        "expected": int(row["expected"]),
        "read": len(columns["clip_id"]),
        "seconds": [round(float(value), 4) for value in row["seconds"]],
        "levels": [round(float(value), 2) for value in row["levels"]],
        "clip_ids": columns["clip_id"],
        "rejected": json.loads(row["rejected"]),
    }
    table = pa.table(columns, schema=shards.clip_schema(shapes))
    return {"receipt": json.dumps(write_part(output, shards.CLIPS, row["name"], table, receipt))}
