"""What the endpoint and a model's replicas say to each other, beside the engine's own `Request`."""

from dataclasses import dataclass
from typing import Literal

from mellow_platform.inference.request import ChoiceScore

MODEL = "Model"  # deployment of every model's application; the application has the model's name


@dataclass(frozen=True)
class ClipFormat:
    """What a model hears: clips of `clip_samples` samples at `sampling_rate` Hz."""

    sampling_rate: int
    clip_samples: int


@dataclass(frozen=True)
class Piece:
    """A token as it is written: its id, the text that it completes, and, where log-probabilities were asked for, its
    own and what it spells alone."""

    token: int
    spelled: str
    text: str
    logprob: float | None


@dataclass(frozen=True)
class WrittenAnswer:
    """A whole answer. `pieces` are its tokens without the end marker, where log-probabilities were asked for."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class ChosenAnswer:
    """Given answers, the likeliest first."""

    scores: tuple[ChoiceScore, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Refusal:
    """A request that a model does not answer, and why; `param` is the field at fault, as the client named it."""

    message: str
    param: str
    code: str
    status: int = 400


FRONT_END_CHANGED = "front_end_changed"  # a new version with another front end took over: decode again and repeat
