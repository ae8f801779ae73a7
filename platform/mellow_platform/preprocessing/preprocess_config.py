"""Options of jobs/preprocess.py."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.partners import Partner
from mellow_platform.option_values import Encoder, Features, Size
from mellow_platform.settings import (
    Decoder,
    Input,
    Names,
    Output,
    Section,
)


class PreprocessConfig(Section):
    """Convert audio and question-answer records to Parquet shards."""

    source: Literal["records", "webdataset", "parquet", "recordings"] = Field(
        "records",
        description="contents of --corpus: records (ReasonAQA's train.json, val.json, test.json), webdataset (tars "
        "of audio and .json), parquet (tables with audio bytes), or recordings (audio without questions)",
    )
    corpus: Input | None = Field(
        None, description="folder of the corpus; required unless --labels and --audio-root are set"
    )
    labels: Input | None = Field(
        None,
        description="labels.json or AudioSet segment list (*.csv), whose clips are added to the train split "
        "(default: no further clips)",
    )
    audio_root: Input | dict[str, Input] | None = Field(
        None,
        description="folder that paths of clips are relative to, or a folder per task name ({audiocaps: URI, "
        "clothov21: URI}) (default: the folder audio in --corpus)",
    )
    output: Output = Field(
        description="folder to write shards and manifest to; {hash} in it is replaced by the hash of options and input"
    )
    split: Names = Field(["train", "val", "test"], description="splits to read")
    limit: int | None = Field(
        None,
        ge=1,
        description="number of questions to read per split, or of clips if there are no questions (default: all)",
    )
    tasknames: Names | None = Field(
        None, description="task names of the questions to read, such as audiocaps,clothov21 (default: all)"
    )
    subtypes: Names | None = Field(
        None, description="subtypes of the questions to read, such as CLE,AudioCaps-MCQ (default: all)"
    )
    size: Size = Field("mellow-v0", description="model size")
    encoder_name: Encoder = Field(
        "htsat",
        description="audio encoder that the shards are for, which sets the log-mel front end; ignored if --encoder "
        "is set",
    )
    decoder: Decoder | None = Field(
        None,
        description="hub name, folder or GGUF file of the tokenizer; required for mellow-v0 unless --encoder is a "
        "Mellow model (default: a tokenizer trained on the questions)",
    )
    vocab_size: int = Field(1024, ge=300, description="vocabulary size of the tokenizer trained for mellow-tiny")
    features: Features = Field(
        "logmel",
        description="features stored per clip: logmel (spectrogram), encoder (frames of the frozen encoder), or "
        "waveform (whole recording at the model's rate, 16-bit FLAC)",
    )
    encoder: Input | None = Field(
        None,
        description="folder of the frozen encoder, or of a Mellow model, whose tokenizer is then the default of "
        "--decoder; required for --features encoder",
    )
    short_clip: Literal["pad", "repeat"] = Field(
        "pad", description="filling of clips shorter than 10 s: pad (zeros) or repeat (the clip itself)"
    )
    partner: Partner = Field(
        "same",
        description="second clip of questions about one clip: random (another clip of the split), same (the clip "
        "itself), or silence",
    )
    prompt_end_marker: bool = Field(True, description="end token after each prompt, as after answers")
    min_seconds: float = Field(0.0, ge=0, description="shortest clip, in seconds; shorter clips are quarantined")
    limits: AudioLimits = AudioLimits()
    max_failed_share: float = Field(
        0.05, ge=0, le=1, description="share of quarantined clips above which the job fails"
    )
    clips_per_shard: int = Field(64, ge=1, description="number of clips per shard")
    records_per_shard: int = Field(4096, ge=1, description="number of records per shard")
    decode_workers: int | None = Field(
        None,
        ge=1,
        description="number of tasks that decode clips or tokenise questions at a time (default: one per logical CPU "
        "of the cluster)",
    )
    encoder_workers: int = Field(2, ge=1, description="number of actors that run the encoder")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs per encoder actor")

    @model_validator(mode="after")
    def _check_encoder(self) -> "PreprocessConfig":
        if (self.features == "encoder") != bool(self.encoder):
            raise ValueError("set both `features: encoder` and `encoder`, or neither")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """Options that the bytes of the shards depend on."""
        excluded = {"output", "max_failed_share", "decode_workers", "encoder_workers", "gpus_per_worker"}
        return self.model_dump(exclude=excluded)

    @model_validator(mode="after")
    def _check_input(self) -> "PreprocessConfig":
        if self.source == "records" and not (self.corpus or (self.labels and self.audio_root)):
            raise ValueError("set `corpus`, a folder of records, or `labels` with `audio_root`")
        if self.source != "records" and (not self.corpus or self.labels or self.audio_root):
            raise ValueError(f"source: {self.source} reads only `corpus`: set it without `labels` and `audio_root`")
        return self
