"""`mellow ask`: one question about one or two clips, to a model folder or to an endpoint.

Engine and client are imported only when needed: either import takes longer than a short answer.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TextIO, TypeVar
from urllib.parse import urlsplit

import numpy as np

from mellow_platform import storage
from mellow_platform.data.audio import AudioError, decode
from mellow_platform.inference.engine_protocol import InferenceEngine
from mellow_platform.inference.request import Request, Stream
from mellow_platform.inference.windows import windows

if TYPE_CHECKING:
    import openai

FOLDER = "runs/demo/model"  # written by `make demo`
URL = "http://127.0.0.1:8000/v1"  # of `make demo KEEP=1` and jobs/deploy.py
OWNER = "mellow-platform"  # of the models of this project's endpoint
SAMPLING_RATE = 32_000  # Hz, for a check of the clips
SLOTS = 16  # windows answered at a time

Result = TypeVar("Result")


@dataclass(frozen=True)
class ClipQuestion:
    """A question about one or two clips.

    Attributes:
        clips: paths or s3:// URIs of one or two audio files.
        choices: answers to score; if empty, an answer is generated.
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature; 0 takes the most likely token.
        seed: seed of sampling; None gives a different answer each time.
        window: rule for recordings longer than a clip (`mellow_platform.inference.windows.RULES`).

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    text: str
    clips: tuple[str, ...]
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int | None = None
    window: str = "first"

    def __post_init__(self) -> None:
        self.request(tuple(np.zeros(1, np.float32) for _ in self.clips))
        if self.window == "pair" and len(self.clips) == 2:
            raise ValueError(
                "window rule 'pair' makes two clips of one recording; use first or each for two recordings"
            )

    def request(self, clips: tuple[np.ndarray, ...]) -> Request:
        """Return the engine's request for waveforms [samples]."""
        return Request(self.text, clips, self.max_new_tokens, self.temperature, seed=self.seed)


@dataclass
class ClipAnswer:
    """An answer as it is generated.

    Attributes:
        seconds: seconds of the recordings that the answer is about; empty for a single answer.
        pieces: text of the answer; read all before the next answer.
        cut: whether the answer reached `max_new_tokens`; valid after the last piece.
    """

    seconds: str
    pieces: Iterable[str] = ()
    cut: bool = False


def read_question(words: Sequence[str], **options: Any) -> ClipQuestion:
    """Return the question in the positional arguments of a command line: one or two clips, then the text.

    Raises:
        ValueError: the question or the clip is missing, or there are too many clips.
    """
    usage = 'expected one or two clips and a question in quotes, as in: mellow ask clip.wav "what is heard?"'
    *clips, text = words
    if _is_clip(text) or not text.strip():
        raise ValueError(f"the question is missing: the last argument is {text!r}; {usage}")
    if not clips:
        raise ValueError(f"the clip is missing: the only argument is the question {text!r}; {usage}")
    if len(clips) > 2:
        if all(map(_is_clip, clips)):
            raise ValueError(f"{len(clips)} clips ({', '.join(clips)}): a question is about one or two")
        raise ValueError(f"{len(words)} arguments; {usage}")
    return ClipQuestion(text, tuple(clips), **options)


def _is_clip(word: str) -> bool:
    path = PurePosixPath(word)
    return "://" in word or Path(word).exists() or (" " not in word and path.suffix not in ("", "."))


def ask(question: ClipQuestion, model: str | None = None) -> Iterator[ClipAnswer]:
    """Ask a model folder or the URL of an endpoint; by default the demo's folder, or else the demo's endpoint.

    Raises:
        OSError: a clip cannot be read, or the endpoint does not answer.
        ValueError: a clip is not audio, the folder has no model, or the endpoint refuses the request.
    """
    files = [_read(clip) for clip in question.clips]
    _decode(question, files, SAMPLING_RATE)  # fail before a model is loaded or a request is paid for
    if model is None:
        if storage.exists(storage.join(FOLDER, "config.json")):
            return ask_folder(question, files, FOLDER)
        try:
            return ask_endpoint(question, files, URL)
        except ConnectionError:
            raise FileNotFoundError(
                f"no model: the folder {FOLDER} does not exist, and no endpoint answers at {URL}; `make demo` trains a "
                "model, `make demo KEEP=1` also serves it; or pass --model FOLDER_OR_URL"
            ) from None
    if model.startswith(("http://", "https://")):
        return ask_endpoint(question, files, model)
    return ask_folder(question, files, model)


def print_answers(answers: Iterable[ClipAnswer], output: TextIO) -> None:
    """Print each answer on one line, every piece as it arrives, and a note on stderr if one was cut."""
    cut = False
    for answer in answers:
        output.write(f"{answer.seconds}\t" if answer.seconds else "")
        try:
            for piece in answer.pieces:
                output.write(piece)
                output.flush()
        finally:  # so that an error message starts on a new line
            output.write("\n")
            output.flush()
        cut |= answer.cut
    if cut:
        print("note: the answer was cut at --max-new-tokens", file=sys.stderr)


def ask_folder(question: ClipQuestion, files: Sequence[bytes], folder: str) -> Iterator[ClipAnswer]:
    """Ask the model in a folder, in this process.

    Raises:
        ValueError: the folder does not contain a Mellow model.
    """
    with _load(folder, SLOTS if question.window == "each" else 1) as engine:
        recordings = _decode(question, files, engine.sampling_rate)
        parts = windows(recordings, engine.clip_samples, engine.sampling_rate, question.window)
        requests = [question.request(window.clips) for window in parts]
        names = [_seconds(window.seconds) if len(parts) > 1 else "" for window in parts]
        if question.choices:
            for name, request in zip(names, requests, strict=True):
                for score in engine.score(request, question.choices):
                    yield ClipAnswer(name, [_score_line(score.choice, score.probability)])
            return
        for name, stream in zip(names, [engine.submit(request) for request in requests], strict=True):
            answer = ClipAnswer(name)
            answer.pieces = _stream_text(stream, answer)
            yield answer


def _load(folder: str, slots: int) -> InferenceEngine:
    try:
        if not storage.exists(storage.join(folder, "config.json")):
            raise FileNotFoundError("it has no config.json" if storage.exists(folder) else "it does not exist")
        kind = storage.read_json(storage.join(folder, "config.json")).get("model_type")
        if kind != "mellow":
            raise ValueError(f"its config.json is of a {kind!r} model")
        _silence_libraries()
        from mellow_platform.inference.engine import Engine

        return Engine.load(folder, slots=slots)
    except Exception as error:  # errors of storage, transformers, safetensors and torch have no common class
        raise ValueError(
            f"{folder} is not a model folder that can be loaded: {_line(error)}; pass --model with a folder that "
            "jobs/train.py or `mellow convert` wrote, or with an endpoint's URL"
        ) from error


def _silence_libraries() -> None:
    """Turn off warnings and progress bars of transformers, the hub client and torch, and requests to the hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _stream_text(stream: Stream, answer: ClipAnswer) -> Iterator[str]:
    for token in stream:
        yield token.text
    answer.cut = stream.result().finish_reason == "length"


def ask_endpoint(question: ClipQuestion, files: Sequence[bytes], url: str) -> Iterator[ClipAnswer]:
    """Ask an OpenAI-compatible endpoint; only this project's endpoint scores choices.

    The model is OPENAI_MODEL, or the first that the endpoint lists; the key is OPENAI_API_KEY.

    Raises:
        ConnectionError: the endpoint does not answer.
        ValueError: the endpoint refuses the request, or no key is set.
    """
    if question.choices and question.window == "each":
        raise ValueError("--choice with --window each needs a model folder: endpoints score choices for one window")
    if urlsplit(url).path in ("", "/"):
        url = url.rstrip("/") + "/v1"
    client = _client(url)
    model, owner = os.environ.get("OPENAI_MODEL", ""), ""
    if not model:
        models = _call(url, lambda: client.with_options(max_retries=0).models.list().data)
        if not models:
            raise ValueError(f"{url} lists no model; set OPENAI_MODEL to the name of one")
        model, owner = models[0].id, models[0].owned_by
    if question.choices:
        return _choose(client, question, files, url, model)
    return _write(client, question, files, url, model, owner)


def _client(url: str) -> "openai.OpenAI":
    import openai

    loopback = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    key = os.environ.get("OPENAI_API_KEY") or ("none" if loopback else "")
    if not key:
        raise ValueError(f"OPENAI_API_KEY is not set; set it to a key of {url}, or to any text if it needs none")
    http_client = openai.DefaultHttpxClient(trust_env=not loopback)  # no proxy for this machine
    return openai.OpenAI(base_url=url, api_key=key, http_client=http_client)


def _call(url: str, function: Callable[[], Result]) -> Result:
    """Return the result of `function`; add the URL and a remedy to errors of the client."""
    import httpx
    import openai

    try:
        return function()
    except openai.APITimeoutError as error:
        raise ConnectionError(
            f"{url} does not answer in time; retry, or raise the endpoint's number of replicas"
        ) from error
    except openai.APIConnectionError as error:
        raise ConnectionError(
            f"{url} does not answer ({_line(error.__cause__ or error)}); check the URL, or start an endpoint: "
            "make demo KEEP=1"
        ) from error
    except openai.APIStatusError as error:
        raise ValueError(f"{url} answers {error.status_code}: {_reason(error)}; {_remedy(error)}") from error
    except (openai.OpenAIError, httpx.HTTPError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{url}: the response is not a chat completion, or broke off: {_line(error)}; check the URL, and retry"
        ) from error


def _reason(error: "openai.APIStatusError") -> str:
    """Return the endpoint's reason for refusing a request."""
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return _line(message or error.response.reason_phrase).rstrip(".")


def _remedy(error: "openai.APIStatusError") -> str:
    status = error.status_code
    if status in (401, 403):
        return f"set OPENAI_API_KEY to a valid key (it is {'set' if os.environ.get('OPENAI_API_KEY') else 'not set'})"
    if status == 404:
        return "check the URL (most end in /v1) and OPENAI_MODEL"
    if status == 429:
        seconds = error.response.headers.get("Retry-After")
        return f"retry after {seconds} s" if seconds else "retry later"
    return "retry later" if status >= 500 else "correct the request"


def _write(
    client: "openai.OpenAI", question: ClipQuestion, files: Sequence[bytes], url: str, model: str, owner: str
) -> Iterator[ClipAnswer]:
    from mellow_platform.completion import CONTAINERS, input_audio

    # OpenAI's API accepts wav and mp3.
    containers = CONTAINERS if owner == OWNER else ("wav", "mp3")
    content: list[Any] = [{"type": "text", "text": question.text}]
    for clip, data in zip(question.clips, files, strict=True):
        content.append(input_audio(data, PurePosixPath(clip).suffix, containers))
    options: dict[str, Any] = {} if question.seed is None else {"seed": question.seed}
    if question.window != "first":  # other servers refuse unknown fields
        options["extra_body"] = {"window": question.window}
    chunks: Iterable[Any] = _call(
        url,
        lambda: client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=question.max_new_tokens,
            temperature=question.temperature,
            stream=True,
            **options,
        ),
    )
    return _Chunks(url, iter(chunks)).answers()


class _Chunks:
    """Chunks of a streamed completion, sorted by answer: answers for several windows are interleaved."""

    def __init__(self, url: str, chunks: Iterator[Any]):
        self.url, self.chunks = url, chunks
        self.seconds: dict[int, str] = {}
        self.texts: dict[int, list[str]] = {}
        self.ends: dict[int, str] = {}

    def answers(self) -> Iterator[ClipAnswer]:
        """Yield the answers in order; text of later answers is buffered."""
        # The endpoint sends a chunk of every answer before the first text.
        while not self.ends and not any(self.texts.values()):
            self._read()
        for number in sorted(self.texts):
            answer = ClipAnswer(self.seconds[number] if len(self.texts) > 1 else "")
            answer.pieces = self._pieces(number, answer)
            yield answer

    def _pieces(self, number: int, answer: ClipAnswer) -> Iterator[str]:
        while self.texts[number] or number not in self.ends:
            if not self.texts[number]:
                self._read()
            yield from self.texts[number]
            self.texts[number].clear()
        answer.cut = self.ends[number] == "length"

    def _read(self) -> None:
        chunk = _call(self.url, lambda: next(self.chunks, None))
        if chunk is None:
            raise ValueError(
                f"{self.url}: the response ended before the answer did; check that it is an endpoint that speaks "
                "OpenAI's chat completions (most URLs end in /v1), and retry"
            )
        for choice in chunk.choices or ():
            number = choice.index
            spans = getattr(choice, "heard", None) or ()  # only this project's endpoint
            self.seconds.setdefault(number, _seconds([(span["start"], span["end"]) for span in spans]))
            texts = self.texts.setdefault(number, [])
            if text := choice.delta.content or choice.delta.refusal:
                texts.append(text)
            if choice.finish_reason:
                self.ends[number] = choice.finish_reason


def _choose(
    client: "openai.OpenAI", question: ClipQuestion, files: Sequence[bytes], url: str, model: str
) -> Iterator[ClipAnswer]:
    import openai

    form: list[Any] = [
        ("file", (PurePosixPath(clip).name, data)) for clip, data in zip(question.clips, files, strict=True)
    ]
    fields = [("question", question.text), ("model", model), ("window", question.window)]
    fields += [("choices", choice) for choice in question.choices]
    form += [(name, (None, value)) for name, value in fields]
    options: Any = {"headers": {"Content-Type": "multipart/form-data"}}
    try:
        response: Any = _call(url, lambda: client.post("/audio/questions", cast_to=object, files=form, options=options))
        scores = [_score_line(choice["choice"], choice["probability"]) for choice in response["choices"]]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{url}: the response has no scores; --choice needs an endpoint of this project") from error
    except ValueError as error:
        if isinstance(error.__cause__, openai.NotFoundError):
            raise ValueError(f"{error}; --choice needs an endpoint of this project, or a model folder") from error
        raise
    return iter([ClipAnswer("", [score]) for score in scores])


def _read(clip: str) -> bytes:
    remedy = "check AWS_ENDPOINT_URL and the keys" if "://" in clip else "pass the path of an audio file"
    try:
        return storage.read_bytes(clip)
    except FileNotFoundError:
        raise FileNotFoundError(f"clip {clip} does not exist; {remedy}") from None
    except Exception as error:  # errors of botocore are not OSError
        reason = getattr(error, "strerror", None) or _line(error)
        raise OSError(f"clip {clip} cannot be read: {reason}; {remedy}") from error


def _decode(question: ClipQuestion, files: Sequence[bytes], sampling_rate: int) -> list[np.ndarray]:
    """Return the waveforms [samples] of the clips at `sampling_rate` Hz; an error names the clip."""
    recordings = []
    for clip, data in zip(question.clips, files, strict=True):
        try:
            recordings.append(decode(data, sampling_rate))
        except AudioError as error:
            message = f"clip {clip}: {str(error).rstrip('.')}; pass an audio file"
            raise AudioError(error.reason, message) from error
    return recordings


def _seconds(parts: Sequence[tuple[float, float]]) -> str:
    """Return the seconds of one or two recordings as text: `10-20 s`."""
    spans = [f"{round(start, 1):g}-{round(end, 1):g} s" for start, end in parts]
    return " and ".join(dict.fromkeys(spans))


def _score_line(choice: str, probability: float) -> str:
    return f"{probability:.4f}\t{choice}"


def _line(error: object) -> str:
    """Return a message on one line."""
    return " ".join(str(error).split())
