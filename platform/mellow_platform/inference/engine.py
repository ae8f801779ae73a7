"""The inference engine: continuous batching over a key-value cache of preallocated slots.

Requests join and leave the batch between two tokens. Two caches hold results that requests share: a clip's audio tokens
(by content), and the keys and values of `[audio 1][separator][audio 2][separator]` (by both clips).

Callers use the methods of `InferenceEngine` (engine_protocol.py), which another engine can implement.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch

from mellow_platform.data.audio import LOUDEST, is_bounded
from mellow_platform.data.partners import second_clip
from mellow_platform.inference.answer_text import AnswerText
from mellow_platform.inference.cached_decoder import CachedDecoder, KeyValueCache
from mellow_platform.inference.cuda_graphs import StepGraphs
from mellow_platform.inference.linear import pack_linears
from mellow_platform.inference.prefix_cache import TensorLRU, clip_arrays, content_key
from mellow_platform.inference.request import (
    Answer,
    Cancelled,
    ChoiceScore,
    Clip,
    ClipFeatures,
    EngineClosed,
    QueueFull,
    Request,
    Stream,
    Token,
)
from mellow_platform.inference.sampling import Sampler
from mellow_platform.model import MellowForConditionalGeneration, MellowProcessor
from mellow_platform.model.folder import load_model

# Positions of new requests that are read between two tokens: about one question about uncached clips. With more, many
# arrivals would delay the answers that are being written. The rest of the queue follows after the next token.
POSITIONS_A_STEP = 512

Result = TypeVar("Result")


@dataclass(eq=False)
class _Sequence:
    """A request from its arrival to its answer."""

    request: Request
    clips: tuple[Clip, Clip]
    keys: tuple[bytes, bytes]
    prompt: list[int]
    prompt_tokens: int
    text: AnswerText
    sampler: Sampler
    stream: Stream = field(default_factory=Stream)
    length: int = 0  # positions in the cache
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """Answers questions with a Mellow model; implements `InferenceEngine`.

    Args:
        model: the model; the engine changes its weights (see `CachedDecoder`), so do not use it afterwards.
        processor: the model's processor.
        dtype: `float32` or `int8` on CPU, `bfloat16` on a GPU; default: `float32` on CPU, `bfloat16` on a GPU.
        slots: answers that are written at the same time.
        max_new_tokens: largest `max_new_tokens` of a request; it sets the length of a slot.
        max_waiting: requests that wait for a slot; `submit` refuses further ones.
        clip_cache_bytes: size of the cache of audio tokens.
        prefix_cache_bytes: size of the cache of keys and values.
        cpu_threads: threads for computation; default: torch's number.
    """

    def __init__(
        self,
        model: MellowForConditionalGeneration,
        processor: MellowProcessor,
        *,
        dtype: str | None = None,
        slots: int = 16,
        max_new_tokens: int = 300,
        max_waiting: int = 256,
        clip_cache_bytes: int = 64 << 20,
        prefix_cache_bytes: int = 256 << 20,
        cpu_threads: int | None = None,
    ):
        self.device = model.device.type
        self.dtype = dtype or ("bfloat16" if self.device == "cuda" else "float32")
        self.processor = processor
        self.slots, self.max_new_tokens, self.max_waiting = slots, max_new_tokens, max_waiting
        self._end_token = processor.tokenizer.eos_token_id
        self._prefix_length = 2 * (model.config.num_audio_tokens + 1)
        self._separator_token = model.config.separator_token_id
        self._silence = np.zeros(processor.feature_extractor.clip_samples, np.float32)
        self._clip_tokens = TensorLRU(clip_cache_bytes)
        self._prefixes = TensorLRU(prefix_cache_bytes)
        self._active: list[_Sequence] = []  # the sequence in slot i is number i
        self._waiting: deque[_Sequence] = deque()
        self._calls: deque[tuple[Callable[[], object], Future]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._broken: BaseException | None = None
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(model, slots, cpu_threads, ready), name="mellow-engine", daemon=True
        )
        self._thread.start()
        ready.result()

    @classmethod
    def load(cls, model_uri: str, *, dtype: str | None = None, **options) -> "Engine":
        """Load the model folder `model_uri`, onto the GPU if there is one; `options` are the constructor's.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        model, processor = load_model(model_uri)
        if torch.cuda.is_available() and dtype != "int8":
            model.to("cuda", torch.float32 if dtype == "float32" else torch.bfloat16)
        return cls(model, processor, dtype=dtype, **options)

    @classmethod
    def load_for_batches(cls, uri: str, *, dtype: str | None, batch_size: int, max_new_tokens: int) -> "Engine":
        """Load an engine for a batch job's actor: `batch_size` slots, as many waiting requests, and one CPU thread."""
        options = {"slots": batch_size, "max_waiting": batch_size, "max_new_tokens": max_new_tokens}
        return cls.load(uri, dtype=dtype, cpu_threads=1, **options)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine; unanswered requests end with `EngineClosed`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of waveforms, in Hz."""
        return self.processor.feature_extractor.sampling_rate

    @property
    def clip_samples(self) -> int:
        """Length of a clip in samples."""
        return self.processor.feature_extractor.clip_samples

    @property
    def prompt_length(self) -> int:
        """Length that a question is cut to, in tokens."""
        return self.processor.prompt_length

    @property
    def stats(self) -> dict[str, int]:
        """Current counts: active and waiting requests, and hits, misses and bytes of each cache."""
        return {
            "active": len(self._active),
            "waiting": len(self._waiting),
            "clip_hits": self._clip_tokens.hits,
            "clip_misses": self._clip_tokens.misses,
            "clip_bytes": self._clip_tokens.bytes,
            "prefix_hits": self._prefixes.hits,
            "prefix_misses": self._prefixes.misses,
            "prefix_bytes": self._prefixes.bytes,
        }

    def check(self, timeout: float) -> None:
        """Check that the engine's loop completes a step within `timeout` seconds.

        Raises:
            TimeoutError: it did not.
            EngineClosed: the engine was closed or failed.
        """
        self._call(lambda: None, ahead=True).result(timeout)

    def prompt_tokens(self, text: str) -> int:
        """Return the number of tokens of a question, end marker included."""
        return len(self.processor.question_ids(text))

    def token_text(self, token: int) -> str | None:
        """Return the text of one token id, or None for the end marker."""
        return None if token == self._end_token else self.processor.tokenizer.decode([token])

    def submit(self, request: Request) -> Stream:
        """Queue a request; its tokens arrive in the stream.

        Raises:
            QueueFull: `max_waiting` requests wait.
            ValueError: the request's `max_new_tokens` is past the engine's, or a clip is not a waveform or not finite.
            EngineClosed: the engine was closed or failed.
        """
        sequence = self._prepare(request)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait for a slot, the limit is {self.max_waiting}")
            return self._enqueue(sequence)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests; wait while the queue is full.

        Raises:
            Exception: that of the first request that failed.
        """
        streams = []
        for request in requests:
            sequence = self._prepare(request)
            with self._changed:
                self._changed.wait_for(lambda: len(self._waiting) < self.max_waiting or self._closed)
                self._check_open()
                streams.append(self._enqueue(sequence))
        return [stream.result() for stream in streams]

    def score(self, request: Request, choices: Sequence[str]) -> list[ChoiceScore]:
        """Rank choices as answers to a request by their log-probability, the most likely first.

        Clips and prompt are read once, then all choices in one batch.

        Raises:
            ValueError: there are no choices.
        """
        return self.submit_score(request, choices).result()

    def submit_score(self, request: Request, choices: Sequence[str]) -> Future[list[ChoiceScore]]:
        """Queue a request to `score`; it is skipped if the future is cancelled before its turn.

        Raises:
            ValueError: there are no choices.
        """
        if not choices:
            raise ValueError("no choices to score; pass at least one")
        sequence = self._prepare(request)
        answers = [self.processor.answer_ids(choice) for choice in choices]

        def ranked() -> list[ChoiceScore]:
            logprobs = self._score(sequence, answers)
            shares = torch.tensor(logprobs).softmax(dim=0).tolist()
            scored = [ChoiceScore(*values) for values in zip(choices, logprobs, shares, strict=True)]
            return sorted(scored, key=lambda score: -score.logprob)

        return self._call(ranked)

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[ClipFeatures]:
        """Return the encoder's features of waveforms [samples], in fp16 as shards store them."""
        fitted = [self.processor.feature_extractor.spectrogram.fit(waveform) for waveform in waveforms]
        encoded = self._call(lambda: [self._encode(waveform) for waveform in fitted]).result()
        return [ClipFeatures(*(part[0].half().cpu().numpy() for part in parts)) for parts in encoded]

    def _prepare(self, request: Request) -> _Sequence:
        if request.max_new_tokens > self.max_new_tokens:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; the engine's limit is {self.max_new_tokens}")
        fit = self.processor.feature_extractor.spectrogram.fit
        clips = [fit(clip) if isinstance(clip, np.ndarray) else clip for clip in request.clips]
        for number, clip in enumerate(clips):
            # In the key-value cache they would spoil later answers from the same slot.
            if not all(map(is_bounded, clip_arrays(clip))):
                raise ValueError(
                    f"clip {number} contains NaN, infinity or a value past {LOUDEST:g}; check its decoding or storage"
                )
        pair: tuple[Clip, Clip] = (clips[0], second_clip(clips, self.processor.partner, self._silence))
        first = content_key(pair[0])
        return _Sequence(
            request,
            pair,
            (first, first if pair[1] is pair[0] else content_key(pair[1])),
            self.processor.prompt_ids(request.text),
            self.prompt_tokens(request.text),
            AnswerText(self.processor.tokenizer, request.stop),
            Sampler(request, self.device),
        )

    def _enqueue(self, sequence: _Sequence) -> Stream:
        """Append a sequence to the queue; the caller holds the lock."""
        self._waiting.append(sequence)
        self._changed.notify_all()
        return sequence.stream

    def _check_open(self) -> None:
        if self._broken:
            raise EngineClosed("the engine failed") from self._broken
        if self._closed:
            raise EngineClosed("the engine was closed")

    def _call(self, function: Callable[[], Result], ahead: bool = False) -> Future[Result]:
        """Run `function` in the engine's thread between two tokens, `ahead` of other waiting calls or after them."""
        future: Future[Result] = Future()
        with self._changed:
            self._check_open()
            (self._calls.appendleft if ahead else self._calls.append)((function, future))
            self._changed.notify_all()
        return future

    # The methods below run in the engine's thread.

    def _run(
        self, model: MellowForConditionalGeneration, slots: int, cpu_threads: int | None, ready: Future[None]
    ) -> None:
        if cpu_threads:
            torch.set_num_threads(cpu_threads)  # applies to the calling thread
        with torch.inference_mode():
            try:
                # Not in the caller's thread: each thread that computes has its own OpenMP threads, and these spin while
                # they wait only if they are no more than the cores. A token takes 1.6 times as long otherwise.
                self._take_over(model, slots)
            except Exception as error:
                self._closed = True
                ready.set_exception(error)
                return
            ready.set_result(None)
            del model
            self._serve()

    def _take_over(self, model: MellowForConditionalGeneration, slots: int) -> None:
        """Convert the model's weights for inference and allocate the key-value cache."""
        self._decoder = CachedDecoder(model.merge_lora().language_model, self.dtype)
        # The rest of the model encodes clips without a decoder.
        del model.language_model
        # The encoder runs once per clip, and int8's second row costs it more time than int8 saves.
        pack_linears(model.audio_encoder, "bfloat16" if self.dtype == "bfloat16" else "float32")
        # The model's files are mapped into memory, and one tensor keeps its whole file there. Copies of the small
        # tensors that remain release the files.
        model._apply(torch.clone)
        self._model = model
        length = self._prefix_length + self.processor.prompt_length + self.max_new_tokens
        self._cache = self._decoder.new_cache(slots, length)
        self._next_logits: Callable[[list[int], list[int]], torch.Tensor] = (
            StepGraphs(self._decoder, self._cache)
            if self.device == "cuda"
            else partial(self._decoder.step, self._cache)
        )

    def _serve(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:
            self._broken = error
            raise
        finally:
            with self._changed:
                self._closed = True
                left = [*self._active, *self._waiting]
                self._active.clear()
                self._waiting.clear()
                self._changed.notify_all()
            closed = EngineClosed("the engine failed" if self._broken else "the engine was closed")
            closed.__cause__ = self._broken
            for sequence in left:
                sequence.stream.put(closed)
            for _, future in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(closed)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._active or self._waiting or self._calls)
            return not self._closed

    def _step(self) -> None:
        """Drop cancelled requests, run one call, admit waiting requests, and write a token of every answer."""
        self._drop_cancelled()
        if self._calls:  # only one per step, or a caller that never pauses would block all answers
            function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
        read = 0
        while read < POSITIONS_A_STEP and len(self._active) < self._cache.slots and (sequence := self._next()):
            try:
                read += self._begin(sequence)
            except Exception as error:  # concerns only this request
                sequence.stream.put(error)
        if self._active:
            self._decode()

    def _drop_cancelled(self) -> None:
        for slot in reversed(range(len(self._active))):
            if self._active[slot].stream.cancelled:
                self._active[slot].stream.put(Cancelled())
                self._release(slot)
        with self._changed:
            for sequence in [sequence for sequence in self._waiting if sequence.stream.cancelled]:
                self._waiting.remove(sequence)
                sequence.stream.put(Cancelled())
            self._changed.notify_all()

    def _next(self) -> _Sequence | None:
        """Remove the request that has waited longest from the queue and return it."""
        with self._changed:
            sequence = self._waiting.popleft() if self._waiting else None
            self._changed.notify_all()
        return sequence

    def _begin(self, sequence: _Sequence) -> int:
        """Read clips and prompt into the next free slot and write the first token; return the positions read."""
        slot = len(self._active)
        hidden, read = self._read(sequence, self._cache, slot)
        logits = self._decoder.logits(hidden)
        self._active.append(sequence)
        self._push(slot, logits, int(logits.argmax()))
        return read

    def _read(self, sequence: _Sequence, cache: KeyValueCache, slot: int) -> tuple[torch.Tensor, int]:
        """Read clips and prompt into a slot; return the last position's hidden state and the positions computed.

        Prefix and prompt are computed separately, one sequence at a time, also if the prefix is not cached. So the
        results are the same with and without the cache, and in any batch.
        """
        read = len(sequence.prompt)
        prefix = self._prefixes.get(sequence.keys)
        if prefix is None:
            embeddings = self._prefix_embeddings(sequence)
            self._decoder(embeddings, cache, [0], first=slot)
            self._prefixes.put(sequence.keys, cache.copy_out(slot, self._prefix_length))
            read += self._prefix_length
        else:
            cache.copy_in(slot, prefix)
        prompt = self._decoder.embed(torch.tensor([sequence.prompt], device=self.device))
        hidden = self._decoder(prompt, cache, [self._prefix_length], first=slot)
        sequence.length = self._prefix_length + len(sequence.prompt)
        return hidden[0, -1], read

    def _prefix_embeddings(self, sequence: _Sequence) -> torch.Tensor:
        """Return `[audio 1][separator][audio 2][separator]` as embeddings [1, positions, hidden]."""
        separator = self._decoder.embed(torch.tensor([self._separator_token], device=self.device))
        parts = []
        for clip, key in zip(sequence.clips, sequence.keys, strict=True):
            tokens = self._clip_tokens.get(key)
            if tokens is None:
                tokens = self._audio_tokens(clip)
                self._clip_tokens.put(key, tokens)
            parts += [tokens, separator]
        return torch.cat(parts)[None]

    def _audio_tokens(self, clip: Clip) -> torch.Tensor:
        """Return a clip's embeddings [tokens, hidden].

        Raises:
            ValueError: stored features come from another encoder.
        """
        if isinstance(clip, np.ndarray):
            frames, latent = self._encode(clip)
        else:
            audio = self._model.config.audio_config
            known = ((audio.num_frames, audio.frame_size), (audio.hidden_size,))
            if (clip.frames.shape, clip.latent.shape) != known:
                raise ValueError(
                    f"features of shapes {clip.frames.shape} and {clip.latent.shape}; "
                    f"the model expects {known[0]} and {known[1]}"
                )
            # Copied, because arrays from Ray's object store are read-only and torch warns about them.
            parts = (torch.tensor(part)[None].to(self.device) for part in (clip.frames, clip.latent))
            frames, latent = (part.to(self._model.dtype) for part in parts)
        return self._model.audio_tokens(frames, latent)[0]

    def _encode(self, waveform: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames [1, F, classes] and latent [1, H] of a waveform [clip_samples]."""
        spectrogram = self.processor.feature_extractor.spectrogram(waveform[None])
        encoded = self._model.audio_encoder(spectrogram.to(self.device, self._model.dtype))
        return encoded.frames, encoded.latent

    def _decode(self) -> None:
        """Write the next token of every active answer."""
        logits = self._next_logits(
            [sequence.tokens[-1] for sequence in self._active], [sequence.length for sequence in self._active]
        )
        likeliest = logits.argmax(dim=-1).tolist()
        for sequence in self._active:
            sequence.length += 1
        for slot in reversed(range(len(self._active))):
            self._push(slot, logits[slot], likeliest[slot])

    def _push(self, slot: int, logits: torch.Tensor, likeliest: int) -> None:
        """Choose the next token of the answer in `slot`, deliver it, and free the slot if it was the last."""
        sequence = self._active[slot]
        try:
            token, logprob = sequence.sampler.choose(logits, likeliest)
        except Exception as error:  # concerns only this request
            sequence.stream.put(error)
            self._release(slot)
            return
        sequence.tokens.append(token)
        if logprob is not None:
            sequence.logprobs.append(logprob)
        ended = token == self._end_token
        text = "" if ended else sequence.text.push(token)
        stopped = ended or sequence.text.stopped
        last = stopped or len(sequence.tokens) == sequence.request.max_new_tokens
        if last and not sequence.text.stopped:
            text += sequence.text.finish()
        sequence.stream.put(Token(token, text, logprob))
        if last:
            answer = Answer(
                sequence.text.text,
                tuple(sequence.tokens),
                sequence.prompt_tokens,
                "stop" if stopped else "length",
                tuple(sequence.logprobs) if sequence.request.logprobs else None,
                time.monotonic() - sequence.stream.created,
            )
            sequence.stream.put(answer)
            self._release(slot)

    def _release(self, slot: int) -> None:
        """Free a slot; the last active sequence moves into it, so that the active slots are the first ones."""
        last = self._active.pop()
        if slot < len(self._active):
            self._cache.move(len(self._active), slot, last.length)
            self._active[slot] = last

    def _score(self, sequence: _Sequence, answers: list[list[int]]) -> list[float]:
        """Return the log-probability of each of `answers` to a request."""
        longest = max(map(len, answers))
        length = self._prefix_length + len(sequence.prompt) + longest
        cache = self._decoder.new_cache(len(answers), length)
        hidden, _ = self._read(sequence, cache, 0)
        for slot in range(1, len(answers)):
            cache.move(0, slot, sequence.length)
        tokens = torch.full((len(answers), longest), self._end_token)
        for row, ids in zip(tokens, answers, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        tokens = tokens.to(self.device)
        states = hidden.expand(len(answers), 1, -1)
        if longest > 1:
            known = self._decoder.embed(tokens[:, :-1])
            states = torch.cat([states, self._decoder(known, cache, [sequence.length] * len(answers))], dim=1)
        # One answer at a time: the logits of 26 long answers would take gigabytes.
        return [
            float(self._decoder.logits(row[: len(ids)]).log_softmax(dim=-1).gather(1, known[: len(ids), None]).sum())
            for row, known, ids in zip(states, tokens, answers, strict=True)
        ]
