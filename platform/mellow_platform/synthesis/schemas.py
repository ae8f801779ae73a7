"""Schemas of answers, one per kind of request, and the parser that validates an answer."""

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


def _normalized_aspect(value: Any) -> Any:
    """Return an aspect as it is listed; models write it in capitals, or with underscores."""
    return " ".join(value.lower().replace("_", " ").split()) if isinstance(value, str) else value


Aspect = Annotated[
    Literal["audio events", "objects", "acoustic scenes", "signal properties", "semantics", "listener emotions"],
    BeforeValidator(_normalized_aspect),
]
Text = Annotated[str, Field(min_length=1)]
BROKEN_JSON, WRONG_FORM = "broken_json", "wrong_form"  # reasons of malformed answers
CHOICES = 4  # choices per question of a model; rules may find fewer


class AnswerSchema(BaseModel):
    """Base of all schemas: unknown keys and values of other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class DetailQuestion(AnswerSchema):
    """An open question."""

    aspect: Aspect
    question: Text
    answer: Text


class ChoiceQuestion(AnswerSchema):
    """A multiple-choice question; `answer` is one of its choices."""

    aspect: Aspect
    question: Text
    choices: Annotated[list[Text], Field(min_length=2, max_length=CHOICES)]
    answer: Text


class DifferenceAnswer(AnswerSchema):
    """The difference between two clips, at three lengths."""

    few_words: Text
    sentence: Text
    paragraph: Text


class EntailmentAnswer(AnswerSchema):
    """A true, a plausible and a false hypothesis about a clip."""

    true: Text
    plausible: Text
    false: Text


class BlindAnswer(AnswerSchema):
    """The answer to a question without audio."""

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
INDEPENDENT_QUESTIONS = ("detail", "mcq")  # kinds of which some questions are useful without the others


class BadAnswerError(ValueError):
    """A malformed answer; `reason` is `broken_json` or `wrong_form`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def answer_model(kind: str, pairs: int) -> type[AnswerSchema]:
    """Return the schema of an answer to a request of `kind`: a list of `pairs` items, or three texts."""
    if kind in OBJECTS:
        return OBJECTS[kind]
    name, item = LISTS[kind]
    items = (Annotated[list[item], Field(min_length=pairs, max_length=pairs)], ...)  # type: ignore[valid-type]
    return create_model(kind.capitalize(), __base__=AnswerSchema, **{name: items})  # type: ignore[call-overload]


def schema(request: WritingRequest) -> dict[str, Any]:
    """Return the JSON schema of the answer to `request`, with keywords that servers accept in strict mode."""
    return _drop_keys(answer_model(request.kind, request.pairs).model_json_schema(), "minLength")


def unbounded_schema(request: WritingRequest) -> dict[str, Any]:
    """Return the JSON schema without lengths of lists, which some servers reject."""
    return _drop_keys(schema(request), "minItems", "maxItems")


def _drop_keys(value: Any, *keys: str) -> Any:
    if isinstance(value, dict):
        return {name: _drop_keys(item, *keys) for name, item in value.items() if name not in keys}
    return [_drop_keys(item, *keys) for item in value] if isinstance(value, list) else value


def parse(request: WritingRequest, text: str, min_questions: int) -> dict[str, Any]:
    """Return the content of an answer; text around its JSON (a code fence, reasoning) is ignored.

    Malformed detail and mcq questions are dropped, and those past `request.pairs`.

    Args:
        min_questions: smallest number of valid detail or mcq questions.

    Raises:
        BadAnswerError: the answer contains no valid JSON object (`broken_json`), or none in the schema (`wrong_form`).
    """
    content, first = None, None
    for body in _objects(text.rpartition("</think>")[2]):
        try:
            # The last valid object counts: models may write drafts first.
            is_list = request.kind in INDEPENDENT_QUESTIONS
            content = _parse_questions(request, body, min_questions) if is_list else _parse_object(request, body)
        except BadAnswerError as error:
            first = first or error
    if content is None:
        raise first or BadAnswerError(BROKEN_JSON, "the answer contains no JSON object")
    return content


def _objects(text: str) -> Iterator[str]:
    """Yield the JSON objects in a text; for a brace without a valid object, yield the rest of the text."""
    start = text.find("{")
    while start >= 0:
        try:
            end = json.JSONDecoder().raw_decode(text, start)[1]
            yield text[start:end]
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
            yield text[start:]
        start = text.find("{", end)


class _QuestionList(AnswerSchema):
    """Questions of a model before each is validated."""

    questions: list[Any]


def _parse_questions(request: WritingRequest, body: str, min_questions: int) -> dict[str, Any]:
    questions, first = [], None
    for number, fields in enumerate(_validate(_QuestionList, body)["questions"]):
        try:
            questions.append(LISTS[request.kind][1].model_validate(fields).model_dump())
        except ValidationError as error:
            first = first or _schema_error(error, f"questions.{number}")
    if len(questions) < min_questions:
        raise first or BadAnswerError(WRONG_FORM, f"questions: found {len(questions)}; expected {request.pairs}")
    return {"questions": questions[: request.pairs]}


def _parse_object(request: WritingRequest, body: str) -> dict[str, Any]:
    content = _validate(answer_model(request.kind, request.pairs), body)
    if request.kind in LISTS:
        _check_numbers(request, content[LISTS[request.kind][0]])
    return content


def _validate(model: type[AnswerSchema], body: str) -> dict[str, Any]:
    try:
        return model.model_validate_json(body).model_dump()
    except ValidationError as error:
        raise _schema_error(error) from error


def _schema_error(error: ValidationError, *path: str) -> BadAnswerError:
    first = error.errors()[0]
    location = ".".join((*path, *map(str, first["loc"])))
    message = f"{location}: {first['msg']}" if location else first["msg"]
    return BadAnswerError(BROKEN_JSON if first["type"] == "json_invalid" else WRONG_FORM, message)


def _check_numbers(request: WritingRequest, items: list[dict[str, Any]]) -> None:
    numbers = sorted(item["number"] for item in items)
    if numbers != list(range(1, request.pairs + 1)):
        raise BadAnswerError(WRONG_FORM, f"numbers {json.dumps(numbers)}: expected 1 to {request.pairs}, each once")
