"""Models under evaluation: a Mellow folder, or an OpenAI-compatible endpoint."""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import openai
from pydantic import SecretStr

from mellow_platform.completion import WAV_RATE, input_audio, read_completion, said
from mellow_platform.data.audio import AudioError, encode, try_decode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.clip_reader import ClipAddress, read_clips
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.engine_protocol import InferenceEngine
from mellow_platform.inference.request import Answer, Clip, ClipFeatures, Request
from mellow_platform.inference.windows import windows
from mellow_platform.preprocessing.feature_store import FeatureStore

NOISE_LEVEL = 0.1  # standard deviation, full scale 1
UNANSWERED, REFUSED = "unanswered", "refused"  # after all retries; permanently
MAX_FAULTY_QUESTIONS = 4  # failures in a part without answers that may be the questions' fault; more are the endpoint's
SHOWN_CHARACTERS = 200  # of a malformed response, in the error
NEEDS_AUDIO = "; if the model requires audio, set endpoint.text_only: silence"
FATAL_STATUSES = {401: "check OPENAI_API_KEY", 403: "check OPENAI_API_KEY", 404: "check the URL and endpoint.model"}


@dataclass(frozen=True)
class ModelInput:
    """A prompt, and the keys of its clips (ids in the shards, or URIs)."""

    prompt: str
    clips: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """An answer, or the reason of its absence.

    Attributes:
        text: the answer; empty on failure.
        seconds: time from request to answer. For an endpoint, of the successful try only; for an engine, including the
            wait for a slot.
        error: short name of the failure, to count by.
        detail: failure message; for an answer, the truncations of prompt and answer.
    """

    text: str = ""
    seconds: float | None = None
    error: str | None = None
    detail: str | None = None


class EvaluatedModel(Protocol):
    """A model that receives audio. Each actor makes one, and may run several calls concurrently."""

    def answer(self, questions: Sequence[ModelInput], condition: str) -> list[Reply]:
        """Answer questions with their clips (`audio`), with noise instead (`noise`), or without clips (`text_only`)."""


def noise_for(clip: str, samples: int) -> np.ndarray:
    """Return the Gaussian noise [samples] that replaces a clip, deterministic per clip key."""
    rng = np.random.default_rng(zlib.crc32(clip.encode()))
    return rng.normal(0.0, NOISE_LEVEL, samples).astype(np.float32)


class LocalModel:
    """A Mellow folder in the engine; stored features of the shards are used without encoding again.

    Under `text_only` every clip is replaced by the mean of encoder outputs, which carries no information about any
    clip. Silence would: some questions have right answers about it.

    Args:
        sample: clips to average for `text_only`.
    """

    def __init__(self, config: EvaluateConfig, store: FeatureStore | None, sample: Sequence[str]):
        self.config, self.store = config, store
        self.engine: InferenceEngine = Engine.load_for_batches(
            config.model, dtype=config.dtype, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens
        )
        self.mean = self._mean(sample) if "text_only" in config.conditions else None
        self.noise: dict[str, ClipFeatures] = {}  # by clip; encoded once for all its questions

    def answer(self, questions: Sequence[ModelInput], condition: str) -> list[Reply]:
        inputs = self._inputs({clip for question in questions for clip in question.clips}, condition)
        replies: list[Reply | None] = []
        requests = []
        for question in questions:
            loaded = [inputs[clip] for clip in question.clips]
            clips = tuple(clip for clip in loaded if not isinstance(clip, AudioError))
            errors = [clip for clip in loaded if isinstance(clip, AudioError)]
            replies.append(Reply(error=errors[0].reason, detail=str(errors[0])) if errors else None)
            if not errors:
                requests.append(Request(question.prompt, clips, self.config.max_new_tokens))
        answers = iter(self.engine.generate(requests))
        return [reply or self._reply(next(answers)) for reply in replies]

    def _reply(self, answer: Answer) -> Reply:
        length = self.engine.prompt_length
        cuts = [f"prompt cut to {length} tokens"] if answer.prompt_tokens > length else []
        cuts += [f"answer cut to {self.config.max_new_tokens} tokens"] if answer.finish_reason == "length" else []
        return Reply(answer.text, answer.seconds, detail=", ".join(cuts) or None)

    def _inputs(self, clips: set[str], condition: str) -> dict[str, Clip | AudioError]:
        """Return the engine's input for each clip under a condition, or the reason why it cannot be read."""
        if condition == "text_only":
            assert self.mean
            return dict.fromkeys(clips, self.mean)
        if condition == "noise":
            samples = self.engine.clip_samples
            for clip in sorted(clips - self.noise.keys()):
                self.noise[clip] = self.engine.encode([noise_for(clip, samples)])[0]
            return {clip: self.noise[clip] for clip in clips}
        stored = {clip: self.store.rows[clip] for clip in clips if clip in self.store.rows} if self.store else {}
        inputs: dict[str, Clip | AudioError] = {clip: self._stored_features(row) for clip, row in stored.items()}
        limits = self.config.limits
        rate = self.engine.sampling_rate
        addresses = [ClipAddress(clip, "", clip) for clip in sorted(clips - stored.keys())]
        for address, data in read_clips(addresses, limits):
            waveform = try_decode(data, rate, limits)
            if not isinstance(waveform, AudioError):
                waveform = windows([waveform], self.engine.clip_samples, rate, "first")[0].clips[0]
            inputs[address.uri] = waveform
        return inputs

    def _mean(self, clips: Sequence[str]) -> ClipFeatures:
        inputs = [clip for clip in self._inputs(set(clips), "audio").values() if not isinstance(clip, AudioError)]
        features = [clip if isinstance(clip, ClipFeatures) else self.engine.encode([clip])[0] for clip in inputs]
        if not features:  # no clip is readable under the condition audio either
            return self.engine.encode([np.zeros(self.engine.clip_samples, np.float32)])[0]
        frames, latent = ([getattr(clip, name) for clip in features] for name in ("frames", "latent"))
        return ClipFeatures(_mean_array(frames), _mean_array(latent))

    def _stored_features(self, row: int) -> ClipFeatures:
        assert self.store
        return ClipFeatures(self.store.arrays["frames"][row], self.store.arrays["latent"][row])


def _mean_array(arrays: list[np.ndarray]) -> np.ndarray:
    return np.stack(arrays).mean(axis=0, dtype=np.float64).astype(np.float16)


def endpoint_key() -> SecretStr:
    """Return the endpoint's API key from `OPENAI_API_KEY`, or a placeholder for endpoints that need none."""
    return SecretStr(os.environ.get("OPENAI_API_KEY") or "none")


def _client(config: EvaluateConfig, key: SecretStr) -> openai.OpenAI:
    section = config.endpoint
    return openai.OpenAI(
        base_url=config.model, api_key=key.get_secret_value(), max_retries=section.retries, timeout=section.timeout
    )


def first_served_model(config: EvaluateConfig, key: SecretStr) -> str:
    """Return the id of the first model that the endpoint lists.

    Raises:
        ConnectionError: the endpoint lists none.
    """
    try:
        models = _client(config, key).models.list().data
    except (openai.OpenAIError, AttributeError, ValueError) as error:  # the latter two if the URL is not an API's
        raise ConnectionError(
            f"{config.model} does not list its models: {error}; set endpoint.model, or use the URL that ends in /v1"
        ) from error
    if not models:
        raise ConnectionError(f"{config.model} lists no model; set endpoint.model")
    return models[0].id


class RemoteModel:
    """An endpoint with OpenAI's chat completions API and `input_audio` parts.

    A question that fails or times out has no answer. If all questions of a call fail, the endpoint is taken to be down:
    the job stops, and resumes when submitted again.

    Args:
        key: a secret, so that Ray and errors do not print it.
        model: the model's id at the endpoint.
        works: an earlier run got answers from it.

    Raises:
        ConnectionError: the endpoint is unreachable, or rejects the key, the model or the URL.
    """

    def __init__(self, config: EvaluateConfig, key: SecretStr, model: str, works: bool):
        self.config, self.model, self.works = config, model, works
        self.client = _client(config, key)
        self.pool = ThreadPoolExecutor(config.endpoint.concurrency)

    def answer(self, questions: Sequence[ModelInput], condition: str) -> list[Reply]:
        parts = self._audio_parts({clip for question in questions for clip in question.clips}, condition)
        replies = list(self.pool.map(lambda question: self._reply(question, parts, condition), questions))
        self._stop_if_down(replies)
        return replies

    def _stop_if_down(self, replies: list[Reply]) -> None:
        """Raise ConnectionError if the endpoint, rather than single questions, fails; the next run retries them."""
        if any(reply.seconds is not None for reply in replies):
            self.works = True
            return
        failed = [reply for reply in replies if reply.error in (UNANSWERED, REFUSED)]
        down = sum(reply.error == UNANSWERED for reply in failed) > MAX_FAULTY_QUESTIONS
        if failed and (down or not self.works):
            raise ConnectionError(
                f"{self.config.model} answers no question: {failed[0].detail}; "
                "finished answers are kept, submit the job again to resume"
            )

    def _reply(self, question: ModelInput, parts: dict[str, dict[str, Any] | AudioError], condition: str) -> Reply:
        content: list[Any] = [{"type": "text", "text": question.prompt}]
        for clip in question.clips:
            part = parts.get(clip)
            if isinstance(part, AudioError):
                return Reply(error=part.reason, detail=str(part))
            if part:
                content.append(part)
        try:
            return self._parse(self._complete(content))
        except openai.APIStatusError as error:
            status = error.status_code
            if status in FATAL_STATUSES:
                raise ConnectionError(f"{self.config.model} refuses: {error}; {FATAL_STATUSES[status]}") from error
            transient = status in (408, 409, 429) or status >= 500
            hint = NEEDS_AUDIO if condition == "text_only" and not parts else ""
            return Reply(error=UNANSWERED if transient else REFUSED, detail=f"{error}{hint}")
        except openai.OpenAIError as error:  # timeout or connection error
            return Reply(error=UNANSWERED, detail=str(error))

    def _complete(self, content: list[Any]) -> Any:
        """Return the raw response to a message, with the configured retries."""
        return self.client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=self.config.max_new_tokens,
            temperature=0.0,
        )

    def _parse(self, response: Any) -> Reply:
        completion = read_completion(response)
        if completion is None:
            body = response.text[:SHOWN_CHARACTERS]
            return Reply(error=UNANSWERED, detail=f"response is not a chat completion: {body}")
        seconds, choice = response.elapsed.total_seconds(), completion.choices[0]
        text = said(choice)
        if not text:
            return Reply(error="empty", detail=f"answer without text ({choice.finish_reason})", seconds=seconds)
        cut = f"answer cut to {self.config.max_new_tokens} tokens" if choice.finish_reason == "length" else None
        return Reply(text, seconds, detail=cut)

    def _audio_parts(self, clips: set[str], condition: str) -> dict[str, dict[str, Any] | AudioError]:
        """Return each clip as a message part under a condition, or the reason why it cannot be read."""
        if condition == "text_only" and self.config.endpoint.text_only == "omit":
            return {}
        if condition != "audio":
            samples = 10 * WAV_RATE
            silence = np.zeros(samples, np.float32)
            noise = condition == "noise"
            return {
                clip: input_audio(encode(noise_for(clip, samples) if noise else silence, WAV_RATE, "WAV"), "wav")
                for clip in sorted(clips)
            }
        limits = self.config.limits
        parts: dict[str, dict[str, Any] | AudioError] = {}
        for address, data in read_clips([ClipAddress(clip, "", clip) for clip in sorted(clips)], limits):
            parts[address.uri] = data if isinstance(data, AudioError) else self._audio_part(address.uri, data, limits)
        return parts

    def _audio_part(self, uri: str, data: bytes, limits: AudioLimits) -> dict[str, Any] | AudioError:
        try:
            return input_audio(data, PurePosixPath(uri).suffix, self.config.endpoint.formats, limits)
        except AudioError as error:
            return error
