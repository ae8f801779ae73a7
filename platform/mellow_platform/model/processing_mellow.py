"""Mellow's processor: network inputs from waveforms and questions, and answer text from tokens."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mellow_platform.data.partners import Partner, second_clip
from mellow_platform.model.loss import pad_labels


class MellowProcessor(ProcessorMixin):
    """Feature extractor and tokenizer.

    Args:
        feature_extractor: the audio front end.
        tokenizer: tokenizer of the decoder; prompts are padded with its padding token.
        prompt_length: maximum length of a prompt, and length of a padded one, in tokens.
        answer_length: maximum length of an answer, in tokens.
        pad_prompt: pad prompts to `prompt_length` with a padding token that the network attends to, as published.
            Without padding, all prompts of a batch must have the same length.
        prompt_end_marker: append the end token to prompts, like the reference in training and evaluation; its
            inference wrapper does not.
        partner: second clip of a single-clip question. `random` applies when shards are written; this processor has no
            corpus to draw from and uses the `same` clip instead, so that answers are deterministic.

    Raises:
        ValueError: unknown `partner`.
    """

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        prompt_length: int = 129,
        answer_length: int = 250,
        pad_prompt: bool = True,
        prompt_end_marker: bool = True,
        partner: Partner = "same",
    ):
        super().__init__(feature_extractor, tokenizer)
        if partner not in get_args(Partner):
            raise ValueError(f"partner {partner!r} is not one of {', '.join(get_args(Partner))}")
        self.prompt_length = prompt_length
        self.answer_length = answer_length
        self.pad_prompt = pad_prompt
        self.prompt_end_marker = prompt_end_marker
        self.partner = partner

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["feature_extractor", "tokenizer"]

    def token_ids(self, text: str) -> list[int]:
        """Return the tokens of `text`, lower-cased, with the end marker."""
        return self.tokenizer(f"{text.lower().strip()} {self.tokenizer.eos_token}")["input_ids"]

    def question_ids(self, question: str) -> list[int]:
        """Return all tokens of `question`, with the end marker if `prompt_end_marker` is set."""
        if self.prompt_end_marker:
            return self.token_ids(question)
        return self.tokenizer(question.lower().strip())["input_ids"]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return at most `prompt_length` tokens of `prompt`, or exactly that number if `pad_prompt` is set."""
        ids = self.question_ids(prompt)[: self.prompt_length]
        if not self.pad_prompt:
            return ids
        return ids + [self.tokenizer.pad_token_id] * (self.prompt_length - len(ids))

    def answer_ids(self, answer: str) -> list[int]:
        """Return at most `answer_length` tokens of `answer`."""
        return self.token_ids(answer)[: self.answer_length]

    def __call__(
        self,
        audio: Sequence[Sequence[np.ndarray]],
        text: Sequence[str],
        answers: Sequence[str] | None = None,
        sampling_rate: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Return `input_ids` [batch, prompt], `input_features` [batch, 2, frames, bands] and, with answers, `labels`.

        Args:
            audio: one or two waveforms [samples] per question; a single one gets its `partner`.
            text: questions.
            answers: answers to train on.
            sampling_rate: sampling rate of the waveforms in Hz, checked if passed.

        Raises:
            ValueError: the lists differ in length, a question has no clip or more than two, or unpadded prompts
                differ in length.
        """
        if len(audio) != len(text):
            raise ValueError(f"{len(audio)} sets of clips for {len(text)} questions; pass one set per question")
        prompts = [self.prompt_ids(question) for question in text]
        if len(lengths := sorted({len(ids) for ids in prompts})) > 1:
            raise ValueError(
                f"prompts of {', '.join(map(str, lengths))} tokens in one batch without padding; "
                "batch prompts of equal length, or set pad_prompt"
            )
        silence = np.zeros(self.feature_extractor.clip_samples, np.float32)
        clips: list[np.ndarray] = []
        for number, pair in enumerate(audio):
            if len(pair) not in (1, 2):
                raise ValueError(f"question {number} has {len(pair)} clips; pass one or two")
            clips += [pair[0], second_clip(pair, self.partner, silence)]
        features = self.feature_extractor(clips, sampling_rate=sampling_rate)["input_features"]
        batch = {
            "input_ids": torch.tensor(prompts),
            "input_features": features.unflatten(0, (len(text), 2)),
        }
        if answers is not None:
            batch["labels"] = pad_labels([self.answer_ids(answer) for answer in answers])
        return BatchFeature(batch)

    def decode_answers(self, tokens: torch.Tensor) -> list[str]:
        """Return the texts of the generated tokens [batch, new]."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
