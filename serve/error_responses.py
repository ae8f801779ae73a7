"""Errors that clients receive, in OpenAI's shape. The statuses 429, 500, 503 and 504 are decided here."""

from fastapi.responses import JSONResponse
from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    """Reason of an error; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Body of every response with a status of 400 or above."""

    error: ErrorDetail


class RequestError(Exception):
    """A request that failed: message, name of the field at fault, HTTP status, code, seconds until a retry."""

    def __init__(
        self,
        message: str,
        param: str | None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code = _sendable(message), param and _sendable(param), status, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> ErrorBody:
        """Return the response's body."""
        if self.status < 500:
            kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        else:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def _sendable(text: str) -> str:
    """Return `text` with halves of surrogate pairs escaped: a request can contain them, a response cannot."""
    return text.encode(errors="backslashreplace").decode()


def queue_full(model: str | None = None) -> RequestError:
    """Return the error for a full request queue: that of a model, or by default the endpoint's own."""
    owner = f"model {model!r}" if model else "the endpoint"
    message = f"request queue of {owner} is full; retry after 1 s"
    return RequestError(message, model and "model", 429, "queue_full", retry_after=1)


def internal_error() -> RequestError:
    return RequestError("internal error; the reason is in the server's log", None, 500, "internal_error")


def replicas_lost(model: str, attempts: int) -> RequestError:
    """Return the error for a request whose replica died in each of several attempts."""
    message = f"model {model!r}: {attempts} replicas were lost during the request; retry after 5 s"
    return RequestError(message, None, 503, "model_unavailable", retry_after=5)


def not_ready() -> RequestError:
    return RequestError("no model answers yet; retry after 1 s", None, 503, "not_ready", retry_after=1)


def deadline_exceeded(seconds: float) -> RequestError:
    return RequestError(f"no answer within {seconds:g} s; retry with a smaller max_tokens", None, 504, "deadline")
