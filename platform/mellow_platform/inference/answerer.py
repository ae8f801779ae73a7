"""Encodes clips and answers batches of questions about them."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mellow_platform.model.folder import load_model

CACHED_CLIPS = 1024  # about 36 MB of features at the published size


@dataclass(frozen=True)
class ClipFeatures:
    """What the frozen encoder makes of a clip: frames [F, classes] and latent [H], fp16."""

    frames: np.ndarray
    latent: np.ndarray


@dataclass(frozen=True)
class Question:
    """A question about one or two clips."""

    text: str
    clips: tuple[ClipFeatures, ...]
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Answer:
    """An answer, with the tokens it cost. `finished` is false where `max_new_tokens` cut it."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finished: bool


class Answerer:
    """A model with its processor, on the GPU where there is one.

    Clips are encoded once: features are kept by content, least recently used out.
    """

    def __init__(self, model_uri: str, cpu_threads: int | None = None):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if cpu_threads:
            torch.set_num_threads(cpu_threads)
        self.model, self.processor = load_model(model_uri)
        # CPU stays float32: bfloat16 matrix products crash on virtual machines that announce AMX without granting it.
        self.model.to(self.device, torch.bfloat16 if self.device == "cuda" else torch.float32)
        self._features: OrderedDict[bytes, ClipFeatures] = OrderedDict()

    @property
    def sampling_rate(self) -> int:
        """Rate in Hz that waveforms must come at."""
        return self.processor.feature_extractor.sampling_rate

    def prompt_tokens(self, text: str) -> int:
        """Return how many tokens `text` takes, the end marker included."""
        return len(self.processor.token_ids(text))

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[np.ndarray]) -> list[ClipFeatures]:
        """Return the features of waveforms [samples]; one that was encoded before is not encoded again."""
        keys = [hashlib.sha256(np.ascontiguousarray(clip).tobytes()).digest() for clip in waveforms]
        new = {key: clip for key, clip in zip(keys, waveforms, strict=True) if key not in self._features}
        if new:
            spectrograms = self.processor.feature_extractor(list(new.values()))["input_features"]
            encoded = self.model.audio_encoder(spectrograms.to(self.device, self.model.dtype))
            frames, latents = (part.half().cpu().numpy() for part in (encoded.frames, encoded.latent))
            for key, frame, latent in zip(new, frames, latents, strict=True):
                self._features[key] = ClipFeatures(frame, latent)
        found = []
        for key in keys:
            self._features.move_to_end(key)
            found.append(self._features[key])
        while len(self._features) > CACHED_CLIPS:
            self._features.popitem(last=False)
        return found

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Return greedy answers; a single clip stands in both places of the sequence."""
        pairs = [(question.clips[0], question.clips[-1]) for question in questions]
        prompts = [self.processor.prompt_ids(question.text) for question in questions]
        tokens = self.model.generate(
            input_ids=torch.tensor(prompts, device=self.device),
            audio_frames=self._stack([[clip.frames for clip in pair] for pair in pairs]),
            audio_latent=self._stack([[clip.latent for clip in pair] for pair in pairs]),
            max_new_tokens=max(question.max_new_tokens for question in questions),
        ).cpu()
        answers = []
        end = self.processor.tokenizer.eos_token_id
        for question, row in zip(questions, tokens, strict=True):
            own = row[: question.max_new_tokens]
            stops = (own == end).nonzero()
            length = int(stops[0]) + 1 if len(stops) else len(own)
            text = self.processor.decode_answers(own[None, :length])[0]
            answers.append(Answer(text, self.prompt_tokens(question.text), length, bool(len(stops))))
        return answers

    def _stack(self, pairs: list[list[np.ndarray]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.stack(pair) for pair in pairs])).to(self.device)
