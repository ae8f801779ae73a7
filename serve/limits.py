"""Limits of requests to the endpoint: fields of its configuration that the request models and OpenAPI follow."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema


class RequestLimits(BaseModel):
    """Limits of one request, and of all requests that an endpoint replica answers at the same time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(48 << 20, gt=0, description="largest request body, in bytes; larger ones get 413")
    body_seconds: float = Field(30.0, gt=0, description="longest time to receive a body, in seconds; then 408")
    answer_seconds: float = Field(
        120.0, gt=0, description="longest time to answer after the body, in seconds; then 504"
    )
    ready_seconds: float = Field(5.0, gt=0, description="longest time that /readyz waits, in seconds; then 503")
    max_in_flight: int = Field(256, ge=1, description="requests that an endpoint replica answers at once; then 429")
    max_attempts: int = Field(5, ge=1, description="attempts to answer a request if its replicas are lost; then 503")
    max_new_tokens: int = Field(300, ge=1, description="largest `max_tokens`; each model's own limit applies as well")
    max_n: int = Field(8, ge=1, description="largest `n`: answers per window")
    max_answers: int = Field(64, ge=1, description="answers per request: `n` times the number of windows")
    max_text_chars: int = Field(8192, ge=1, description="longest question or text part, in characters")
    max_parts: int = Field(64, ge=1, description="parts per message")
    max_url_chars: int = Field(2048, ge=1, description="longest URL of a clip, in characters")
    max_stop_strings: int = Field(4, ge=0, description="stop strings per request")
    max_stop_chars: int = Field(256, ge=1, description="longest stop string, in characters")
    max_choices: int = Field(26, ge=0, description="answers that a form can offer to choose from")
    max_choice_chars: int = Field(1024, ge=1, description="longest of these answers, in characters")


# The middleware sets it for each request. The request models are module-level and cannot know an endpoint's limits.
current_limits: ContextVar[RequestLimits] = ContextVar("current_limits", default=RequestLimits())  # noqa: B039 (frozen)


@dataclass(frozen=True)
class AtMost:
    """Annotation of an integer, text or list: a field of `RequestLimits` bounds its value or length."""

    limit: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        keyword = {"integer": "maximum", "string": "maxLength", "array": "maxItems"}[found["type"]]
        return found | {keyword: self._bound()}

    def _bound(self) -> int:
        return getattr(current_limits.get(), self.limit)

    def _check(self, value: Any) -> Any:
        bound, size = self._bound(), value if isinstance(value, int) else len(value)
        if size <= bound:
            return value
        if isinstance(value, int):
            raise PydanticKnownError("less_than_equal", {"le": bound})
        if isinstance(value, str):
            raise PydanticKnownError("string_too_long", {"max_length": bound})
        raise PydanticKnownError("too_long", {"field_type": "List", "max_length": bound, "actual_length": size})
