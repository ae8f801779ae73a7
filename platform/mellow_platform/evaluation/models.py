"""What can be judged: a Mellow folder, an endpoint that hears, and answers that need no ears to compare with."""

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import openai
import pyarrow as pa
from pydantic import SecretStr

from mellow_platform import storage
from mellow_platform.completion import WAV_RATE, input_audio, read_completion, said
from mellow_platform.config import EvaluateConfig
from mellow_platform.data.audio import AudioError, Limits, encode
from mellow_platform.data.clip_reader import ClipAddress, read_clips
from mellow_platform.data.tables import read_table
from mellow_platform.evaluation.dataset import BenchmarkItem
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.engine_protocol import InferenceEngine
from mellow_platform.inference.predict_job import decode_or_reason
from mellow_platform.inference.request import Answer, Clip, ClipFeatures, Request
from mellow_platform.inference.windows import windows
from mellow_platform.preprocessing.feature_store import FeatureStore

NOISE_LEVEL = 0.1  # standard deviation, full scale 1
UNANSWERED, REFUSED = "unanswered", "refused"  # after all retries; for good
KEPT = "answers so far are kept: submit the job again to go on"
AT_FAULT_ALONE = 4  # so many questions of a part may be at fault that they have no answer; of more, the endpoint is
TEXT_SHOWN = 200  # characters of a body that is no answer
NEEDS_AUDIO = "; a model that insists on audio takes endpoint.text_only: silence"
HOPELESS = {401: "check OPENAI_API_KEY", 403: "check OPENAI_API_KEY", 404: "check the URL and endpoint.model"}


@dataclass(frozen=True)
class ModelInput:
    """What is asked: the prompt, and keys of the clips (ids in the shards, or URIs)."""

    prompt: str
    clips: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the answer; empty where there is none.
        seconds: from asking to the answer: of an endpoint without refusals and pauses before the try that it answered,
            of an engine with the wait for a slot.
        error: short name to count by of why there is no answer.
        detail: the reason in words; of an answer, what was cut, in words to count by.
    """

    text: str = ""
    seconds: float | None = None
    error: str | None = None
    detail: str | None = None


class EvaluatedModel(Protocol):
    """A model that hears; made once in each actor. Several of its calls may run at a time."""

    def answer(self, questions: Sequence[ModelInput], condition: str) -> list[Reply]:
        """Answer questions about their clips (`audio`), with `noise` in their place, or without them (`text_only`)."""


def noise_for(clip: str, samples: int) -> np.ndarray:
    """Return the Gaussian noise [samples] that stands for a clip: the same every time."""
    rng = np.random.default_rng(zlib.crc32(clip.encode()))
    return rng.normal(0.0, NOISE_LEVEL, samples).astype(np.float32)


class MellowFolder:
    """A Mellow folder in the engine; clips that the shards hold are not encoded again.

    Under `text_only` it hears the mean of what the encoder makes of clips, which tells nothing about any one. Silence
    would: it is a sound that there are right answers to.

    Args:
        among: clips to take the mean of.
    """

    def __init__(self, config: EvaluateConfig, store: FeatureStore | None, among: Sequence[str]):
        self.config, self.store = config, store
        self.engine: InferenceEngine = Engine.load(
            config.model,
            dtype=config.dtype,
            slots=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            max_waiting=config.batch_size,
            cpu_threads=1,
        )
        self.mean = self._mean(among) if "text_only" in config.conditions else None
        self.noise: dict[str, ClipFeatures] = {}  # by clip: drawn and encoded once, asked about many times

    def answer(self, questions: Sequence[ModelInput], condition: str) -> list[Reply]:
        heard = self._heard({clip for question in questions for clip in question.clips}, condition)
        replies: list[Reply | None] = []
        requests = []
        for question in questions:
            sounds = [heard[clip] for clip in question.clips]
            clips = tuple(sound for sound in sounds if not isinstance(sound, AudioError))
            errors = [sound for sound in sounds if isinstance(sound, AudioError)]
            replies.append(Reply(error=errors[0].reason, detail=str(errors[0])) if errors else None)
            if not errors:
                requests.append(Request(question.prompt, clips, self.config.max_new_tokens))
        answers = iter(self.engine.generate(requests))
        return [reply or self._reply(next(answers)) for reply in replies]

    def _reply(self, answer: Answer) -> Reply:
        length = self.engine.prompt_length
        cut = [f"prompt cut to {length} tokens"] if answer.prompt_tokens > length else []
        cut += [f"answer cut to {self.config.max_new_tokens} tokens"] if answer.finish_reason == "length" else []
        return Reply(answer.text, answer.seconds, detail=", ".join(cut) or None)

    def _heard(self, clips: set[str], condition: str) -> dict[str, Clip | AudioError]:
        if condition == "text_only":
            assert self.mean
            return dict.fromkeys(clips, self.mean)
        if condition == "noise":
            samples = self.engine.clip_samples
            for clip in sorted(clips - self.noise.keys()):
                self.noise[clip] = self.engine.encode([noise_for(clip, samples)])[0]
            return {clip: self.noise[clip] for clip in clips}
        places = {clip: self.store.rows[clip] for clip in clips if clip in self.store.rows} if self.store else {}
        heard: dict[str, Clip | AudioError] = {clip: self._stored(place) for clip, place in places.items()}
        limits = Limits(**self.config.limits.model_dump())
        rate = self.engine.sampling_rate
        for address, data in read_clips(
            [ClipAddress(clip, "", clip) for clip in sorted(clips - places.keys())], limits
        ):
            waveform = decode_or_reason(data, rate, limits)
            if not isinstance(waveform, AudioError):
                waveform = windows([waveform], self.engine.clip_samples, rate, "first")[0].clips[0]
            heard[address.uri] = waveform
        return heard

    def _mean(self, clips: Sequence[str]) -> ClipFeatures:
        heard = [clip for clip in self._heard(set(clips), "audio").values() if not isinstance(clip, AudioError)]
        features = [clip if isinstance(clip, ClipFeatures) else self.engine.encode([clip])[0] for clip in heard]
        if not features:  # nothing can be heard under the condition audio either
            return self.engine.encode([np.zeros(self.engine.clip_samples, np.float32)])[0]
        frames, latent = ([getattr(clip, name) for clip in features] for name in ("frames", "latent"))
        return ClipFeatures(_mean_of(frames), _mean_of(latent))

    def _stored(self, place: int) -> ClipFeatures:
        assert self.store
        return ClipFeatures(self.store.arrays["frames"][place], self.store.arrays["latent"][place])


def _mean_of(arrays: list[np.ndarray]) -> np.ndarray:
    return np.stack(arrays).mean(axis=0, dtype=np.float64).astype(np.float16)


def _client(config: EvaluateConfig, key: SecretStr) -> openai.OpenAI:
    section = config.endpoint
    return openai.OpenAI(
        base_url=config.model, api_key=key.get_secret_value(), max_retries=section.retries, timeout=section.timeout
    )


def listed_model(config: EvaluateConfig, key: SecretStr) -> str:
    """Return what the endpoint calls the first of its models.

    Raises:
        ConnectionError: it lists none.
    """
    try:
        listed = _client(config, key).models.list().data
    except (openai.OpenAIError, AttributeError, ValueError) as error:  # the latter of a page that is no API's
        raise ConnectionError(
            f"{config.model} does not list its models: {error}; give endpoint.model, or the address that ends in /v1"
        ) from error
    if not listed:
        raise ConnectionError(f"{config.model} lists no model: give endpoint.model")
    return listed[0].id


class Endpoint:
    """An endpoint that speaks OpenAI's chat completions and takes `input_audio` parts.

    A question that it trips over, or that takes too long, has no answer. Where others have none either, the job ends
    and can be submitted again.

    Args:
        key: hides itself, lest it stand in what Ray and errors print.
        model: what the endpoint calls it.
        works: whether it has answered something in a run before.

    Raises:
        ConnectionError: it cannot be reached, or refuses the key, the model or the address.
    """

    def __init__(self, config: EvaluateConfig, key: SecretStr, model: str, works: bool):
        self.config, self.model, self.works = config, model, works
        self.client = _client(config, key)
        self.pool = ThreadPoolExecutor(config.endpoint.concurrency)

    def answer(self, questions: Sequence[ModelInput], condition: str) -> list[Reply]:
        sounds = self._sounds({clip for question in questions for clip in question.clips}, condition)
        replies = list(self.pool.map(lambda question: self._reply(question, sounds, condition), questions))
        self._stop_if_nobody_answers(replies)
        return replies

    def _stop_if_nobody_answers(self, replies: list[Reply]) -> None:
        """Raise ConnectionError where it is not these questions alone that get no answer, most likely.

        They are left for the next run then.
        """
        if any(reply.seconds is not None for reply in replies):
            self.works = True
            return
        without = [reply for reply in replies if reply.error in (UNANSWERED, REFUSED)]
        gone = sum(reply.error == UNANSWERED for reply in without) > AT_FAULT_ALONE
        if without and (gone or not self.works):
            raise ConnectionError(f"{self.config.model} answers nothing: {without[0].detail}; {KEPT}")

    def _reply(self, question: ModelInput, sounds: dict[str, dict[str, Any] | AudioError], condition: str) -> Reply:
        content: list[Any] = [{"type": "text", "text": question.prompt}]
        for clip in question.clips:
            sound = sounds.get(clip)
            if isinstance(sound, AudioError):
                return Reply(error=sound.reason, detail=str(sound))
            if sound:
                content.append(sound)
        try:
            return self._read(self._ask(content))
        except openai.APIStatusError as error:
            if error.status_code in HOPELESS:
                raise ConnectionError(f"{self.config.model} refuses: {error}; {HOPELESS[error.status_code]}") from error
            passes = error.status_code in (408, 409, 429) or error.status_code >= 500
            hint = NEEDS_AUDIO if condition == "text_only" and not sounds else ""
            return Reply(error=UNANSWERED if passes else REFUSED, detail=f"{error}{hint}")
        except openai.OpenAIError as error:  # it took too long, or is not there
            return Reply(error=UNANSWERED, detail=str(error))

    def _ask(self, content: list[Any]) -> Any:
        """Return the response to a message, repeated as often as is allowed."""
        return self.client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=self.config.max_new_tokens,
            temperature=0.0,
        )

    def _read(self, response: Any) -> Reply:
        completion = read_completion(response)
        if completion is None:
            shown = response.text[:TEXT_SHOWN]
            return Reply(error=UNANSWERED, detail=f"what came is no chat completion: {shown}")
        seconds, choice = response.elapsed.total_seconds(), completion.choices[0]
        text = said(choice)
        if not text:
            return Reply(error="empty", detail=f"an answer without text ({choice.finish_reason})", seconds=seconds)
        cut = f"answer cut to {self.config.max_new_tokens} tokens" if choice.finish_reason == "length" else None
        return Reply(text, seconds, detail=cut)

    def _sounds(self, clips: set[str], condition: str) -> dict[str, dict[str, Any] | AudioError]:
        """Return the clips as parts of a message."""
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
        limits = Limits(**self.config.limits.model_dump())
        sounds: dict[str, dict[str, Any] | AudioError] = {}
        for address, data in read_clips([ClipAddress(clip, "", clip) for clip in sorted(clips)], limits):
            sounds[address.uri] = data if isinstance(data, AudioError) else self._as_sent(address.uri, data, limits)
        return sounds

    def _as_sent(self, uri: str, data: bytes, limits: Limits) -> dict[str, Any] | AudioError:
        try:
            return input_audio(data, PurePosixPath(uri).suffix, self.config.endpoint.formats, limits)
        except AudioError as error:
            return error


def endpoint_key() -> SecretStr:
    """Return the key for an endpoint; one on the same machine may need none."""
    return SecretStr(os.environ.get("OPENAI_API_KEY") or "none")


def draw(items: Sequence[BenchmarkItem], seed: int) -> list[Reply]:
    """Answer by chance: one of the choices, or to an open question the answer to another one of its categories."""
    categories: dict[tuple[str, ...], list[BenchmarkItem]] = defaultdict(list)
    places: dict[str, int] = {}  # of an item in its category
    for item in items:
        if item.references and not item.choices:
            alike = categories[tuple(item.groups.values())]
            places[item.id] = len(alike)
            alike.append(item)
    replies = []
    for item in items:
        rng = np.random.default_rng([seed, zlib.crc32(item.id.encode())])
        alike = categories[tuple(item.groups.values())]
        if item.choices:
            replies.append(Reply(item.choices[int(rng.integers(len(item.choices)))]))
        elif item.id in places and len(alike) > 1:
            other = (places[item.id] + int(rng.integers(1, len(alike)))) % len(alike)
            replies.append(Reply(alike[other].references[0]))
        else:
            replies.append(Reply())
    return replies


def given(benchmark: str, items: Iterable[BenchmarkItem], uri: str) -> list[Reply]:
    """Return the answers in a file to a benchmark's items by their id; one that it leaves out gets none, which is said.

    The file is MMAU's with `model_output` added to each entry, a table with columns `id` and `prediction`, and where it
    is of several benchmarks `benchmark`, or the folder of another evaluation.

    Raises:
        ValueError: it has no such columns, or an id twice.
    """
    file = uri if uri.endswith((".parquet", ".csv", ".json", ".jsonl")) else storage.join(uri, "predictions.parquet")
    texts = "id", "prediction", "model_output", "condition", "benchmark"
    table = read_table(file, text_columns=texts, columns=texts)
    for name, wanted in (("condition", "audio"), ("benchmark", benchmark)):
        if name in table.column_names:
            table = table.filter(pa.compute.equal(table[name], wanted))
    text = next((name for name in ("prediction", "model_output") if name in table.column_names), "")
    if not text or "id" not in table.column_names:
        raise ValueError(f"{file} has no columns id, and prediction or model_output: they are needed")
    found: dict[str, str] = {}
    for id, answer in zip(table["id"].to_pylist(), table[text].to_pylist(), strict=True):
        if found.setdefault(str(id), answer or "") != (answer or ""):
            raise ValueError(f"{uri} has two answers to question {id}: keep one")
    there = ", ".join(list(found)[:3]) or "none"
    replies = []
    for item in items:
        own = found.get(item.id, found.get(item.id.removeprefix("mmau/")))  # MMAU's ids come without its name
        detail = f"{uri} has no answer to {item.id} (ids there: {there}, ...)"
        replies.append(Reply(own) if own is not None else Reply(error="no_prediction", detail=detail))
    return replies
