"""The forms of answers: for each kind of request a JSON schema, and the check that an answer has it."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from mellow_platform.synthesis.requests import WritingRequest

ASPECTS = (
    "audio events",
    "objects",
    "acoustic scenes",
    "signal properties",
    "semantics",
    "listener emotions",
)


def _aspect(value: Any) -> Any:
    """Return an aspect as it is listed; models write it in capitals, or as a name in code."""
    return " ".join(value.lower().replace("_", " ").split()) if isinstance(value, str) else value


Aspect = Annotated[
    Literal["audio events", "objects", "acoustic scenes", "signal properties", "semantics", "listener emotions"],
    BeforeValidator(_aspect),
]
Text = Annotated[str, Field(min_length=1)]
FAULTS = BROKEN_JSON, WRONG_FORM = ("broken_json", "wrong_form")
CHOICES = 4  # of a question that a model writes; rules may find fewer


class AnswerSchema(BaseModel):
    """Base of every form: no other keys, and no value of another type taken for one."""

    model_config = ConfigDict(extra="forbid", strict=True)


class DetailQuestion(AnswerSchema):
    """An open question."""

    aspect: Aspect
    question: Text
    answer: Text


class ChoiceQuestion(AnswerSchema):
    """A question with choices, one of which is `answer`."""

    aspect: Aspect
    question: Text
    choices: Annotated[list[Text], Field(min_length=2, max_length=CHOICES)]
    answer: Text


class DifferenceAnswer(AnswerSchema):
    """What tells two clips apart, at three lengths."""

    few_words: Text
    sentence: Text
    paragraph: Text


class EntailmentAnswer(AnswerSchema):
    """Hypotheses on a clip: one that is true, one that may be, one that is false."""

    true: Text
    plausible: Text
    false: Text


class BlindAnswer(AnswerSchema):
    """The answer to a question by one who has not heard the audio."""

    number: int
    answer: str
    sure: bool


class Verdict(AnswerSchema):
    """Whether a caption supports an answer."""

    number: int
    supported: bool


LISTS: dict[str, tuple[str, type[AnswerSchema]]] = {
    "detail": ("questions", DetailQuestion),
    "mcq": ("questions", ChoiceQuestion),
    "blind": ("answers", BlindAnswer),
    "support": ("verdicts", Verdict),
}
OBJECTS: dict[str, type[AnswerSchema]] = {"difference": DifferenceAnswer, "entailment": EntailmentAnswer}
WRITTEN_ONE_BY_ONE = ("detail", "mcq")  # each question stands for itself: some are worth having without the others


class BadAnswerError(ValueError):
    """An answer that is not in the form asked for; `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def form(kind: str, pairs: int) -> type[AnswerSchema]:
    """Return the form of an answer to a request of `kind`: so many questions, or three texts."""
    if kind in OBJECTS:
        return OBJECTS[kind]
    name, item = LISTS[kind]
    items = (Annotated[list[item], Field(min_length=pairs, max_length=pairs)], ...)  # type: ignore[valid-type]
    return create_model(kind.capitalize(), __base__=AnswerSchema, **{name: items})  # type: ignore[call-overload]


def schema(request: WritingRequest) -> dict[str, Any]:
    """Return the JSON schema of a model's answer to `request`, in words that strict servers know."""
    return _without(form(request.kind, request.pairs).model_json_schema(), "minLength")


def unbounded(request: WritingRequest) -> dict[str, Any]:
    """Return the same without the lengths of lists, which some servers refuse."""
    return _without(schema(request), "minItems", "maxItems")


def _without(value: Any, *keys: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(item, *keys) for name, item in value.items() if name not in keys}
    return [_without(item, *keys) for item in value] if isinstance(value, list) else value


def parse(request: WritingRequest, text: str, least: int) -> dict[str, Any]:
    """Return the content of an answer; what stands around its JSON (a code fence, thoughts) is left out.

    Of questions that are written, those out of form are left out, and those past `request.pairs`.

    Args:
        least: written questions that it has to hold.

    Raises:
        BadAnswerError: `broken_json` or `wrong_form`.
    """
    content, first = None, None
    for body in _objects(text.rpartition("</think>")[2]):
        try:
            # The last one: a model may try before it answers.
            content = _questions(request, body, least) if request.kind in WRITTEN_ONE_BY_ONE else _whole(request, body)
        except BadAnswerError as error:
            first = first or error
    if content is None:
        raise first or BadAnswerError(BROKEN_JSON, "there is no JSON object")
    return content


def _objects(text: str) -> Iterator[str]:
    """Yield the JSON objects in a text; from a brace that opens none, all that follows it."""
    start = text.find("{")
    while start >= 0:
        try:
            end = json.JSONDecoder().raw_decode(text, start)[1]
            yield text[start:end]
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
            yield text[start:]
        start = text.find("{", end)


class _Questions(AnswerSchema):
    """The list of a model's questions before each is looked at."""

    questions: list[Any]


def _questions(request: WritingRequest, body: str, least: int) -> dict[str, Any]:
    written, first = [], None
    for place, fields in enumerate(_read(_Questions, body)["questions"]):
        try:
            written.append(LISTS[request.kind][1].model_validate(fields).model_dump())
        except ValidationError as error:
            first = first or _out_of_form(error, f"questions.{place}")
    if len(written) < least:
        raise first or BadAnswerError(WRONG_FORM, f"questions: {len(written)} are there, {request.pairs} are wanted")
    return {"questions": written[: request.pairs]}


def _whole(request: WritingRequest, body: str) -> dict[str, Any]:
    content = _read(form(request.kind, request.pairs), body)
    if request.kind in LISTS:
        _check_numbers(request, content[LISTS[request.kind][0]])
    return content


def _read(wanted: type[AnswerSchema], body: str) -> dict[str, Any]:
    try:
        return wanted.model_validate_json(body).model_dump()
    except ValidationError as error:
        raise _out_of_form(error) from error


def _out_of_form(error: ValidationError, *places: str) -> BadAnswerError:
    first = error.errors()[0]
    place = ".".join((*places, *map(str, first["loc"])))
    message = f"{place}: {first['msg']}" if place else first["msg"]
    return BadAnswerError(BROKEN_JSON if first["type"] == "json_invalid" else WRONG_FORM, message)


def _check_numbers(request: WritingRequest, items: list[dict[str, Any]]) -> None:
    numbers = sorted(item["number"] for item in items)
    if numbers != list(range(1, request.pairs + 1)):
        raise BadAnswerError(
            WRONG_FORM, f"numbers {json.dumps(numbers)}: each from 1 to {request.pairs} is needed once"
        )
