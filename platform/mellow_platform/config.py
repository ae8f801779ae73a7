"""One typed configuration for every job: defaults here, YAML files next to the jobs, overrides on the command line.

Each job takes `--config FILE` and a flag for every field (`--learning-rate 3e-4`, `--scaling.workers 4`);
`--help` lists them. An unknown name is refused with the nearest valid one.
"""

import argparse
import difflib
import hashlib
import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mellow_platform import storage


def _separated(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _model(value: str) -> str:
    """Return what answers: a folder as a URI, anything else as it is."""
    if value.startswith("predictions:"):
        return f"predictions:{storage.absolute(value.removeprefix('predictions:'))}"
    is_no_path = value == "random" or value.startswith(("http://", "https://", "constant:"))
    return value if is_no_path else storage.absolute(value)


Uri = Annotated[str, AfterValidator(storage.absolute)]
Names = Annotated[list[str], BeforeValidator(_separated)]  # [val, test] or, as one writes it in a shell, val,test
Model = Annotated[str, AfterValidator(_model)]
Size = Literal["mellow-v0", "mellow-tiny"]
Partner = Literal["random", "same", "silence"]
PartnerDraws = Literal["stored", "clip", "question"]
Dtype = Literal["float32", "int8", "bfloat16"]
Features = Literal["logmel", "encoder", "waveform"]
# Of ReasonAQA, what a large language model wrote from captions alone; 70 % of the train split.
SYNTHETIC_SUBTYPES = ["Clotho-MCQ", "Clotho-Detail", "AudioCaps-MCQ", "AudioCaps-Detail"]
AFTER_THE_LAST_STEP = 10**9  # of any run: one that validates every so many steps does it at its end alone


class Section(BaseModel):
    """Base of every configuration: no unknown keys, values checked."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


Config = TypeVar("Config", bound=Section)


class CorpusConfig(Section):
    """`jobs/make_corpus.py`: write a corpus that needs no download."""

    source: Literal["scenes", "recordings"] = Field("scenes", description="synthetic scenes, or a folder of recordings")
    recordings: Uri | None = Field(None, description="folder of labelled recordings, see docs/recordings.md")
    output: Uri = Field(description="folder to write the corpus to")
    seed: int = Field(0, description="the same seed gives the same bytes")
    train_clips: int = Field(1200, ge=1, description="scenes in the train split")
    val_clips: int = Field(40, ge=1, description="scenes in the val split")
    test_clips: int = Field(240, ge=1, description="scenes in the test split")
    rounds: int | None = Field(
        None,
        ge=1,
        description="times that every question family is asked of a training clip; default: 3 of scenes, of recordings "
        "as many as give 12,000 questions, 40 at most",
    )

    @model_validator(mode="after")
    def _recordings_need_a_folder(self) -> "CorpusConfig":
        if self.source == "recordings" and not self.recordings:
            raise ValueError("source: recordings needs `recordings`, a folder of labelled recordings")
        return self


class LimitsSection(Section):
    """Clips past these are quarantined before anything of them is decoded."""

    max_bytes: int = Field(256 << 20, gt=0, description="of a file")
    max_seconds: float = Field(600.0, gt=0, description="of a recording")
    max_samples: int = Field(1 << 26, gt=0, description="of all channels together; decoding takes 4 bytes for each")
    max_channels: int = Field(32, ge=1, description="of a file")
    min_rate: int = Field(1_000, gt=0, description="sampling rate in Hz")
    max_rate: int = Field(384_000, gt=0, description="sampling rate in Hz")


class PreprocessConfig(Section):
    """`jobs/preprocess.py`: audio and records to Parquet shards."""

    source: Literal["records", "webdataset", "parquet", "recordings"] = Field(
        "records",
        description="what `corpus` holds: ReasonAQA's train.json, val.json, test.json; tars of audio and .json; "
        "Parquet with audio bytes; or recordings without questions",
    )
    corpus: Uri | None = Field(None, description="folder to read")
    labels: Uri | None = Field(
        None, description="labels.json or an AudioSet segment list (*.csv): its clips join the train split"
    )
    audio_root: Uri | dict[str, Uri] | None = Field(
        None,
        description="what clips' paths are relative to: a folder, or one for each taskname "
        "({audiocaps: ..., clothov21: ...}); default <corpus>/audio",
    )
    output: Uri = Field(
        description="folder to write shards and manifest to; {hash} in it stands for that of configuration and input"
    )
    split: Names = Field(["train", "val", "test"], description="splits to read, as in val,test")
    limit: int | None = Field(
        None, ge=1, description="read only the first questions of each split (clips, where there are no questions)"
    )
    tasknames: Names | None = Field(None, description="read only questions of these (audiocaps, clothov21)")
    subtypes: Names | None = Field(None, description="read only questions of these (CLE, AudioCaps-MCQ)")
    size: Size = Field("mellow-v0", description="model size")
    encoder_name: str = Field(
        "htsat",
        description="htsat, cnn14 or whisper: the encoder whose front end at this size hears the clips, where no "
        "`encoder` folder brings its own",
    )
    decoder: str | None = Field(
        None,
        description="hub name, folder or GGUF file with the tokenizer; mellow-tiny trains its own without it",
    )
    vocab_size: int = Field(1024, ge=300, description="of the tokenizer that mellow-tiny trains")
    features: Features = Field(
        "logmel",
        description="what is stored of a clip: its spectrogram, what the frozen encoder makes of it, or the whole "
        "recording at the model's rate (16-bit FLAC)",
    )
    encoder: Uri | None = Field(
        None,
        description="folder of the frozen encoder, for features: encoder; a whole Mellow gives its encoder and, "
        "where there is no `decoder`, its tokenizer",
    )
    short_clip: Literal["pad", "repeat"] = Field("pad", description="what fills a clip shorter than 10 s")
    partner: Partner = Field(
        "same", description="second clip of a question about one: a random other of its split, itself, or silence"
    )
    prompt_end_marker: bool = Field(True, description="close prompts with the end token, as answers are")
    min_seconds: float = Field(0.0, ge=0, description="shorter clips are quarantined")
    limits: LimitsSection = LimitsSection()
    max_failed_share: float = Field(0.05, ge=0, le=1, description="quarantined share of clips past which the job fails")
    clips_per_shard: int = Field(64, ge=1, description="clips in a shard")
    records_per_shard: int = Field(4096, ge=1, description="records in a shard")
    decode_workers: int | None = Field(
        None, ge=1, description="tasks that decode clips or tokenise questions at a time; default: one per logical CPU"
    )
    encoder_workers: int = Field(2, ge=1, description="actors that run the encoder")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of each encoder actor")

    @model_validator(mode="after")
    def _encoder_goes_with_features(self) -> "PreprocessConfig":
        if (self.features == "encoder") != bool(self.encoder):
            raise ValueError("features: encoder and `encoder`, its folder, go together")
        return self

    @property
    def shaping(self) -> dict[str, Any]:
        """The fields that the bytes of the shards depend on."""
        others = {"output", "max_failed_share", "decode_workers", "encoder_workers", "gpus_per_worker"}
        return self.model_dump(exclude=others)

    @model_validator(mode="after")
    def _something_to_read(self) -> "PreprocessConfig":
        if self.source == "records" and not (self.corpus or (self.labels and self.audio_root)):
            raise ValueError("give `corpus`, a folder of records, or `labels` with `audio_root`")
        if self.source != "records" and (not self.corpus or self.labels or self.audio_root):
            raise ValueError(f"source: {self.source} reads `corpus` alone, without `labels` and `audio_root`")
        return self


class ScalingSection(Section):
    """Workers of a training job."""

    workers: int = Field(2, ge=1, description="training workers")
    min_workers: int | None = Field(
        None, ge=1, description="go on with so few when nodes are lost, and grow again; default: always `workers`"
    )
    gpus_per_worker: float = Field(0.0, ge=0, description="0 trains on CPU (gloo, float32), 1 on GPUs (nccl, bfloat16)")
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs each worker reserves")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads each worker computes with")
    max_failures: int = Field(3, ge=-1, description="worker failures after which the run gives up; -1: never")

    @model_validator(mode="after")
    def _fewest_is_not_most(self) -> "ScalingSection":
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self


class RunSection(Section):
    """What every training job has."""

    shards: Uri = Field(description="folder that preprocess wrote")
    output: Uri = Field(description="folder to save the trained model to")
    storage: Uri = Field(description="folder for checkpoints and logs of all runs")
    run: str = Field(
        pattern=r"^[\w.-]+$", description="name of the run; the same name goes on from its last checkpoint"
    )
    size: Size = Field("mellow-v0", description="model size")
    seed: int = Field(0, ge=0, description="of weights, order and dropout")
    epochs: float = Field(1.0, gt=0, description="passes over the training split")
    batch: int = Field(16, ge=1, description="examples of a step, over all workers, however many these are")
    micro_batch: int = Field(
        4, ge=1, description="examples of one forward pass; a worker accumulates gradients over its share of the batch"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak, after warm-up; a cosine leads to 0")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    max_grad_norm: float = Field(0.5, gt=0, description="gradients are clipped to this norm")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept; the best by validation is kept besides")
    log_every: int = Field(10, ge=1, description="steps between reported losses")
    tracking: Literal["tensorboard", "mlflow"] = Field(
        "tensorboard", description="where metrics go besides Ray; mlflow needs the extra `mlflow` and its own variables"
    )
    scaling: ScalingSection = ScalingSection()


class EncoderConfig(RunSection):
    """`jobs/pretrain_encoder.py`: train the audio encoder as a sound tagger."""

    labels: Uri = Field(description="labels.json, or an AudioSet segment list (*.csv)")
    encoder_name: str = Field("htsat", description="audio encoder to train: htsat or cnn14")
    init_from: Uri | None = Field(None, description="folder of an encoder to go on from")


class LoRASection(Section):
    """Adapters on the decoder, whose own weights are then frozen; published: rank 256, alpha 256, dropout 0.1."""

    rank: int = Field(0, ge=0, description="of the adapters; 0 trains the decoder in full")
    alpha: float = Field(256.0, gt=0, description="the adapters count alpha / rank times")
    dropout: float = Field(0.1, ge=0, lt=1, description="before the adapters")
    target_modules: Names | None = Field(
        None, description="layers with adapters; default: q_proj and v_proj, or c_attn of a GPT-2"
    )

    def peft_fields(self) -> dict[str, Any] | None:
        """Return the fields of peft's `LoraConfig`, or None at rank 0."""
        if not self.rank:
            return None
        fields = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return fields | ({"target_modules": self.target_modules} if self.target_modules else {})


class TrainConfig(RunSection):
    """`jobs/train.py`: fine-tune Mellow on answers."""

    encoder: Uri | None = Field(None, description="folder of the frozen encoder that made the shards")
    decoder: str | None = Field(None, description="hub name, folder or GGUF file with the decoder's weights")
    pretrained: bool = Field(True, description="take the decoder's weights; false: only its shape, with fresh weights")
    init_from: Uri | None = Field(
        None, description="folder of a Mellow model to go on from, in place of encoder and decoder"
    )
    projection: str = Field("mellow", description="mellow (as published), linear, mlp or transformer")
    lora: LoRASection = LoRASection()
    synthetic_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of synthetic questions among those trained on, of which as many are taken as it allows; "
        "default: all there are",
    )
    synthetic_subtypes: Names = Field(
        SYNTHETIC_SUBTYPES, description="questions that count as synthetic; default: what ReasonAQA had a model write"
    )
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed ZeRO stage")
    activation_checkpointing: bool = Field(
        False, description="compute the decoder's activations again in the backward pass, to save memory"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="what ZeRO keeps in CPU memory: the optimizer's state (from stage 1), or parameters too (3)"
    )
    pad_prompts: bool = Field(True, description="fill prompts to the processor's length with padding that is seen")
    partner_draws: PartnerDraws = Field(
        "stored",
        description="second clip of a question about one: as the shards have it, or, of shards with partner: random, "
        "drawn anew in every epoch for each clip or (as published) for each question",
    )
    questions_per_pack: int = Field(
        1, ge=1, description="neighbouring questions on the same clips, which share one encoded prefix"
    )
    augment: bool = Field(
        False,
        description="SpecAugment and drop path in the frozen encoder, as published; for features: logmel or waveform",
    )
    validate_every: int = Field(0, ge=0, description="steps between validations on the val split; 0: none")
    validation_examples: int = Field(256, ge=1, description="examples of the val split in a validation")
    patience: int = Field(0, ge=0, description="validations without a better loss that end the run; 0: none do")
    publish: Literal["last", "best"] = Field("last", description="weights that `output` gets: last, or best validated")
    dry_run: bool = Field(False, description="print the plan (steps, memory, checkpoint size, time) and stop")

    @model_validator(mode="after")
    def _one_place_to_begin(self) -> "TrainConfig":
        if bool(self.encoder) == bool(self.init_from):
            raise ValueError("give `encoder`, or `init_from`, a model that brings its own")
        return self

    @model_validator(mode="after")
    def _fresh_weights_need_a_shape(self) -> "TrainConfig":
        if not self.pretrained and not self.decoder:
            raise ValueError(
                "pretrained: false goes with `decoder`, whose shape it takes: without one it is fresh anyway"
            )
        return self

    @model_validator(mode="after")
    def _what_validation_is_for(self) -> "TrainConfig":
        if not self.validate_every and (self.patience or self.publish == "best"):
            raise ValueError("patience and publish: best go by validations: set validate_every")
        return self

    @model_validator(mode="after")
    def _offloading_needs_shares(self) -> "TrainConfig":
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload: {self.offload} needs zero_stage {needed} or more, not {self.zero_stage}")
        return self


class EndpointSection(Section):
    """An OpenAI-compatible endpoint that answers questions about audio; its key is OPENAI_API_KEY's."""

    model: str | None = Field(None, description="what it calls the model; default: the first that it lists")
    concurrency: int = Field(8, ge=1, description="requests that a worker has under way")
    timeout: float = Field(120.0, gt=0, description="seconds for an answer")
    retries: int = Field(6, ge=0, description="times that a request is repeated, with growing pauses")
    formats: Names = Field(
        ["wav", "mp3"], description="containers of clips that are sent as they are; others are made WAV (PCM, 16 bit)"
    )
    text_only: Literal["omit", "silence"] = Field(
        "omit", description="what stands for the clips under text_only: nothing, or silence, which Mellow's own needs"
    )


class EvaluateConfig(Section):
    """`jobs/evaluate.py`: answer the questions of benchmarks and score the answers."""

    benchmark: Names = Field(
        ["families"],
        description="one or several of families, mmau, entailment, difference, clotho-aqa, captioning, mcq, detail; "
        "`all` for every one that there are questions of; `noise` beside them for that condition",
    )
    model: Model = Field(
        description="folder of a Mellow; URL of an OpenAI-compatible endpoint (http://127.0.0.1:8000/v1); "
        "constant:TEXT; random, a choice or another question's answer; predictions:FILE, answers that exist"
    )
    shards: Uri | None = Field(None, description="folder that preprocess wrote with features: encoder")
    corpus: Uri | None = Field(None, description="folder with <split>.json, in place of shards")
    audio_root: Uri | dict[str, Uri] | None = Field(
        None,
        description="what clips' paths are relative to: a folder, or one for each taskname (mmau is MMAU's); default "
        "<corpus>/audio, and for MMAU the folder of its file",
    )
    mmau: Uri | None = Field(None, description="MMAU's file: mmau-test-mini.json, or mmau-test.json without answers")
    output: Uri = Field(description="folder for answers, scores and report")
    split: str = Field("test", description="split to answer")
    conditions: Annotated[list[Literal["audio", "noise", "text_only", "chance"]], BeforeValidator(_separated)] = Field(
        ["audio", "noise", "text_only", "chance"],
        min_length=1,
        description="the clips themselves; Gaussian noise in their place; nothing that tells of them; a drawn answer",
    )
    limit: int | None = Field(None, ge=1, description="ask only the first questions of each benchmark")
    max_new_tokens: int = Field(256, ge=1, description="length an answer is cut to")
    dtype: Dtype | None = Field(
        None, description="precision: float32 or int8 on CPU, bfloat16 on a GPU; by default the device's own"
    )
    endpoint: EndpointSection = EndpointSection()
    limits: LimitsSection = LimitsSection()
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of questions without an answer past which the job fails"
    )
    against: Uri | None = Field(
        None, description="output folder of another evaluation: the job fails where a score is significantly lower"
    )
    resamples: int = Field(1000, ge=100, description="draws of clips that the intervals come from")
    seed: int = Field(0, ge=0, description="of what is drawn")
    examples: int = Field(6, ge=0, description="questions of each benchmark to listen to in the report, worst first")
    rows_per_part: int = Field(128, ge=1, description="questions in a file of answers, which is written as a whole")
    batch_size: int = Field(64, ge=1, description="questions an actor answers at once")
    workers: int = Field(2, ge=1, description="actors that hold the model, or ask the endpoint")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of each actor")

    @property
    def listens(self) -> bool:
        """Whether the model hears clips, and has not its answer before."""
        return self.model != "random" and not self.model.startswith(("constant:", "predictions:"))

    @property
    def is_remote(self) -> bool:
        """Whether an endpoint answers."""
        return self.model.startswith(("http://", "https://"))

    @property
    def shaping(self) -> dict[str, Any]:
        """The fields that the answers, and the files they are in, depend on."""
        names = "model", "split", "max_new_tokens", "dtype", "limits", "seed", "rows_per_part"
        return self.model_dump(include={*names}) | {"endpoint": self.endpoint.model_dump(include={"formats"})}

    @model_validator(mode="after")
    def _noise_is_a_condition(self) -> "EvaluateConfig":
        if "noise" in self.benchmark:
            self.benchmark.remove("noise")
            self.conditions += [] if "noise" in self.conditions else ["noise"]
        if not self.benchmark:
            raise ValueError("benchmark: noise is a control on others: name one of them beside it, as in mcq,noise")
        return self

    @model_validator(mode="after")
    def _questions_come_from_one_place(self) -> "EvaluateConfig":
        if self.shards and self.corpus:
            raise ValueError("give `shards` or `corpus`, and not both")
        if not (self.shards or self.corpus or self.mmau):
            raise ValueError("give `shards`, or `corpus` with `audio_root`, or `mmau`")
        if self.is_remote and (parts := urlsplit(self.model)) and (parts.username or parts.query):
            raise ValueError("model: an address without name, password or query; the key is OPENAI_API_KEY's")
        if self.listens and set(self.conditions) == {"chance"}:
            raise ValueError("conditions: chance alone needs no model: name another one, or take model: random")
        if self.against and self.listens and "audio" not in self.conditions:
            raise ValueError("against: scores are compared with audio: have it among the conditions")
        if self.against and self.against == self.output:
            raise ValueError(f"against {self.against}: that is `output`, give the folder of another evaluation")
        if self.shards and self.is_remote:
            raise ValueError("`shards` hold no audio to send to an endpoint: give `corpus` with `audio_root`")
        return self


class PredictConfig(Section):
    """`jobs/predict.py`: answer questions about a folder or a table of clips."""

    model: Uri = Field(description="folder of the trained model")
    output: Uri = Field(description="folder to write answers and report to")
    clips: Uri | None = Field(
        None, description="folder of recordings, read with its subfolders; what the clips in `table` are relative to"
    )
    question: str | None = Field(None, description="asked about every clip of the folder")
    questions: list[str] = Field([], description="several such, as a list in the file of --config")
    table: Uri | None = Field(
        None,
        description="what to ask about which clip: a .parquet, .csv, .json or .jsonl file with columns clip (URI, or "
        "path relative to `clips`), question, and where there are any clip2 and choices (a list to score in place of "
        "writing an answer); other columns are passed through",
    )
    window: Literal["first", "each", "pair"] = Field(
        "first",
        description="what is heard of a recording longer than 10 s: its first window; each window in turn, an answer "
        "each; or its first and its last window as two clips",
    )
    max_new_tokens: int = Field(64, ge=1, description="length an answer is cut to")
    temperature: float = Field(0.0, ge=0, le=10, description="0 takes the most likely token; above 0 tokens are drawn")
    top_p: float = Field(
        1.0, gt=0, le=1, description="drawn from the most likely tokens that together have this probability"
    )
    seed: int = Field(0, ge=0, description="of what is drawn; every answer has a draw of its own that follows from it")
    logprobs: bool = Field(False, description="write the log-probability of every token of an answer")
    dtype: Dtype | None = Field(
        None, description="precision: float32 or int8 on CPU, bfloat16 on a GPU; by default the device's own"
    )
    limits: LimitsSection = LimitsSection()
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of questions without an answer past which the job fails"
    )
    rows_per_part: int = Field(128, ge=1, description="questions in a file of answers, which is written as a whole")
    batch_size: int = Field(16, ge=1, description="answers that an actor writes at once")
    workers: int = Field(2, ge=1, description="actors that hold the model")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of each actor")

    @property
    def asked(self) -> list[str]:
        """What is asked about every clip of the folder."""
        return [self.question] if self.question is not None else self.questions

    @property
    def shaping(self) -> dict[str, Any]:
        """The fields that the answers, and the files they are in, depend on."""
        others = {"output", "max_failed_share", "batch_size", "workers", "gpus_per_worker"}
        return self.model_dump(exclude=others)

    @model_validator(mode="after")
    def _questions_come_from_one_place(self) -> "PredictConfig":
        if self.question is not None and self.questions:
            raise ValueError("give `question` or `questions`, and not both")
        if self.table and self.asked:
            raise ValueError("`table` brings its own questions: leave `question` and `questions` out")
        if not self.table and not (self.clips and self.asked):
            raise ValueError("give `clips`, a folder, with `question` or `questions`; or `table`")
        if not all(text.strip() for text in self.asked):
            raise ValueError("a question is empty: write it, or leave it out")
        return self


class LanguageModelSection(Section):
    """How `writer: endpoint` asks the model behind OPENAI_BASE_URL; whatever is here changes no question."""

    concurrency: int = Field(16, ge=1, description="requests that an actor has under way")
    requests_per_minute: float | None = Field(
        None,
        gt=0,
        description="of all actors together, repeated ones counted; default: as many as `concurrency` allows",
    )
    retries: int = Field(
        8, ge=0, description="of a request that met a full server (429), an error (5xx) or a lost connection"
    )
    timeout: float = Field(120.0, gt=0, description="seconds that an answer may take")
    price_input: float = Field(0.0, ge=0, description="USD for a million tokens of prompts, for the report")
    price_output: float = Field(0.0, ge=0, description="USD for a million tokens of answers, for the report")


class VLLMSection(Section):
    """The engine of `writer: vllm`; its prompts and answers are those of an endpoint."""

    model: str | None = Field(None, description="hub name or folder of the model")
    batch_size: int = Field(64, ge=1, description="requests handed to an engine at once")
    engine: dict[str, Any] = Field({}, description="engine arguments of vLLM ({tensor_parallel_size: 2})")


class SamplingSection(Section):
    """What a language model is asked with besides the prompt."""

    temperature: float | None = Field(0.7, ge=0, le=2, description="null leaves it to the server")
    max_tokens: int | None = Field(2048, ge=1, description="length an answer is cut to; null leaves it to the server")
    seed: int | None = Field(
        0, ge=0, description="sent with a request, one more with each further attempt; null sends none"
    )
    extra: dict[str, Any] = Field({}, description="more of a request's body ({max_completion_tokens: 4096})")
    response_format: Literal["json_schema", "json_schema_unbounded", "json_object", "none"] = Field(
        "json_schema",
        description="what holds the endpoint to the form of an answer: the schema itself; the schema without the "
        "lengths of lists, for servers that refuse these (Anthropic's, Gemini's); JSON of any form, or the prompt "
        "alone, for servers that know no better; answers are checked against the schema in every case",
    )


class FiltersSection(Section):
    """Which questions are left out of the corpus, besides those whose faults need no number to tell."""

    min_question_words: int = Field(3, ge=1, description="shorter ones are too_short")
    max_question_words: int = Field(60, ge=1, description="longer ones, choices included, are too_long")
    max_answer_words: int = Field(120, ge=1, description="longer answers are too_long")
    similarity: float = Field(
        0.7, gt=0, le=1, description="share of common word pairs from which questions on one clip are near_duplicate"
    )
    languages: Names = Field(["en"], description="codes (ISO 639-1) of the languages to keep")


class SynthesizeConfig(Section):
    """`jobs/synthesize.py`: captions to questions in ReasonAQA's format."""

    captions: Annotated[list[Uri], BeforeValidator(_separated)] = Field(
        description="files to read, several with commas between: AudioCaps or Clotho .csv; any .parquet, .csv, .json "
        "or .jsonl with columns clip and caption, and where there is one split; ReasonAQA's .json; labels.json"
    )
    output: Uri = Field(description="folder to write the corpus to")
    taskname: str = Field(
        "captions",
        pattern=r"^\w+$",
        description="of captions that are neither AudioCaps nor Clotho, nor bring their own",
    )
    clip_name: str = Field(
        "{youtube_id}.wav", description="path of an AudioCaps clip, from {youtube_id}, {start_time} and {audiocap_id}"
    )
    limit: int | None = Field(None, ge=1, description="read only the first captions of each file")
    kinds: Annotated[
        list[Literal["detail", "mcq", "difference", "entailment"]], BeforeValidator(_separated), Field(min_length=1)
    ] = Field(["detail", "mcq", "difference", "entailment"], description="what to ask for about every caption")
    questions: int = Field(
        5,
        ge=1,
        le=20,
        description="detail questions, and multiple-choice ones, a caption; the rules write at most these",
    )
    writer: Literal["rules", "endpoint", "vllm"] = Field(
        "rules",
        description="who writes: rules, which need no model; the model OPENAI_MODEL behind OPENAI_BASE_URL, with "
        "OPENAI_API_KEY; or one that vLLM runs on the cluster's GPUs",
    )
    checks: Annotated[list[Literal["blind", "support"]], BeforeValidator(_separated)] = Field(
        ["blind", "support"],
        description="what the writer is asked of its questions: to answer them without the caption, and whether the "
        "caption supports the answer",
    )
    prompts: Uri | None = Field(
        None, description="folder with prompts (detail.md, mcq.md, ...) in place of those that stand there by default"
    )
    attempts: int = Field(
        3,
        ge=1,
        description="answers out of form after which a request counts as failed; of the last one, fewer questions are "
        "taken than were asked for",
    )
    max_failed_share: float = Field(0.05, ge=0, le=1, description="share of failed requests past which the job fails")
    seed: int = Field(0, ge=0, description="of partners, draws and the places of right choices")
    existing: Uri | None = Field(
        None,
        description="folder with train.json, val.json, test.json to mix in, except for ReasonAQA's synthetic questions "
        "(Clotho-MCQ, Clotho-Detail, AudioCaps-MCQ, AudioCaps-Detail) and those that this job wrote",
    )
    synthetic_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of synthetic questions in the train split (ReasonAQA: 0.7), of which as many are taken as "
        "it allows; default: all there are",
    )
    sampling: SamplingSection = SamplingSection()
    filters: FiltersSection = FiltersSection()
    endpoint: LanguageModelSection = LanguageModelSection()
    vllm: VLLMSection = VLLMSection()
    rows_per_part: int = Field(256, ge=1, description="requests in a file of answers, which is written as a whole")
    workers: int = Field(2, ge=1, description="actors that write")

    @property
    def shaping(self) -> dict[str, Any]:
        """The fields that what is written, and the files with it, depend on; of prompts it is their texts.

        How often, and up to which length, it is tried may be raised when answers fail by it.
        """
        others = ("output", "prompts", "max_failed_share", "endpoint", "vllm", "workers", "attempts", *self.sifting)
        return self.model_dump(exclude=dict.fromkeys(others, True) | {"sampling": {"max_tokens"}})

    @property
    def sifting(self) -> dict[str, Any]:
        """The fields that decide what of it the corpus gets."""
        return self.model_dump(include={"checks", "filters", "existing", "synthetic_share"})

    @model_validator(mode="after")
    def _an_engine_has_a_model(self) -> "SynthesizeConfig":
        if (self.writer == "vllm") != bool(self.vllm.model):
            raise ValueError("writer: vllm and vllm.model, what it runs, go together")
        return self


class AblationConfig(Section):
    """`jobs/ablate.py`: train and score every point of a grid with several seeds, and write one table."""

    output: Uri = Field(description="folder for shards, runs, models, scores, and the table with its picture")
    base: str | None = Field(
        None, description="YAML file of jobs/train.py that every point begins with, relative to the working directory"
    )
    train: dict[str, Any] = Field(
        {}, description="fields of jobs/train.py that all points have, in place of the base's"
    )
    preprocess: dict[str, Any] | None = Field(
        None,
        description="fields of jobs/preprocess.py (corpus, audio_root) to write shards with, once for each pair of "
        "encoder and decoder; without them all points read `shards` of `train`",
    )
    evaluate: dict[str, Any] | None = Field(
        None,
        description="fields of jobs/evaluate.py ({split: test}) to score every model with; default: validation only",
    )
    grid: dict[str, list[Any]] = Field(
        description="values of each axis, which is a field of jobs/train.py: {projection: [mellow, mlp]}"
    )
    combinations: Literal["all", "one_at_a_time"] = Field(
        "all", description="every combination of values; or the first of all axes, and that with one of them changed"
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="every point is trained with each")
    metric: Literal["val_accuracy", "val_loss", "accuracy"] = Field(
        "val_accuracy", description="score that the points are sorted by; accuracy is that of `evaluate`"
    )
    concurrent: int | None = Field(
        None, ge=1, description="runs at the same time; default: as many as the cluster has room for at the start"
    )

    def points(self) -> list[dict[str, Any]]:
        """Return the value of every axis at each point."""
        if self.combinations == "all":
            return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        reference = {axis: values[0] for axis, values in self.grid.items()}
        changed = [reference | {axis: value} for axis, values in self.grid.items() for value in values[1:]]
        return [reference, *changed]

    def train_config(self, point: dict[str, Any], seed: int) -> TrainConfig:
        """Return the configuration of a point's run, whose name and output are still to be given.

        Raises:
            ValueError: the base cannot be read, or the fields do not fit; the message names them.
        """
        values = _yaml_fields(self.base) if self.base else {}
        values |= self.train | point | {"seed": seed, "storage": storage.join(self.output, "runs")}
        values |= {"run": "unnamed", "output": self.output, "shards": values.get("shards", self.output)}
        # Without validations on the way there is one at the end.
        values["validate_every"] = values.get("validate_every") or AFTER_THE_LAST_STEP
        config = _checked(TrainConfig, values)
        shards = self.preprocess_config(config).output if self.preprocess is not None else config.shards
        return config.model_copy(update={"shards": shards})

    def preprocess_config(self, config: TrainConfig) -> PreprocessConfig:
        """Return how the shards for a run's encoder and decoder are made, and where."""
        values = {"size": config.size, "features": "encoder", "encoder": config.encoder or config.init_from}
        values |= {"decoder": config.decoder} if config.decoder else {}
        made = _checked(PreprocessConfig, (self.preprocess or {}) | values | {"output": self.output})
        digest = hashlib.sha256(json.dumps(made.shaping, sort_keys=True).encode()).hexdigest()
        return made.model_copy(update={"output": storage.join(self.output, "shards", digest[:12])})

    def evaluate_config(self, config: TrainConfig, output: str) -> EvaluateConfig | None:
        """Return how the model of a run is scored besides its validation."""
        if self.evaluate is None:
            return None
        values = {"conditions": ["audio"]} | self.evaluate
        return _checked(EvaluateConfig, values | {"model": config.output, "shards": config.shards, "output": output})

    @model_validator(mode="after")
    def _axes_and_fields_are_for_the_user(self) -> "AblationConfig":
        own = {"run", "output", "storage", "seed", "dry_run"}
        valid = [name for name in TrainConfig.model_fields if name not in own]
        for name in (*self.grid, *self.train):
            if name not in valid:
                raise ValueError(f"{name} is not a field of jobs/train.py that a grid can have{_nearest(name, valid)}")
        for axis, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{axis} has no values: list some, or leave the axis out")
        return self

    @model_validator(mode="after")
    def _shards_come_from_one_place(self) -> "AblationConfig":
        if (self.preprocess is None) == ("shards" not in self.train):
            raise ValueError("give `preprocess`, the fields to write shards with, or `shards` in `train`, and not both")
        if self.preprocess is None and any(len(self.grid.get(axis, [])) > 1 for axis in ("encoder", "init_from")):
            raise ValueError("each encoder reads shards of its own: give `preprocess` in place of `shards` in `train`")
        return self

    @model_validator(mode="after")
    def _every_point_is_valid(self) -> "AblationConfig":
        if self.metric == "accuracy" and self.evaluate is None:
            raise ValueError("metric: accuracy is that of `evaluate`: give it, or take val_accuracy")
        if self.metric == "accuracy" and "families" not in (self.evaluate or {}).get("benchmark", "families"):
            raise ValueError("metric: accuracy is that of the benchmark families: name it in evaluate.benchmark")
        for point in self.points():
            try:
                self.evaluate_config(self.train_config(point, self.seeds[0]), self.output)
            except ValueError as error:
                raise ValueError(f"point {point}: {error}") from error
        return self


class GateSection(Section):
    """Questions with known answers that a model has to get right before it is served."""

    records: Uri | None = Field(None, description="ReasonAQA file of questions with their answers; default: no gate")
    audio_root: Uri | None = Field(None, description="folder that the records' clips are relative to")
    min_accuracy: float = Field(1.0, gt=0, le=1, description="share that has to be answered word for word")

    @model_validator(mode="after")
    def _clips_are_somewhere(self) -> "GateSection":
        if bool(self.records) != bool(self.audio_root):
            raise ValueError("gate.records and gate.audio_root go together")
        return self


class DeployConfig(Section):
    """`jobs/deploy.py`: put a model behind the HTTP endpoint."""

    serve: str = Field(
        "serve/config.yaml", description="Ray Serve configuration file, relative to the working directory"
    )
    model: Uri = Field(description="folder of the trained model")
    name: str = Field(
        "mellow",
        pattern=r"^[\w.-]+$",
        description="what requests call `model`; a name that is served gets a new version",
    )
    gate: GateSection = GateSection()
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; 0.0.0.0 for all, which are answered with API keys (fixed by the first "
        "deployment)",
    )
    port: int = Field(8000, ge=1, le=65535, description="HTTP port (fixed by the first deployment)")


class DemoConfig(Section):
    """`jobs/demo.py`: the main job end to end on one machine."""

    output: Uri = Field("runs/demo", description="folder for everything the demo writes")
    corpus: Uri | None = Field(None, description="folder of recordings with labels.json, in place of synthetic scenes")
    keep: bool = Field(False, description="leave the cluster and the endpoint running")
    resume: bool = Field(False, description="continue what a stopped demo left in `output`")
    cpus: int = Field(4, ge=4, description="logical CPUs of the cluster, more than a small machine has cores")
    port: int = Field(8000, ge=1, le=65535, description="of the HTTP endpoint")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="of Ray's dashboard")


def load(schema: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Return the configuration that the command line `arguments` (default: the program's own) describe.

    A flag outranks the file given by `--config`, which outranks the defaults. Errors end the program with status 2
    and a message that names the field, its value and what is valid.
    """
    fields = _flags(schema)
    parser = argparse.ArgumentParser(
        description=schema.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file with any of the fields")
    for name, field in fields.items():
        default = argparse.SUPPRESS if field.is_required() else field.get_default()
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(
            f"--{_dashed(name)}",
            metavar="VALUE",
            help=f"{field.description} (default: {default})"
            if default is not argparse.SUPPRESS
            else f"{field.description} (required)",
            default=argparse.SUPPRESS,
            **switch,
        )
    known, unknown = parser.parse_known_args(arguments)
    for flag in unknown:
        if flag.startswith("--"):
            name = flag.split("=")[0]
            parser.error(f"{name} is not an option{_nearest(name, [f'--{_dashed(field)}' for field in fields])}")
        parser.error(f"{flag!r} does not belong to any option")
    values: dict[str, Any] = {}
    if known.config:
        try:
            values = _yaml_fields(known.config)
        except ValueError as error:
            parser.error(f"--config {error}")
    for name, text in vars(known).items():
        if name != "config":
            target = values
            *sections, leaf = name.split(".")
            for section in sections:
                target = target.setdefault(section, {})
            target[leaf] = _value(text, fields[name].annotation)
    try:
        return _checked(schema, values)
    except ValueError as error:
        parser.error(str(error))


def _checked(schema: type[Config], values: dict[str, Any]) -> Config:
    """Return the configuration with these values.

    Raises:
        ValueError: they do not fit; the message is that of `load`.
    """
    try:
        return schema(**values)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(item, _flags(schema)) for item in error.errors())) from error


def _flags(schema: type[Section], prefix: str = "") -> dict[str, Any]:
    """Return every leaf field of `schema` by its dotted name."""
    fields: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            fields |= _flags(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _nearest(name: str, valid: Collection[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(valid)}"


def _explain(error: Any, fields: dict[str, Any]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name} is not a configuration key{_nearest(name, fields)}"
    if error["type"] == "missing":
        return f"{name} is required: {fields[name].description}" if name in fields else f"{name} is required"
    return f"{name or 'configuration'}: {error['msg']}" + (f" (given {error['input']!r})" if name else "")


def _yaml_fields(path: str) -> dict[str, Any]:
    """Return the fields in a YAML file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path}: expected `field: value` lines, found {type(values).__name__}")
    return values or {}


def _value(text: str, annotation: Any) -> Any:
    """Return a flag's text for a field: as written where that takes text alone, else as YAML reads it.

    A question may hold a colon, and a name be a number; `null` is no text, but none.
    """
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in alternatives}
    if kinds - {type(None)} == {str}:
        return None if text == "null" and annotation is not str else text
    try:  # YAML takes 1e-3 for text
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text if text.startswith("/") or "://" in text else yaml.safe_load(text)
