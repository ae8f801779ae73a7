"""Limits of audio files, checked before decoding."""

from typing import Annotated

from pydantic import Field

from mellow_platform.settings import Section

MaxBytes = Annotated[int, Field(gt=0, description="largest file, in bytes")]
MaxSeconds = Annotated[float, Field(gt=0, description="longest recording, in seconds")]
MaxSamples = Annotated[
    int, Field(gt=0, description="largest number of samples over all channels; decoding takes 4 bytes per sample")
]
MaxChannels = Annotated[int, Field(ge=1, description="largest number of channels of a recording")]
MinRate = Annotated[int, Field(gt=0, description="lowest sampling rate, in Hz")]
MaxRate = Annotated[int, Field(gt=0, description="highest sampling rate, in Hz")]


class AudioLimits(Section):
    """Limits of audio files. Clips over a limit are quarantined before decoding."""

    max_bytes: MaxBytes = 256 << 20
    max_seconds: MaxSeconds = 600.0
    max_samples: MaxSamples = 1 << 26
    max_channels: MaxChannels = 32
    min_rate: MinRate = 1_000
    max_rate: MaxRate = 384_000
