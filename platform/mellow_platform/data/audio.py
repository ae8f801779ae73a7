"""Decoding of audio files (wav, flac, ogg, mp3) to one channel at the model's rate."""

import io
import struct

import numpy as np
import soundfile
import soxr

from mellow_platform.data.audio_limits import AudioLimits

# Full scale is 1, or 2**31 if a file of floats contains integers. The power of samples above about 1e15 overflows
# float32, and the model then returns NaN.
LOUDEST = 1e10


class AudioError(ValueError):
    """Failure to read or decode a clip.

    Attributes:
        reason: short name for counts: `missing`, `empty`, `too_large`, `not_audio` (unknown format), `bad_header`,
            `too_long`, `too_short`, `truncated`, `no_samples`, `not_finite`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def check_size(size: int, limits: AudioLimits) -> None:
    """Check the size of a file, in bytes, before it is read.

    Raises:
        AudioError: `empty` or `too_large`.
    """
    if size == 0:
        raise AudioError("empty", "the file has 0 bytes")
    if size > limits.max_bytes:
        raise AudioError("too_large", f"the file has {size} bytes: the limit is {limits.max_bytes}")


def decode(data: bytes, sampling_rate: int, limits: AudioLimits | None = None) -> np.ndarray:
    """Return the waveform [samples], float32, channels averaged, resampled to `sampling_rate` Hz.

    Raises:
        AudioError: the bytes are not usable audio; `reason` is the cause.
    """
    limits = limits or AudioLimits()
    check_size(len(data), limits)
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise AudioError("not_audio", f"not decodable as wav, flac, ogg or mp3: {error.error_string}") from error
    with file:
        _check_header(file, limits)
        try:
            channels = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError("truncated", f"decoding stopped early: {error.error_string or error}") from error
        _check_length(file, len(channels), data)
        rate = file.samplerate
    if len(channels) == 0:
        raise AudioError("no_samples", "0 samples after decoding")
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        # Many times faster than a mean over an axis this short.
        waveform = sum(channels.T) / np.float32(channels.shape[1])
    if rate != sampling_rate:
        waveform = soxr.resample(waveform, rate, sampling_rate)
    if len(waveform) == 0:
        raise AudioError("no_samples", f"0 samples after resampling from {rate} Hz to {sampling_rate} Hz")
    if not is_bounded(waveform):
        raise AudioError("not_finite", f"the samples contain NaN, infinity or a value above {LOUDEST:g}")
    return waveform


def try_decode(data: bytes | AudioError, sampling_rate: int, limits: AudioLimits) -> np.ndarray | AudioError:
    """Return the waveform of `decode`, or its error."""
    if isinstance(data, AudioError):
        return data
    try:
        return decode(data, sampling_rate, limits)
    except AudioError as error:
        return error


def is_bounded(samples: np.ndarray) -> bool:
    """Return whether all samples, at least one, are numbers from -`LOUDEST` to `LOUDEST`."""
    # Compared as Python floats, because half precision cannot represent the bound. Both are false for NaN.
    return float(samples.max()) <= LOUDEST and float(samples.min()) >= -LOUDEST


def _check_header(file: soundfile.SoundFile, limits: AudioLimits) -> None:
    if not (limits.min_rate <= file.samplerate <= limits.max_rate and 1 <= file.channels <= limits.max_channels):
        raise AudioError(
            "bad_header",
            f"{file.channels} channels at {file.samplerate} Hz: expected 1 to {limits.max_channels} "
            f"at {limits.min_rate} to {limits.max_rate} Hz",
        )
    if file.frames > limits.max_seconds * file.samplerate:
        raise AudioError(
            "too_long", f"{file.frames / file.samplerate:.1f} s long: the limit is {limits.max_seconds:g} s"
        )
    if file.frames * file.channels > limits.max_samples:
        raise AudioError(
            "too_large", f"{file.frames} frames of {file.channels} channels: the limit is {limits.max_samples} samples"
        )


def _check_length(file: soundfile.SoundFile, decoded: int, data: bytes) -> None:
    """Check that a file contains as many frames as its header declares.

    libsndfile reduces the declared frames of WAV and Ogg to the frames in the file, so these formats are checked here.
    The length of an MP3 is exact only if its encoder wrote it (a Xing or Info tag); otherwise it is an estimate.

    Raises:
        AudioError: `truncated`.
    """
    declared = file.frames
    if file.format in ("WAV", "WAVEX"):
        declared = _wav_frames(data, declared)
    elif file.format == "MP3" and not (b"Xing" in data[: 1 << 16] or b"Info" in data[: 1 << 16]):
        declared = decoded
    elif file.format == "OGG" and not _ends_ogg(data):
        raise AudioError("truncated", f"the stream has no last page; {decoded} frames were decoded")
    if decoded < declared:
        raise AudioError("truncated", f"the header declares {declared} frames; the file contains {decoded}")


def _ends_ogg(data: bytes) -> bool:
    """Return whether the last page of an Ogg file is marked as the end of its stream."""
    position = data.rfind(b"OggS") + 5
    return position < len(data) and bool(data[position] & 4)


def _wav_frames(data: bytes, decodable: int) -> int:
    """Return the frames that a WAV header declares, or `decodable` if it has no size (a recorder's stream)."""
    position, frame_bytes = 12, 0
    while position + 8 <= len(data):
        name, size = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        if name == b"fmt " and position + 22 <= len(data):
            frame_bytes = struct.unpack_from("<H", data, position + 20)[0]
        elif name == b"data":
            has_size = size not in (0, 0xFFFFFFFF) and frame_bytes
            # Blocks of a compressed WAV contain several frames: the size does not show whether the last one is cut.
            return size // frame_bytes if has_size and decodable * frame_bytes <= size else decodable
        position += 8 + size + size % 2
    return decodable


def encode(waveform: np.ndarray, sampling_rate: int, container: str = "FLAC") -> bytes:
    """Return `waveform` [samples] or [samples, channels] in -1..1 as a 16-bit audio file."""
    buffer = io.BytesIO()
    subtype = None if container in ("OGG", "MP3") else "PCM_16"
    soundfile.write(buffer, waveform, sampling_rate, format=container, subtype=subtype)
    return buffer.getvalue()
