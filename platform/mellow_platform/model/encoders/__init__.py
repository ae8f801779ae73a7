"""Audio encoders by name. One more is a class with its configuration (see `contract`) and a line in `ENCODERS`."""

from typing import Any

from transformers import AutoConfig

from mellow_platform import storage

from .cnn14 import Cnn14Config, Cnn14Encoder
from .contract import AudioEncoder, AudioEncoderConfig, AudioEncoderOutput, FrontEnd
from .htsat import HTSATConfig, HTSATEncoder
from .whisper import WhisperAudioConfig, WhisperAudioEncoder

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
    "encoder_parts",
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
    """Return the encoder in the folder `uri` in float32, whichever it is; a whole Whisper's folder gives its encoder.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it holds something else.
    """
    folder, (_, network) = _folder_parts(uri)
    return network.from_pretrained(folder, dtype="float32")


def load_encoder_config(uri: str) -> AudioEncoderConfig:
    """Return the configuration alone of what `load_encoder` loads."""
    folder, (config, _) = _folder_parts(uri)
    return config.from_pretrained(folder)


def _folder_parts(uri: str) -> tuple[str, tuple[Any, Any]]:
    folder = str(storage.local_copy(uri))
    model_type = AutoConfig.from_pretrained(folder).model_type
    name = model_type.removeprefix("mellow_")
    if name not in ENCODERS:
        raise ValueError(f"{uri} holds a {model_type}, not an audio encoder ({', '.join(ENCODERS)})")
    return folder, ENCODERS[name]
