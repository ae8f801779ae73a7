"""Options of jobs/predict.py."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.option_values import EngineDtype
from mellow_platform.settings import (
    Input,
    Metavar,
    Output,
    Section,
)


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
        description="questions about every clip in --clips, instead of --question; usually a list in the file of "
        "--config",
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
    dtype: EngineDtype = None
    limits: AudioLimits = AudioLimits()
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of questions without an answer above which the job fails"
    )
    rows_per_part: int = Field(128, ge=1, description="questions per output file; a file is written whole")
    batch_size: int = Field(16, ge=1, description="questions that an actor answers at once")
    workers: int = Field(2, ge=1, description="number of actors that run the model")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs per actor")

    @property
    def clip_questions(self) -> list[str]:
        """Questions about every clip of the folder."""
        return [self.question] if self.question is not None else self.questions

    @property
    def identity(self) -> dict[str, Any]:
        """Options that the answers and their files depend on."""
        excluded = {"output", "max_failed_share", "batch_size", "workers", "gpus_per_worker"}
        return self.model_dump(exclude=excluded)

    @model_validator(mode="after")
    def _check_questions(self) -> "PredictConfig":
        if self.question is not None and self.questions:
            raise ValueError("set `question` or `questions`, not both")
        if self.table and self.clip_questions:
            raise ValueError("`table` contains the questions; remove `question` and `questions`")
        if not self.table and not (self.clips and self.clip_questions):
            raise ValueError("set `clips`, a folder, with `question` or `questions`; or set `table`")
        if not all(text.strip() for text in self.clip_questions):
            raise ValueError("a question is empty; write it or remove it")
        return self
