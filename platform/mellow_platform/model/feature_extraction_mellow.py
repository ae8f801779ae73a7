"""Mellow's audio front end: waveforms of any length to log-mel spectrograms of one length."""

from dataclasses import asdict, fields

import numpy as np
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature

from mellow_platform.data.log_mel import FrontEnd, LogMel

from .configuration_mellow import encoder_config
from .encoders import AudioEncoderConfig


class MellowFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrograms of clips; the defaults are those that the published HTSAT was trained on.

    Args:
        sampling_rate: of the waveforms, in Hz.
        clip_seconds: length every clip is brought to.
        n_fft: samples in a periodic Hann window.
        hop_length: samples between frames.
        feature_size: number of Slaney mel bands.
        min_frequency, max_frequency: of the bands, in Hz.
        short_clip: what fills a shorter clip: `pad` (zeros) or `repeat` (the clip again).
            A longer clip is cut to its first `clip_seconds`.
    """

    model_input_names = ["input_features"]  # noqa: RUF012 (the form transformers reads)

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
        """Return the front end that an encoder hears."""
        return cls(**asdict(config.front_end), short_clip=short_clip)

    @property
    def front_end(self) -> FrontEnd:
        """The parameters of the spectrogram."""
        return FrontEnd(**{field.name: getattr(self, field.name) for field in fields(FrontEnd)})

    def check_hears_as(self, config: AudioEncoderConfig, encoder: str) -> None:
        """Make sure that spectrograms made here are what the encoder of `config`, named `encoder`, hears.

        Raises:
            ValueError: they are not; the message names what differs.
        """
        if differences := config.front_end.differences(self.front_end):
            raise ValueError(
                f"encoder {encoder} hears another front end than the clips went through ({differences}): "
                "run jobs/preprocess.py for this encoder, or take the one that the shards were made for"
            )

    @property
    def clip_samples(self) -> int:
        return self.front_end.clip_samples

    @property
    def num_frames(self) -> int:
        """Frames of one clip's spectrogram (1001 as published)."""
        return self.front_end.num_frames

    def to_dict(self) -> dict:
        return {key: value for key, value in super().to_dict().items() if key != "spectrogram"}

    def __call__(
        self, raw_speech: np.ndarray | list[np.ndarray], sampling_rate: int | None = None, **kwargs
    ) -> BatchFeature:
        """Return `input_features` [clips, frames, bands] of one waveform or a list of them.

        Raises:
            ValueError: `sampling_rate` is not the front end's; resample first.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"waveforms are at {sampling_rate} Hz, the model hears {self.sampling_rate} Hz: resample them"
            )
        clips = [raw_speech] if isinstance(raw_speech, np.ndarray) and raw_speech.ndim == 1 else raw_speech
        fitted = np.stack([self.spectrogram.fit(clip) for clip in clips])
        return BatchFeature({"input_features": self.spectrogram(fitted)})
