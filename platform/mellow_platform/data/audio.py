"""Decoding of audio files (wav, flac, ogg, mp3) to one channel at the model's rate."""

import io
import struct

import numpy as np
import soundfile
import soxr

from mellow_platform.data.audio_limits import AudioLimits

# Full scale is 1, and 2**31 where a file of floats holds integers. The power of samples of more than about 1e15
# overflows float32, and what a model makes of that is NaN.
LOUDEST = 1e10


class AudioError(ValueError):
    """A clip that cannot be used.

    Attributes:
        reason: short name to count by: `missing`, `empty`, `too_large`, `not_audio` (no format that is known here),
            `bad_header`, `too_long`, `truncated`, `no_samples`, `not_finite`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def check_size(size: int, limits: AudioLimits) -> None:
    """Make sure that a file of `size` bytes may be read.

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
        AudioError: the bytes are no usable audio; `reason` says why.
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
            raise AudioError("truncated", f"decoding breaks off: {error.error_string or error}") from error
        _check_length(file, len(channels), data)
        rate = file.samplerate
    if len(channels) == 0:
        raise AudioError("no_samples", "0 samples after decoding")
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        # Many times faster than a mean over so short an axis.
        waveform = sum(channels.T) / np.float32(channels.shape[1])
    if rate != sampling_rate:
        waveform = soxr.resample(waveform, rate, sampling_rate)
    if len(waveform) == 0:
        raise AudioError("no_samples", f"0 samples after resampling from {rate} Hz to {sampling_rate} Hz")
    if not is_bounded(waveform):
        raise AudioError("not_finite", f"the samples hold NaN, infinity or a value past {LOUDEST:g}")
    return waveform


def try_decode(data: bytes | AudioError, sampling_rate: int, limits: AudioLimits) -> np.ndarray | AudioError:
    """Return the waveform of `decode`, or the error that the clip has."""
    if isinstance(data, AudioError):
        return data
    try:
        return decode(data, sampling_rate, limits)
    except AudioError as error:
        return error


def is_bounded(samples: np.ndarray) -> bool:
    """Whether all samples, of which there is at least one, are numbers of at most `LOUDEST`."""
    # As Python's floats, whatever the samples are: half precision has no such bound. NaN is neither.
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
    """Make sure that all the audio is there that the file promises.

    libsndfile shortens what it promises to what is there for WAV and Ogg, so that these are looked at here; the length
    of an MP3 is a promise only where its encoder left one (a Xing or Info tag), and an estimate elsewhere.
    """
    promised = file.frames
    if file.format in ("WAV", "WAVEX"):
        promised = _wav_frames(data, promised)
    elif file.format == "MP3" and not (b"Xing" in data[: 1 << 16] or b"Info" in data[: 1 << 16]):
        promised = decoded
    elif file.format == "OGG" and not _ends_ogg(data):
        raise AudioError("truncated", f"the stream has no last page; {decoded} frames are left")
    if decoded < promised:
        raise AudioError("truncated", f"the header promises {promised} frames, and {decoded} are there")


def _ends_ogg(data: bytes) -> bool:
    """Whether the last page of an Ogg file says that its stream ends there."""
    place = data.rfind(b"OggS") + 5
    return place < len(data) and bool(data[place] & 4)


def _wav_frames(data: bytes, there: int) -> int:
    """Return the frames that a WAV header promises: `there`, where it does not say (a recorder's stream)."""
    place, frame_bytes = 12, 0
    while place + 8 <= len(data):
        name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        if name == b"fmt " and place + 22 <= len(data):
            frame_bytes = struct.unpack_from("<H", data, place + 20)[0]
        elif name == b"data":
            whole = size not in (0, 0xFFFFFFFF) and frame_bytes
            # A compressed WAV has blocks of several frames: whether its last is cut cannot be seen so.
            return size // frame_bytes if whole and there * frame_bytes <= size else there
        place += 8 + size + size % 2
    return there


def encode(waveform: np.ndarray, sampling_rate: int, container: str = "FLAC") -> bytes:
    """Return `waveform` [samples] or [samples, channels] in -1..1 as a 16-bit audio file."""
    buffer = io.BytesIO()
    subtype = None if container in ("OGG", "MP3") else "PCM_16"
    soundfile.write(buffer, waveform, sampling_rate, format=container, subtype=subtype)
    return buffer.getvalue()
