"""Log-mel spectrograms of clips, without transformers' model code: a process that decodes clips starts in a third of
the time of that import."""

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

SHORT_CLIP_RULES = ("pad", "repeat")


@dataclass(frozen=True)
class FrontEnd:
    """Parameters of an encoder's log-mel spectrogram; the defaults are Mellow's published ones.

    Attributes:
        feature_size: number of Slaney mel bands.
        sampling_rate: sampling rate of waveforms, in Hz.
        clip_seconds: length of every clip after padding or cutting.
        n_fft: samples in a periodic Hann window.
        hop_length: samples between frames.
        min_frequency, max_frequency: limits of the bands, in Hz.
    """

    feature_size: int = 64
    sampling_rate: int = 32_000
    clip_seconds: float = 10.0
    n_fft: int = 1024
    hop_length: int = 320
    min_frequency: float = 50.0
    max_frequency: float = 14_000.0

    @property
    def clip_samples(self) -> int:
        return round(self.clip_seconds * self.sampling_rate)

    @property
    def num_frames(self) -> int:
        """Frames of one clip's spectrogram (1001 as published)."""
        return 1 + self.clip_samples // self.hop_length

    def differences(self, other: "FrontEnd") -> str:
        """Return the values that differ from `other`, as text for an error message; empty if there are none."""
        values = asdict(other)
        return ", ".join(
            f"{name} {value:g} against {values[name]:g}"
            for name, value in asdict(self).items()
            if value != values[name]
        )


@dataclass(frozen=True)
class LogMel:
    """Spectrograms of one front end.

    Attributes:
        short_clip: filling of shorter clips: `pad` (zeros) or `repeat` (the clip itself). Longer clips are cut to their
            first `clip_seconds`.
    """

    front_end: FrontEnd
    short_clip: str = "pad"

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown rule."""
        if self.short_clip not in SHORT_CLIP_RULES:
            raise ValueError(f"short_clip {self.short_clip!r} is not one of {', '.join(SHORT_CLIP_RULES)}")

    @cached_property
    def filters(self) -> np.ndarray:
        """Slaney's mel filters [frequency bins, bands], float32."""
        return mel_filter_bank(
            num_frequency_bins=1 + self.front_end.n_fft // 2,
            num_mel_filters=self.front_end.feature_size,
            min_frequency=self.front_end.min_frequency,
            max_frequency=self.front_end.max_frequency,
            sampling_rate=self.front_end.sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        ).astype(np.float32)

    def fit(self, waveform: np.ndarray) -> np.ndarray:
        """Return float32 `waveform` [n] cut or filled to [clip_samples].

        Raises:
            ValueError: `waveform` has several channels, or no samples.
        """
        waveform = np.asarray(waveform, np.float32)
        if waveform.ndim != 1:
            raise ValueError(f"waveform of shape {waveform.shape}: average the channels to one first")
        if len(waveform) == 0:
            raise ValueError("waveform has 0 samples")
        missing = self.front_end.clip_samples - len(waveform)
        if missing <= 0:
            return waveform[: self.front_end.clip_samples]
        return np.pad(waveform, (0, missing), mode="wrap" if self.short_clip == "repeat" else "constant")

    def __call__(self, waveforms: np.ndarray) -> torch.Tensor:
        """Return decibels [clips, frames, bands] of fitted waveforms [clips, clip_samples]."""
        spectrum = torch.stft(
            torch.from_numpy(np.ascontiguousarray(waveforms)),
            self.front_end.n_fft,
            self.front_end.hop_length,
            window=torch.hann_window(self.front_end.n_fft),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        mel = power.transpose(1, 2) @ torch.tensor(self.filters)  # a copy, because arrays from Ray are read-only
        return 10.0 * torch.log10(torch.clamp(mel, min=1e-10))
