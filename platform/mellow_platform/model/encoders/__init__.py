"""Audio encoders by name.

To add one, write a class and its configuration (see `contract`), add them to `ENCODERS`, and the name to `Encoder` in
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

MELLOW = "mellow"  # `model_type` of a complete model
# Configuration and network by name; the `model_type` of the configuration is `mellow_<name>`.
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
        ValueError: unknown name.
    """
    if name not in ENCODERS:
        raise ValueError(f"audio encoder {name!r} does not exist; choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def build_encoder(config: AudioEncoderConfig) -> Any:
    """Return a new encoder of the type of `config`."""
    _, network = encoder_parts(config.model_type.removeprefix("mellow_"))
    return network(config)


def load_encoder(uri: str) -> Any:
    """Load the encoder of any type in the folder `uri`, in float32; the folder may hold a Mellow or a complete Whisper.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder contains another type of model.
    """
    folder, config = _folder(uri)
    if config.model_type == MELLOW:
        return AutoModel.from_pretrained(folder, dtype="float32").audio_encoder
    _, network = _parts_in(uri, config)
    return network.from_pretrained(folder, dtype="float32")


def load_encoder_config(uri: str) -> AudioEncoderConfig:
    """Load only the configuration of the encoder in the folder `uri`."""
    folder, config = _folder(uri)
    if config.model_type == MELLOW:
        return config.audio_config
    kind, _ = _parts_in(uri, config)
    return kind.from_pretrained(folder)


def encoder_digest(encoder: torch.nn.Module) -> str:
    """Return the SHA-256 of an encoder's weights and statistics, in order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        if value.is_floating_point():  # a batch count does not affect outputs
            digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def holds_model(uri: str) -> bool:
    """Return whether the folder `uri` contains a complete Mellow, not only an encoder."""
    return _folder(uri)[1].model_type == MELLOW


def _folder(uri: str) -> tuple[str, Any]:
    folder = str(storage.local_copy(uri))
    return folder, AutoConfig.from_pretrained(folder)


def _parts_in(uri: str, config: Any) -> tuple[Any, Any]:
    name = config.model_type.removeprefix("mellow_")
    if name not in ENCODERS:
        raise ValueError(
            f"{uri} contains a {config.model_type}; expected an audio encoder ({', '.join(ENCODERS)}) or a Mellow"
        )
    return ENCODERS[name]
