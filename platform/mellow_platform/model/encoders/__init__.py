"""Audio encoders by name.

To add one, write a class with its configuration (see `contract`) and add it to `ENCODERS`, and its name to `Encoder` in
config.py.
"""

import hashlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from mellow_platform import storage

from .cnn14 import Cnn14Config, Cnn14Encoder
from .contract import AudioEncoder, AudioEncoderConfig, AudioEncoderOutput, FrontEnd
from .htsat import HTSATConfig, HTSATEncoder
from .whisper import WhisperAudioConfig, WhisperAudioEncoder

MELLOW = "mellow"  # the whole model's `model_type`
# Name to configuration and network; the configuration's `model_type` is `mellow_<name>`.
ENCODERS: dict[str, tuple[Any, Any]] = {
    "htsat": (HTSATConfig, HTSATEncoder),
    "cnn14": (Cnn14Config, Cnn14Encoder),
    "whisper": (WhisperAudioConfig, WhisperAudioEncoder),
}

__all__ = [
    "ENCODERS",
    "AudioEncoder",
    "AudioEncoderConfig",
    "AudioEncoderOutput",
    "Cnn14Config",
    "Cnn14Encoder",
    "FrontEnd",
    "HTSATConfig",
    "HTSATEncoder",
    "WhisperAudioConfig",
    "WhisperAudioEncoder",
    "build_encoder",
    "encoder_digest",
    "encoder_parts",
    "holds_model",
    "load_encoder",
    "load_encoder_config",
]


def encoder_parts(name: str) -> tuple[Any, Any]:
    """Return configuration class and network class of the encoder `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ENCODERS:
        raise ValueError(f"audio encoder {name!r} does not exist; choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def build_encoder(config: AudioEncoderConfig) -> Any:
    """Return a fresh encoder of the type that `config` describes."""
    _, network = encoder_parts(config.model_type.removeprefix("mellow_"))
    return network(config)


def load_encoder(uri: str) -> Any:
    """Return the encoder in the folder `uri` in float32, whichever it is; a Mellow and a whole Whisper give theirs.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it holds something else.
    """
    folder, config = _folder(uri)
    if config.model_type == MELLOW:
        return AutoModel.from_pretrained(folder, dtype="float32").audio_encoder
    _, network = _parts_in(uri, config)
    return network.from_pretrained(folder, dtype="float32")


def load_encoder_config(uri: str) -> AudioEncoderConfig:
    """Return the configuration alone of what `load_encoder` loads."""
    folder, config = _folder(uri)
    if config.model_type == MELLOW:
        return config.audio_config
    kind, _ = _parts_in(uri, config)
    return kind.from_pretrained(folder)


def encoder_digest(encoder: torch.nn.Module) -> str:
    """Return the SHA-256 of an encoder's weights and statistics, by name: of equal ones it is equal."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        if value.is_floating_point():  # a count of batches changes nothing that is computed
            digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def holds_model(uri: str) -> bool:
    """Whether the folder `uri` holds a whole Mellow, not an encoder alone."""
    return _folder(uri)[1].model_type == MELLOW


def _folder(uri: str) -> tuple[str, Any]:
    folder = str(storage.local_copy(uri))
    return folder, AutoConfig.from_pretrained(folder)


def _parts_in(uri: str, config: Any) -> tuple[Any, Any]:
    name = config.model_type.removeprefix("mellow_")
    if name not in ENCODERS:
        raise ValueError(f"{uri} holds a {config.model_type}, not an audio encoder ({', '.join(ENCODERS)}) or a Mellow")
    return ENCODERS[name]
