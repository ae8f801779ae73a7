"""Messages between the endpoint and a model's replicas, besides the engine's `Request`."""

from dataclasses import dataclass
from typing import Literal

from mellow_platform.inference.request import ChoiceScore

MODEL = "Model"  # deployment in every model's application; the application is named after the model


@dataclass(frozen=True)
class ClipFormat:
    """Clips that a model takes as input: `clip_samples` samples at `sampling_rate` Hz."""

    sampling_rate: int
    clip_samples: int


@dataclass(frozen=True)
class Piece:
    """A token: id, its own text, the text that it completes, log-probability. Own text only with log-probability."""

    token: int
    spelled: str
    text: str
    logprob: float | None


@dataclass(frozen=True)
class WrittenAnswer:
    """A whole answer. `pieces` are its tokens without the end marker, if log-probabilities were requested."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    pieces: tuple[Piece, ...] = ()


AnswerEvent = tuple[int, Piece | WrittenAnswer]  # number of the request; its next token, or at the end its answer


@dataclass(frozen=True)
class ChosenAnswer:
    """Offered answers, the most likely first."""

    scores: tuple[ChoiceScore, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Refusal:
    """A request that a replica refused; `param` is the field at fault in the client's request."""

    message: str
    param: str
    code: Literal["front_end_changed", "queue_full", "context_length_exceeded", "replica_lost"] | None
    status: int = 400
