"""Mellow's audio front end: log-mel spectrograms of fixed length from waveforms of any length."""

from dataclasses import asdict, fields

import numpy as np
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature

from mellow_platform.data.log_mel import FrontEnd, LogMel

from .configuration_mellow import encoder_config
from .encoders import AudioEncoderConfig


class MellowFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrograms of clips; the defaults are those of the published HTSAT's training.

    Args:
        sampling_rate: sampling rate of the waveforms, in Hz.
        clip_seconds: length of every clip after padding or cutting, in seconds.
        n_fft: length of the periodic Hann window, in samples.
        hop_length: samples between frames.
        feature_size: number of Slaney mel bands.
        min_frequency, max_frequency: frequency range of the bands, in Hz.
        short_clip: padding of a shorter clip: `pad` (zeros) or `repeat` (copies of the clip). A longer clip is cut to
            its first `clip_seconds`.
    """

    model_input_names = ["input_features"]  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        feature_size: int = 64,
        sampling_rate: int = 32_000,
        clip_seconds: float = 10.0,
        n_fft: int = 1024,
        hop_length: int = 320,
        min_frequency: float = 50.0,
        max_frequency: float = 14_000.0,
        short_clip: str = "pad",
        padding_value: float = 0.0,
        **kwargs,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.clip_seconds = clip_seconds
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.min_frequency = min_frequency
        self.max_frequency = max_frequency
        self.short_clip = short_clip
        self.spectrogram = LogMel(self.front_end, short_clip)

    @classmethod
    def from_size(cls, size: str, short_clip: str = "pad", encoder: str = "htsat") -> "MellowFeatureExtractor":
        """Return the front end of a named encoder at a named size (see `MellowConfig.from_size`)."""
        return cls.for_encoder(encoder_config(size, encoder=encoder), short_clip)

    @classmethod
    def for_encoder(cls, config: AudioEncoderConfig, short_clip: str = "pad") -> "MellowFeatureExtractor":
        """Return the front end of an encoder."""
        return cls(**asdict(config.front_end), short_clip=short_clip)

    @property
    def front_end(self) -> FrontEnd:
        """Parameters of the spectrogram."""
        return FrontEnd(**{field.name: getattr(self, field.name) for field in fields(FrontEnd)})

    def check_matches(self, config: AudioEncoderConfig, encoder: str) -> None:
        """Check that this front end is that of the encoder of `config`, named `encoder` in the error.

        Raises:
            ValueError: their parameters differ; the message lists the differences.
        """
        if differences := config.front_end.differences(self.front_end):
            raise ValueError(
                f"encoder {encoder} has another front end than the preprocessed clips ({differences}); "
                "run jobs/preprocess.py for this encoder, or use the encoder of the shards"
            )

    @property
    def clip_samples(self) -> int:
        return self.front_end.clip_samples

    @property
    def num_frames(self) -> int:
        """Frames in the spectrogram of a clip (1001 as published)."""
        return self.front_end.num_frames

    def to_dict(self) -> dict:
        return {key: value for key, value in super().to_dict().items() if key != "spectrogram"}

    def __call__(
        self, raw_speech: np.ndarray | list[np.ndarray], sampling_rate: int | None = None, **kwargs
    ) -> BatchFeature:
        """Return `input_features` [clips, frames, bands] of one waveform or a list of waveforms.

        Raises:
            ValueError: `sampling_rate` is not the front end's.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"waveforms are at {sampling_rate} Hz; resample them to the model's {self.sampling_rate} Hz"
            )
        clips = [raw_speech] if isinstance(raw_speech, np.ndarray) and raw_speech.ndim == 1 else raw_speech
        fitted = np.stack([self.spectrogram.fit(clip) for clip in clips])
        return BatchFeature({"input_features": self.spectrogram(fitted)})
