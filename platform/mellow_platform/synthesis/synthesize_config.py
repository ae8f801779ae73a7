"""Options of jobs/synthesize.py."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mellow_platform.settings import (
    Decoder,
    Input,
    Metavar,
    Name,
    Names,
    Output,
    Section,
    Separated,
)


class LanguageModelSection(Section):
    """Requests to the endpoint of --writer endpoint. The corpus does not depend on these options."""

    concurrency: int = Field(16, ge=1, description="simultaneous requests per actor")
    requests_per_minute: float | None = Field(
        None,
        gt=0,
        description="most requests per minute over all actors, retries included (default: no limit but "
        "endpoint.concurrency)",
    )
    retries: int = Field(
        8, ge=0, description="retries per request after a full server (429), a server error (5xx) or a lost connection"
    )
    timeout: float = Field(120.0, gt=0, description="timeout of a request, in seconds")
    price_input: float = Field(0.0, ge=0, description="price of prompts in USD per million tokens, for the report")
    price_output: float = Field(0.0, ge=0, description="price of answers in USD per million tokens, for the report")


class VLLMSection(Section):
    """Engine of --writer vllm."""

    model: Decoder | None = Field(
        None, description="hub name or folder of the language model; required for --writer vllm"
    )
    batch_size: int = Field(64, ge=1, description="requests per call of an engine")
    engine: dict[str, Any] = Field(
        {}, description="engine arguments of vLLM, such as {tensor_parallel_size: 2} (default: vLLM's own values)"
    )


class SamplingSection(Section):
    """Sampling of the language model of --writer endpoint or vllm."""

    temperature: float | None = Field(0.7, ge=0, le=2, description="sampling temperature; null leaves it to the server")
    max_tokens: int | None = Field(2048, ge=1, description="longest answer, in tokens; null leaves it to the server")
    seed: int | None = Field(
        0, ge=0, description="seed of the first attempt of a request; each further attempt adds 1; null sends no seed"
    )
    extra: dict[str, Any] = Field(
        {}, description="further fields of a request's body, such as {max_completion_tokens: 4096} (default: none)"
    )
    response_format: Literal["json_schema", "json_schema_unbounded", "json_object", "none"] = Field(
        "json_schema",
        description="response format that the endpoint enforces: json_schema; json_schema_unbounded, without lengths"
        " of lists, for servers that refuse them (Anthropic's, Gemini's); json_object; or none. Answers are validated"
        " against the schema in every case",
    )


class FiltersSection(Section):
    """Thresholds that keep a question out of the corpus."""

    min_question_words: int = Field(
        3, ge=1, description="fewest words of a question; shorter ones are rejected as too_short"
    )
    max_question_words: int = Field(
        60, ge=1, description="most words of a question with its choices; longer ones are rejected as too_long"
    )
    max_answer_words: int = Field(
        120, ge=1, description="most words of an answer; longer ones are rejected as too_long"
    )
    similarity: float = Field(
        0.7,
        gt=0,
        le=1,
        description="share of common word pairs from which two questions on one clip are near_duplicate",
    )
    languages: Names = Field(["en"], description="ISO 639-1 codes of the languages to keep")


class SynthesizeConfig(Section):
    """Write questions in ReasonAQA's format from captions."""

    captions: Annotated[list[Input], Separated] = Field(
        description="files of captions: AudioCaps or Clotho .csv; .parquet, .csv, .json or .jsonl with columns clip,"
        " caption and optionally split; ReasonAQA's .json; labels.json"
    )
    output: Output = Field(description="folder to write the corpus to")
    taskname: Name = Field("captions", pattern=r"^\w+$", description="task name for captions from files that set none")
    clip_name: Annotated[str, Metavar("TEMPLATE")] = Field(
        "{youtube_id}.wav",
        description="path of an AudioCaps clip, a template of {youtube_id}, {start_time} and {audiocap_id}",
    )
    limit: int | None = Field(None, ge=1, description="number of captions to read per file (default: all)")
    kinds: Annotated[list[Literal["detail", "mcq", "difference", "entailment"]], Separated, Field(min_length=1)] = (
        Field(["detail", "mcq", "difference", "entailment"], description="kinds of questions to write per caption")
    )
    questions: int = Field(
        5,
        ge=1,
        le=20,
        description="detail questions, and multiple-choice questions, per caption; --writer rules writes at most as "
        "many",
    )
    writer: Literal["rules", "endpoint", "vllm"] = Field(
        "rules",
        description="writer of the questions: rules (no model), endpoint (environment variables OPENAI_BASE_URL, "
        "OPENAI_MODEL, OPENAI_API_KEY), or vllm (a model on the cluster's GPUs)",
    )
    checks: Annotated[list[Literal["blind", "support"]], Separated] = Field(
        ["blind", "support"],
        description="checks of each question by the writer: blind (can it be answered without the caption?), support"
        " (does the caption support the answer?)",
    )
    prompts: Input | None = Field(
        None,
        description="folder of prompts (detail.md, mcq.md, ...) that replace the built-in ones (default: the "
        "built-in prompts)",
    )
    attempts: int = Field(
        3,
        ge=1,
        description="malformed answers after which a request counts as failed; the last one may contain fewer "
        "questions than requested",
    )
    max_failed_share: float = Field(0.05, ge=0, le=1, description="share of failed requests above which the job fails")
    seed: int = Field(0, ge=0, description="seed of partners, draws and positions of correct choices")
    existing: Input | None = Field(
        None,
        description="folder with train.json, val.json, test.json to mix in, without ReasonAQA's synthetic questions "
        "(Clotho-MCQ, Clotho-Detail, AudioCaps-MCQ, AudioCaps-Detail) and those that this job wrote (default: nothing"
        " is mixed in)",
    )
    synthetic_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of synthetic questions in the train split (ReasonAQA: 0.7); surplus questions, synthetic or "
        "existing, are left out (default: all are used)",
    )
    sampling: SamplingSection = SamplingSection()
    filters: FiltersSection = FiltersSection()
    endpoint: LanguageModelSection = LanguageModelSection()
    vllm: VLLMSection = VLLMSection()
    rows_per_part: int = Field(256, ge=1, description="requests per part, which is one output file")
    workers: int = Field(2, ge=1, description="number of actors that write")

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that written answers depend on; the texts of prompts are compared separately.

        `attempts` and `sampling.max_tokens` are excluded, so that they can be raised for failed requests.
        """
        others = ("output", "prompts", "max_failed_share", "endpoint", "vllm", "workers", "attempts", *self.selection)
        return self.model_dump(exclude=dict.fromkeys(others, True) | {"sampling": {"max_tokens"}})

    @property
    def selection(self) -> dict[str, Any]:
        """Fields that select the records of the corpus from written answers and existing pairs."""
        return self.model_dump(include={"checks", "filters", "existing", "synthetic_share"})

    @model_validator(mode="after")
    def _vllm_has_a_model(self) -> "SynthesizeConfig":
        if (self.writer == "vllm") != bool(self.vllm.model):
            raise ValueError(f"writer {self.writer}, vllm.model {self.vllm.model}: set vllm.model for vllm only")
        return self
