"""Saving and loading Hugging Face folders at any URI."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedModel

from mellow_platform import storage
from mellow_platform.model.card import CARD, model_card
from mellow_platform.model.modeling_mellow import MellowForConditionalGeneration
from mellow_platform.model.processing_mellow import MellowProcessor

# Size of a weights file. Loading memory-maps each file and releases it after copying: with small files an engine's peak
# memory is near the size of the weights, while one large file would double it.
SHARD_SIZE = "100MB"


def save_pretrained(part: Any, uri: str) -> None:
    """Save a part (model, encoder or processor) to the folder `uri`."""
    sharded = {"max_shard_size": SHARD_SIZE} if isinstance(part, PreTrainedModel) else {}
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder, **sharded)
        storage.upload(folder, uri)


def save_model(model: MellowForConditionalGeneration, processor: MellowProcessor, uri: str, **card: Any) -> None:
    """Save a model with its processor and its model card to the folder `uri`; `card` is passed to `model_card`."""
    save_pretrained(model, uri)
    save_pretrained(processor, uri)
    storage.write_bytes(storage.join(uri, CARD), str(model_card(model, processor, **card)).encode())


def load_processor(uri: str) -> MellowProcessor:
    """Load the processor in the folder `uri`.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    return AutoProcessor.from_pretrained(storage.local_copy(uri))


def load_model(uri: str) -> tuple[MellowForConditionalGeneration, MellowProcessor]:
    """Load model and processor from the folder `uri`, in float32 and evaluation mode, with merged adapters.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    folder = storage.local_copy(uri)
    model = MellowForConditionalGeneration.from_pretrained(folder, dtype="float32")
    return model.merge_lora().eval(), AutoProcessor.from_pretrained(folder)


def model_digest(folder: Path) -> str:
    """Return the SHA-256 over the files of a model folder, without its card."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CARD)
    lines = "".join(f"{file.relative_to(folder)} {storage.sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
