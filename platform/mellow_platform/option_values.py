"""Valid values of options of several modules. Registries with the same names are in modules that import torch."""

from typing import Annotated, Literal

from pydantic import Field

Size = Literal["mellow-v0", "mellow-tiny"]
Features = Literal["logmel", "encoder", "waveform"]
Encoder = Literal["htsat", "cnn14", "whisper"]
Tagger = Literal["htsat", "cnn14"]  # encoders with a tagging head
Projection = Literal["mellow", "linear", "mlp", "transformer"]
Dtype = Literal["float32", "int8", "bfloat16"]
EngineDtype = Annotated[
    Dtype | None,
    Field(
        description="precision of the model: float32 or int8 on CPUs, bfloat16 on GPUs (default: float32 on CPUs, "
        "bfloat16 on GPUs)"
    ),
]

# Questions of ReasonAQA that a large language model wrote from captions: 70 % of the train split.
SYNTHETIC_SUBTYPES = ["Clotho-MCQ", "Clotho-Detail", "AudioCaps-MCQ", "AudioCaps-Detail"]
