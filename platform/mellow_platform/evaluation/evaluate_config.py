"""Options of jobs/evaluate.py."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.option_values import EngineDtype
from mellow_platform.settings import (
    Input,
    Model,
    Name,
    Names,
    Output,
    Section,
    Separated,
)

Benchmark = Literal[
    "families", "mmau", "entailment", "difference", "clotho-aqa", "captioning", "mcq", "detail", "all", "noise"
]
Condition = Literal["audio", "noise", "text_only", "chance"]


class EndpointSection(Section):
    """OpenAI-compatible endpoint under evaluation. Its API key is the environment variable OPENAI_API_KEY."""

    model: Name | None = Field(
        None, description="value of `model` in requests (default: the first model that the endpoint lists)"
    )
    concurrency: int = Field(8, ge=1, description="simultaneous requests per worker")
    timeout: float = Field(120.0, gt=0, description="timeout of a request, in seconds")
    retries: int = Field(6, ge=0, description="retries per request, with exponential back-off")
    formats: Names = Field(
        ["wav", "mp3"], description="audio formats that are sent unchanged; others are converted to WAV (PCM, 16 bit)"
    )
    text_only: Literal["omit", "silence"] = Field(
        "omit",
        description="clips under the condition text_only: omit (no audio part), or silence, which Mellow's own "
        "endpoint needs",
    )


class EvaluateConfig(Section):
    """Answer the questions of benchmarks with a model and score the answers."""

    benchmark: Annotated[list[Benchmark], Separated] = Field(
        ["families"],
        description="benchmarks to score; `all` for every benchmark that has questions, `noise` beside another one "
        "for the condition noise",
    )
    model: Model = Field(
        description="model under evaluation: folder of a Mellow model; URL of an OpenAI-compatible endpoint "
        "(http://127.0.0.1:8000/v1); constant:TEXT for the same answer to every question; random for a random choice "
        "or, without choices, the answer to another question; predictions:URI for a file of answers"
    )
    shards: Input | None = Field(
        None,
        description="folder of shards that jobs/preprocess.py wrote with --features encoder; required unless "
        "--corpus or --mmau is set",
    )
    corpus: Input | None = Field(
        None, description="folder with SPLIT.json, instead of --shards; required unless --shards or --mmau is set"
    )
    audio_root: Input | dict[str, Input] | None = Field(
        None,
        description="folder that paths of clips are relative to, or a folder per task name ({audiocaps: URI, mmau: "
        "URI}) (default: the folder audio in --corpus, and for MMAU the folder of --mmau)",
    )
    mmau: Input | None = Field(
        None,
        description="MMAU's file: mmau-test-mini.json, or mmau-test.json, which has no answers; required for the "
        "benchmark mmau",
    )
    output: Output = Field(description="folder to write answers, scores and report to")
    split: Name = Field("test", description="split to answer")
    conditions: Annotated[list[Condition], Separated] = Field(
        ["audio", "noise", "text_only", "chance"],
        min_length=1,
        description="inputs to compare: audio (the clips), noise (Gaussian noise instead), text_only (no clips), "
        "chance (a random answer, no model)",
    )
    limit: int | None = Field(None, ge=1, description="number of questions per benchmark (default: all)")
    max_new_tokens: int = Field(256, ge=1, description="longest answer, in tokens")
    dtype: EngineDtype = None
    endpoint: EndpointSection = EndpointSection()
    limits: AudioLimits = AudioLimits()
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of questions without an answer above which the job fails"
    )
    against: Input | None = Field(
        None,
        description="output folder of another evaluation to compare with; the job fails if a score is significantly "
        "lower (default: no comparison)",
    )
    resamples: int = Field(1000, ge=100, description="bootstrap samples of clips per confidence interval")
    seed: int = Field(0, ge=0, description="seed of noise, chance answers and bootstrap samples")
    examples: int = Field(6, ge=0, description="example questions per benchmark in the report, worst first")
    rows_per_part: int = Field(128, ge=1, description="questions per output file; a file is written whole")
    batch_size: int = Field(64, ge=1, description="questions that an actor answers at once")
    workers: int = Field(2, ge=1, description="number of actors that run the model or call the endpoint")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs per actor")

    @property
    def runs_model(self) -> bool:
        """Whether a model or endpoint receives the questions, as opposed to a baseline without a model."""
        return self.model != "random" and not self.model.startswith(("constant:", "predictions:"))

    @property
    def is_remote(self) -> bool:
        """Whether the model is an endpoint."""
        return self.model.startswith(("http://", "https://"))

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that answers and their files depend on."""
        names = "model", "split", "max_new_tokens", "dtype", "limits", "seed", "rows_per_part"
        return self.model_dump(include={*names}) | {"endpoint": self.endpoint.model_dump(include={"formats"})}

    @model_validator(mode="after")
    def _move_noise_to_conditions(self) -> "EvaluateConfig":
        if "noise" in self.benchmark:
            self.benchmark.remove("noise")
            self.conditions += [] if "noise" in self.conditions else ["noise"]
        if not self.benchmark:
            raise ValueError("benchmark: noise is a control of other benchmarks; add one, as in mcq,noise")
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> "EvaluateConfig":
        if self.shards and self.corpus:
            raise ValueError("`shards` and `corpus` are both set; set one of them")
        if not (self.shards or self.corpus or self.mmau):
            raise ValueError("no questions; set `shards`, or `corpus` with `audio_root`, or `mmau`")
        if self.is_remote and (parts := urlsplit(self.model)) and (parts.username or parts.query):
            raise ValueError("model: the URL contains a user name, password or query; set OPENAI_API_KEY instead")
        if self.runs_model and set(self.conditions) == {"chance"}:
            raise ValueError("conditions: chance needs no model; add another condition, or set model: random")
        if self.against and self.runs_model and "audio" not in self.conditions:
            raise ValueError("against: scores with audio are compared; add audio to conditions")
        if self.against and self.against == self.output:
            raise ValueError(f"against {self.against} is the same folder as `output`; set another evaluation's folder")
        if self.shards and self.is_remote:
            raise ValueError("`shards` contain no audio to send to an endpoint; set `corpus` with `audio_root`")
        return self
