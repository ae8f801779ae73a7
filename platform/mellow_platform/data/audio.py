"""Decoding of audio files (wav, flac, ogg, mp3) to one channel at the model's rate."""

import io

import numpy as np
import soundfile
import soxr

MIN_RATE, MAX_RATE = 1_000, 384_000  # Hz; outside of it a header is damaged or forged
MAX_CHANNELS = 32


class AudioError(ValueError):
    """A clip that cannot be used.

    Attributes:
        reason: short name to count by: `empty`, `not_audio`, `no_samples`, `not_finite`, `too_long`, `bad_header`,
            `missing`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def decode(data: bytes, sampling_rate: int, max_seconds: float = 600.0) -> np.ndarray:
    """Return the waveform [samples], float32, channels averaged, resampled to `sampling_rate` Hz.

    Limits are checked on the header, before anything is decoded.

    Raises:
        AudioError: the bytes are no usable audio; `reason` says why.
    """
    if not data:
        raise AudioError("empty", "the file has 0 bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not (MIN_RATE <= file.samplerate <= MAX_RATE and 1 <= file.channels <= MAX_CHANNELS):
                raise AudioError(
                    "bad_header",
                    f"{file.channels} channels at {file.samplerate} Hz: expected 1 to {MAX_CHANNELS} "
                    f"at {MIN_RATE} to {MAX_RATE} Hz",
                )
            if file.frames > max_seconds * file.samplerate:
                raise AudioError(
                    "too_long", f"{file.frames / file.samplerate:.1f} s long: the limit is {max_seconds:g} s"
                )
            channels = file.read(dtype="float32", always_2d=True)
            rate = file.samplerate
    except soundfile.LibsndfileError as error:
        raise AudioError("not_audio", f"not decodable as wav, flac, ogg or mp3: {error.error_string}") from error
    if len(channels) == 0:
        raise AudioError("no_samples", "0 samples after decoding")
    if not np.isfinite(channels).all():
        raise AudioError("not_finite", "the samples hold NaN or infinity")
    waveform = channels.mean(axis=1)
    return waveform if rate == sampling_rate else soxr.resample(waveform, rate, sampling_rate)


def encode(waveform: np.ndarray, sampling_rate: int, container: str = "FLAC") -> bytes:
    """Return `waveform` [samples] or [samples, channels] in -1..1 as a 16-bit audio file."""
    buffer = io.BytesIO()
    subtype = None if container in ("OGG", "MP3") else "PCM_16"
    soundfile.write(buffer, waveform, sampling_rate, format=container, subtype=subtype)
    return buffer.getvalue()
