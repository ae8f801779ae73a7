"""Options of every job. `settings` reads them from a YAML file and the command line."""

import hashlib
import itertools
import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from mellow_platform import storage
from mellow_platform.settings import (
    Decoder,
    File,
    Input,
    Metavar,
    Model,
    Name,
    Names,
    Output,
    Section,
    Separated,
    nearest,
    read_yaml,
    validated,
)

Size = Literal["mellow-v0", "mellow-tiny"]
Partner = Literal["random", "same", "silence"]
PartnerDraws = Literal["stored", "clip", "question"]
Dtype = Literal["float32", "int8", "bfloat16"]
Features = Literal["logmel", "encoder", "waveform"]
# The registries themselves (`ENCODERS`, `PROJECTIONS`, `BENCHMARKS`) are in modules that import torch.
Encoder = Literal["htsat", "cnn14", "whisper"]
Tagger = Literal["htsat", "cnn14"]  # encoders that have a head for tags
Projection = Literal["mellow", "linear", "mlp", "transformer"]
Benchmark = Literal[
    "families", "mmau", "entailment", "difference", "clotho-aqa", "captioning", "mcq", "detail", "all", "noise"
]
Condition = Literal["audio", "noise", "text_only", "chance"]
# Of ReasonAQA, what a large language model wrote from captions alone; 70 % of the train split.
SYNTHETIC_SUBTYPES = ["Clotho-MCQ", "Clotho-Detail", "AudioCaps-MCQ", "AudioCaps-Detail"]
AFTER_THE_LAST_STEP = 10**9  # steps; a run that validates every so many steps validates only at its end


class CorpusConfig(Section):
    """Write a corpus for jobs/preprocess.py without a download: synthetic scenes, or labelled recordings."""

    source: Literal["scenes", "recordings"] = Field(
        "scenes", description="clips of the corpus: synthetic scenes, or the recordings in --recordings"
    )
    recordings: Input | None = Field(
        None, description="folder of labelled recordings (docs/guides/recordings.md); required for --source recordings"
    )
    output: Output = Field(description="folder to write the corpus to")
    seed: int = Field(0, description="seed of the corpus; the same seed gives the same bytes")
    train_clips: int = Field(1200, ge=1, description="number of scenes in the train split")
    val_clips: int = Field(40, ge=1, description="number of scenes in the val split")
    test_clips: int = Field(240, ge=1, description="number of scenes in the test split")
    rounds: int | None = Field(
        None,
        ge=1,
        description="questions of each family per training clip (default: 3 for scenes; for recordings as many as "
        "give 12,000 questions, 40 at most)",
    )

    @model_validator(mode="after")
    def _recordings_need_a_folder(self) -> "CorpusConfig":
        if self.source == "recordings" and not self.recordings:
            raise ValueError("source: recordings needs `recordings`, a folder of labelled recordings")
        return self


class LimitsSection(Section):
    """Limits of audio files. Clips over a limit are quarantined before decoding."""

    max_bytes: int = Field(256 << 20, gt=0, description="largest file, in bytes")
    max_seconds: float = Field(600.0, gt=0, description="longest recording, in seconds")
    max_samples: int = Field(
        1 << 26, gt=0, description="most samples of a recording, over all channels; decoding takes 4 bytes per sample"
    )
    max_channels: int = Field(32, ge=1, description="most channels of a recording")
    min_rate: int = Field(1_000, gt=0, description="lowest sampling rate, in Hz")
    max_rate: int = Field(384_000, gt=0, description="highest sampling rate, in Hz")


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
    vocab_size: int = Field(1024, ge=300, description="tokens of the tokenizer that mellow-tiny trains")
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
    limits: LimitsSection = LimitsSection()
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
    """Workers of the training run."""

    workers: int = Field(2, ge=1, description="number of training workers")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="fewest workers to continue with after nodes are lost; the run grows again when nodes join "
        "(default: always as many as scaling.workers)",
    )
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs per worker: 0 trains on CPUs (gloo, float32), 1 on GPUs (nccl, bfloat16)"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs that each worker reserves")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads that each worker computes with")
    max_failures: int = Field(3, ge=-1, description="worker failures after which the run stops; -1: no limit")

    @model_validator(mode="after")
    def _fewest_is_not_most(self) -> "ScalingSection":
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self


class RunSection(Section):
    """Options of every training job."""

    shards: Input = Field(description="folder of shards that jobs/preprocess.py wrote")
    output: Output = Field(description="folder to save the trained model to")
    storage: Output = Field(description="folder for checkpoints and logs of all runs")
    run: Name = Field(
        pattern=r"^[\w.-]+$", description="name of the run; a run of the same name is resumed from its last checkpoint"
    )
    size: Size = Field("mellow-v0", description="model size")
    seed: int = Field(0, ge=0, description="seed of initial weights, example order and dropout")
    epochs: float = Field(1.0, gt=0, description="number of passes over the train split")
    batch: int = Field(16, ge=1, description="examples per step, over all workers")
    micro_batch: int = Field(
        4, ge=1, description="examples per forward pass; each worker accumulates gradients over its share of the batch"
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="peak learning rate, after the warm-up; a cosine schedule then decreases it to 0"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a growing learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(0.5, gt=0, description="norm that gradients are clipped to")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(
        2, ge=1, description="number of latest checkpoints to keep, besides the best by validation"
    )
    log_every: int = Field(10, ge=1, description="steps between reported losses")
    tracking: Literal["tensorboard", "mlflow"] = Field(
        "tensorboard",
        description="experiment tracker that receives the metrics, besides Ray; mlflow needs the extra `mlflow` and "
        "its own environment variables",
    )
    scaling: ScalingSection = ScalingSection()


class EncoderConfig(RunSection):
    """Train the audio encoder as a sound tagger."""

    labels: Input = Field(description="labels.json, or AudioSet segment list (*.csv), with the tags of each clip")
    encoder_name: Tagger = Field("htsat", description="audio encoder to train")
    init_from: Input | None = Field(None, description="folder of an encoder to start from (default: fresh weights)")


class LoRASection(Section):
    """LoRA adapters on the decoder, whose own weights are then frozen. Published: rank 256, alpha 256, dropout 0.1."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0 trains the whole decoder without adapters")
    alpha: float = Field(256.0, gt=0, description="scale of the adapters: their output is multiplied by alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability of the adapters' input")
    target_modules: Names | None = Field(
        None, description="layers that get adapters (default: q_proj,v_proj, or c_attn for a GPT-2)"
    )

    def peft_fields(self) -> dict[str, Any] | None:
        """Return the fields of peft's `LoraConfig`, or None at rank 0."""
        if not self.rank:
            return None
        fields = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return fields | ({"target_modules": self.target_modules} if self.target_modules else {})


class TrainConfig(RunSection):
    """Fine-tune Mellow on questions with answers."""

    encoder: Input | None = Field(
        None,
        description="folder of the frozen encoder that the shards were made with; required unless --init-from is set"
        " (default: the encoder of --init-from)",
    )
    decoder: Decoder | None = Field(
        None,
        description="hub name, folder or GGUF file of the decoder's weights (default: those of --init-from, else "
        "fresh weights)",
    )
    pretrained: bool = Field(
        True, description="take the weights of --decoder; false takes only its configuration, with fresh weights"
    )
    init_from: Input | None = Field(
        None,
        description="folder of a Mellow model to start from, instead of --encoder and --decoder; required unless "
        "--encoder is set",
    )
    projection: Projection = Field(
        "mellow", description="projection from encoder frames to decoder embeddings; mellow is the published one"
    )
    lora: LoRASection = LoRASection()
    synthetic_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="largest share of synthetic questions in training; surplus synthetic questions are left out "
        "(default: all are used)",
    )
    synthetic_subtypes: Names = Field(
        SYNTHETIC_SUBTYPES, description="subtypes of the questions that count as synthetic"
    )
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed ZeRO stage, 0 to 3")
    activation_checkpointing: bool = Field(
        False, description="recompute the decoder's activations in the backward pass, to save memory"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="state that ZeRO keeps in CPU memory: none, optimizer (from stage 1), or parameters too (stage 3)",
    )
    pad_prompts: bool = Field(
        True, description="padding of prompts to the processor's prompt length, without an attention mask"
    )
    partner_draws: PartnerDraws = Field(
        "stored",
        description="second clip of questions about one clip: stored (as in the shards), or drawn in every epoch per"
        " clip or per question (as published); draws need shards with --partner random",
    )
    questions_per_pack: int = Field(
        1, ge=1, description="neighbouring questions on the same clips that share one encoded prefix"
    )
    augment: bool = Field(
        False,
        description="apply SpecAugment and drop path in the frozen encoder, as published; needs shards with "
        "--features logmel or waveform",
    )
    validate_every: int = Field(0, ge=0, description="steps between validations on the val split; 0: no validation")
    validation_examples: int = Field(256, ge=1, description="examples of the val split per validation")
    patience: int = Field(
        0, ge=0, description="validations without a better loss after which the run stops; 0: no early stop"
    )
    publish: Literal["last", "best"] = Field(
        "last", description="weights that are saved to --output: last step, or best validation loss"
    )
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
        "(http://127.0.0.1:8000/v1); constant:TEXT for the same answer to every question; random for a random choice,"
        " or another question's answer; predictions:URI for a file of answers"
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
    dtype: Dtype | None = Field(
        None,
        description="precision of the model: float32 or int8 on CPUs, bfloat16 on GPUs (default: float32 on CPUs, "
        "bfloat16 on GPUs)",
    )
    endpoint: EndpointSection = EndpointSection()
    limits: LimitsSection = LimitsSection()
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of questions without an answer above which the job fails"
    )
    against: Input | None = Field(
        None,
        description="output folder of another evaluation; the job fails if a score is significantly lower than there"
        " (default: no comparison)",
    )
    resamples: int = Field(1000, ge=100, description="bootstrap samples of clips per confidence interval")
    seed: int = Field(0, ge=0, description="seed of noise, chance answers and bootstrap samples")
    examples: int = Field(6, ge=0, description="questions per benchmark to listen to in the report, worst first")
    rows_per_part: int = Field(128, ge=1, description="questions per output file; a file is written whole")
    batch_size: int = Field(64, ge=1, description="questions that an actor answers at once")
    workers: int = Field(2, ge=1, description="number of actors that run the model or call the endpoint")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs per actor")

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
    """Answer questions about a folder or a table of clips."""

    model: Input = Field(description="folder of the trained model")
    output: Output = Field(description="folder to write answers and report to")
    clips: Input | None = Field(
        None,
        description="folder of recordings, read with its subfolders; with --table, folder that its clips are "
        "relative to; required unless --table is set",
    )
    question: str | None = Field(
        None, description="question about every clip in --clips; required unless --questions or --table is set"
    )
    questions: Annotated[list[str], Metavar("[TEXT,...]")] = Field(
        [],
        description="questions about every clip in --clips, instead of --question; best written as a list in the "
        "file of --config",
    )
    table: Input | None = Field(
        None,
        description="table of questions (.parquet, .csv, .json, .jsonl) with columns clip (URI, or path relative to "
        "--clips), question, and optionally clip2 and choices (a list to score instead of writing an answer); other "
        "columns are copied to the output; required unless --clips is set",
    )
    window: Literal["first", "each", "pair"] = Field(
        "first",
        description="part of recordings longer than 10 s: first (the first window), each (one answer per window), or"
        " pair (first and last window as two clips)",
    )
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, le=10, description="sampling temperature; 0 takes the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="total probability of the most likely tokens to sample from")
    seed: int = Field(0, ge=0, description="seed of sampling; every answer has its own seed that follows from this one")
    logprobs: bool = Field(False, description="write the log-probability of every token of an answer")
    dtype: Dtype | None = Field(
        None,
        description="precision of the model: float32 or int8 on CPUs, bfloat16 on GPUs (default: float32 on CPUs, "
        "bfloat16 on GPUs)",
    )
    limits: LimitsSection = LimitsSection()
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of questions without an answer above which the job fails"
    )
    rows_per_part: int = Field(128, ge=1, description="questions per output file; a file is written whole")
    batch_size: int = Field(16, ge=1, description="questions that an actor answers at once")
    workers: int = Field(2, ge=1, description="number of actors that run the model")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs per actor")

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
    """Requests to the endpoint of --writer endpoint. These options change no question."""

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
        description="largest share of synthetic questions in the train split (ReasonAQA: 0.7); surplus synthetic "
        "questions are left out (default: all are used)",
    )
    sampling: SamplingSection = SamplingSection()
    filters: FiltersSection = FiltersSection()
    endpoint: LanguageModelSection = LanguageModelSection()
    vllm: VLLMSection = VLLMSection()
    rows_per_part: int = Field(256, ge=1, description="requests per output file; a file is written whole")
    workers: int = Field(2, ge=1, description="number of actors that write")

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
    """Train and score every point of a grid with several seeds, and write one table."""

    output: Output = Field(description="folder to write shards, runs, models, scores, and the table with its plot to")
    base: Annotated[str, Metavar("FILE")] | None = Field(
        None,
        description="YAML file of jobs/train.py with options of every point, relative to the working directory "
        "(default: only --train)",
    )
    train: dict[str, Any] = Field(
        {},
        description="options of jobs/train.py for every point; they take precedence over --base (default: only --base)",
    )
    preprocess: dict[str, Any] | None = Field(
        None,
        description="options of jobs/preprocess.py (corpus, audio_root) to write shards with, once per pair of "
        "encoder and decoder (default: all points read `shards` of --train)",
    )
    evaluate: dict[str, Any] | None = Field(
        None,
        description="options of jobs/evaluate.py ({split: test}) to score every model with (default: validation only)",
    )
    grid: dict[str, list[Any]] = Field(
        description="values of each axis, which is an option of jobs/train.py: {projection: [mellow, mlp]}"
    )
    combinations: Literal["all", "one_at_a_time"] = Field(
        "all",
        description="points of the grid: all combinations, or one_at_a_time (the first value of every axis, and that"
        " point with one axis changed)",
    )
    seeds: Annotated[list[int], Separated] = Field(
        [0, 1, 2], min_length=1, description="seeds that every point is trained with"
    )
    metric: Literal["val_accuracy", "val_loss", "accuracy"] = Field(
        "val_accuracy", description="score that points are sorted by; accuracy needs --evaluate"
    )
    concurrent: int | None = Field(
        None, ge=1, description="simultaneous runs (default: as many as fit the cluster at the start)"
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
        values = read_yaml(self.base) if self.base else {}
        values |= self.train | point | {"seed": seed, "storage": storage.join(self.output, "runs")}
        values |= {"run": "unnamed", "output": self.output, "shards": values.get("shards", self.output)}
        # Without validations on the way there is one at the end.
        values["validate_every"] = values.get("validate_every") or AFTER_THE_LAST_STEP
        config = validated(TrainConfig, values)
        shards = self.preprocess_config(config).output if self.preprocess is not None else config.shards
        return config.model_copy(update={"shards": shards})

    def preprocess_config(self, config: TrainConfig) -> PreprocessConfig:
        """Return how the shards for a run's encoder and decoder are made, and where."""
        values = {"size": config.size, "features": "encoder", "encoder": config.encoder or config.init_from}
        values |= {"decoder": config.decoder} if config.decoder else {}
        made = validated(PreprocessConfig, (self.preprocess or {}) | values | {"output": self.output})
        digest = hashlib.sha256(json.dumps(made.shaping, sort_keys=True).encode()).hexdigest()
        return made.model_copy(update={"output": storage.join(self.output, "shards", digest[:12])})

    def evaluate_config(self, config: TrainConfig, output: str) -> EvaluateConfig | None:
        """Return how the model of a run is scored besides its validation."""
        if self.evaluate is None:
            return None
        values = {"conditions": ["audio"]} | self.evaluate
        return validated(EvaluateConfig, values | {"model": config.output, "shards": config.shards, "output": output})

    def locations(self) -> list[tuple[str, str, bool]]:
        """Return the URIs of this job, and those that the jobs of its points read and the ablation does not write."""
        written = {"model", "shards"} if self.preprocess is not None else {"model"}
        found = super().locations()
        for point in self.points():
            train = self.train_config(point, self.seeds[0])
            made = self.preprocess_config(train) if self.preprocess is not None else None
            jobs = {"train": train, "preprocess": made, "evaluate": self.evaluate_config(train, self.output)}
            for name, job in jobs.items():
                read = [(inner, uri) for inner, uri, exists in job.locations() if exists] if job else []
                found += [(f"{name}: {inner}", uri, True) for inner, uri in read if inner not in written]
        return list(dict.fromkeys(found))

    @model_validator(mode="after")
    def _axes_and_fields_are_for_the_user(self) -> "AblationConfig":
        own = {"run", "output", "storage", "seed", "dry_run"}
        valid = [name for name in TrainConfig.model_fields if name not in own]
        for name in (*self.grid, *self.train):
            if name not in valid:
                raise ValueError(f"{name} is not a field of jobs/train.py that a grid can have{nearest(name, valid)}")
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
    """Questions with known answers that a model must answer correctly before it is served."""

    records: Input | None = Field(None, description="ReasonAQA file of questions with answers (default: no gate)")
    audio_root: Input | None = Field(
        None,
        description="folder that paths of clips in gate.records are relative to; required with gate.records",
    )
    min_accuracy: float = Field(1.0, gt=0, le=1, description="share of questions that must be answered word for word")

    @model_validator(mode="after")
    def _clips_are_somewhere(self) -> "GateSection":
        if bool(self.records) != bool(self.audio_root):
            raise ValueError("gate.records and gate.audio_root go together")
        return self


class DeployConfig(Section):
    """Deploy a model behind the HTTP endpoint of the running cluster."""

    serve: File = Field(
        "serve/config.yaml", description="Ray Serve configuration file, relative to the working directory"
    )
    model: Input = Field(description="folder of the trained model")
    name: Name = Field(
        "mellow",
        pattern=r"^[\w.-]+$",
        description="name of the model in requests (`model`); a name that is already served gets a new version",
    )
    gate: GateSection = GateSection()
    host: Annotated[str, Metavar("ADDRESS")] = Field(
        "127.0.0.1",
        description="address to listen on, fixed by the first deployment; 0.0.0.0 for all addresses, which requires "
        "API keys",
    )
    port: int = Field(8000, ge=1, le=65535, description="HTTP port, fixed by the first deployment")


class DemoConfig(Section):
    """Run the main job end to end on one machine."""

    output: Output = Field("runs/demo", description="folder to write everything to")
    corpus: Input | None = Field(
        None, description="folder of labelled recordings, see docs/guides/recordings.md (default: synthetic scenes)"
    )
    keep: bool = Field(False, description="leave the cluster and the endpoint running")
    resume: bool = Field(False, description="continue with what a stopped demo left in --output")
    cpus: int = Field(4, ge=4, description="logical CPUs of the cluster, which may be more than the machine has")
    port: int = Field(8000, ge=1, le=65535, description="HTTP port of the endpoint")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="HTTP port of Ray's dashboard")
