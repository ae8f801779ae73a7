"""The forms of answers: for each kind of request a JSON schema, and the check that an answer has it."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from mellow_platform.synthesis.asked import Request

ASPECTS = (
    "audio events",
    "objects",
    "acoustic scenes",
    "signal properties",
    "semantics",
    "listener emotions",
)
Aspect = Literal["audio events", "objects", "acoustic scenes", "signal properties", "semantics", "listener emotions"]
Text = Annotated[str, Field(min_length=1)]
CHOICES = 4  # of a question that a model writes; rules may find fewer


class Form(BaseModel):
    """Base of every form: no other keys, and no value of another type taken for one."""

    model_config = ConfigDict(extra="forbid", strict=True)


class DetailQuestion(Form):
    """An open question."""

    aspect: Aspect
    question: Text
    answer: Text


class ChoiceQuestion(Form):
    """A question with choices, one of which is `answer`."""

    aspect: Aspect
    question: Text
    choices: Annotated[list[Text], Field(min_length=2, max_length=CHOICES)]
    answer: Text


class Difference(Form):
    """What tells two clips apart, at three lengths."""

    few_words: Text
    sentence: Text
    paragraph: Text


class Entailment(Form):
    """Hypotheses on a clip: one that is true, one that may be, one that is false."""

    true: Text
    plausible: Text
    false: Text


class BlindAnswer(Form):
    """The answer to a question by one who has not heard the audio."""

    number: int
    answer: str
    sure: bool


class Verdict(Form):
    """Whether a caption supports an answer."""

    number: int
    supported: bool


LISTS: dict[str, tuple[str, type[Form]]] = {
    "detail": ("questions", DetailQuestion),
    "mcq": ("questions", ChoiceQuestion),
    "blind": ("answers", BlindAnswer),
    "support": ("verdicts", Verdict),
}
OBJECTS: dict[str, type[Form]] = {"difference": Difference, "entailment": Entailment}


class BadAnswerError(ValueError):
    """An answer that is not in the form asked for; `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def form(kind: str, pairs: int, least: int) -> type[Form]:
    """Return the form of an answer to a request of `kind`: from `least` to `pairs` questions, or three texts."""
    if kind in OBJECTS:
        return OBJECTS[kind]
    name, item = LISTS[kind]
    items = (Annotated[list[item], Field(min_length=least, max_length=pairs)], ...)  # type: ignore[valid-type]
    return create_model(kind.capitalize(), __base__=Form, **{name: items})  # type: ignore[call-overload]


def schema(request: Request) -> dict[str, Any]:
    """Return the JSON schema of a model's answer to `request`."""
    return form(request.kind, request.pairs, request.pairs).model_json_schema()


def parse(request: Request, text: str, least: int) -> dict[str, Any]:
    """Return the content of an answer; what stands around its JSON (a code fence, thoughts) is left out.

    Args:
        least: questions that it has to hold; the most are `request.pairs`.

    Raises:
        BadAnswerError: `broken_json` or `wrong_form`.
    """
    body = text[max(text.find("{"), 0) : text.rfind("}") + 1]
    try:
        content = form(request.kind, request.pairs, least).model_validate_json(body).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        reason = "broken_json" if first["type"] == "json_invalid" else "wrong_form"
        place = ".".join(map(str, first["loc"]))
        raise BadAnswerError(reason, f"{place}: {first['msg']}" if place else first["msg"]) from error
    if request.kind in ("blind", "support"):
        _check_numbers(request, next(iter(content.values())))
    return content


def _check_numbers(request: Request, items: list[dict[str, Any]]) -> None:
    numbers = sorted(item["number"] for item in items)
    if numbers != list(range(1, request.pairs + 1)):
        raise BadAnswerError(
            "wrong_form", f"numbers {json.dumps(numbers)}: each from 1 to {request.pairs} is needed once"
        )
