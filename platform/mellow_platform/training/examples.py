"""Questions with answers from a shard set: whose clips they hear in an epoch, in which order, and as arrays.

Clips are rows of the feature arrays and texts are stretches of flat token arrays: millions of questions are a few
arrays, which every task reads in place from Ray's object store.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mellow_platform.data.shards import Manifest, read_records
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.training.example_order import cached, epoch_order, random_generator
from mellow_platform.training.step_plan import Arrays
from mellow_platform.training.train_config import PartnerDraws

# The same as in model/loss.py, whose package would load transformers in every task that collates.
IGNORED_LABEL = -100
# What `forward` calls the arrays that shards hold of a clip.
NETWORK_NAMES = {"log_mel": "input_features", "frames": "audio_frames", "latent": "audio_latent"}


@dataclass(frozen=True)
class TokenTexts:
    """Token ids of many texts, one behind the other: text n is `tokens[offsets[n] : offsets[n + 1]]`."""

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_column(cls, column: pa.ChunkedArray) -> "TokenTexts":
        """Take over a column of lists of int32."""
        lists = column.combine_chunks()
        offsets = lists.offsets.to_numpy()
        # Of a sliced column, only what the slice holds.
        return cls(lists.values.to_numpy()[offsets[0] : offsets[-1]], (offsets - offsets[0]).astype(np.int64))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def subset(self, numbers: np.ndarray) -> "TokenTexts":
        """Return the numbered texts alone, in this order."""
        lengths = self.lengths[numbers]
        offsets = np.append(0, np.cumsum(lengths))
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[numbers] - offsets[:-1], lengths)
        return TokenTexts(self.tokens[places], offsets)

    def padded(self, numbers: np.ndarray, fill: int, length: int | None = None) -> np.ndarray:
        """Return texts as int64 [texts, length], filled up with `fill`; by default to the longest of them."""
        starts = self.offsets[numbers]
        lengths = self.offsets[numbers + 1] - starts
        columns = np.arange(length or lengths.max())
        read = columns < lengths[:, None]
        padded = np.full(read.shape, fill, np.int64)
        padded[read] = self.tokens[(starts[:, None] + columns)[read]]
        return padded


@dataclass(frozen=True, eq=False)
class RecordingClips:
    """Whole recordings of clips, of which every question hears a window of its own.

    Attributes:
        store: of a set with features: waveform.
        rows: row [clips] of each clip in it.
        extractor: the front end, which makes `input_features` of a waveform and cuts it to its length.
    """

    store: FeatureStore
    rows: np.ndarray
    extractor: Any

    def __len__(self) -> int:
        return len(self.rows)

    def log_mel(self, pairs: np.ndarray, generators: list[np.random.Generator]) -> np.ndarray:
        """Return random windows of both clips [pairs, 2], drawn by a generator each pair: [pairs, 2, frames, bands]."""
        windows = []
        for pair, generator in zip(pairs, generators, strict=True):
            for clip in pair:
                waveform = self.store.waveform(self.rows[clip])
                start = generator.integers(0, max(0, len(waveform) - self.extractor.clip_samples) + 1)
                windows.append(self.extractor(waveform[start:])["input_features"][0].numpy())
        return np.stack(windows).reshape(len(pairs), 2, *windows[0].shape)


class RecordNames(Sequence[str]):
    """Names of records of a split, made when asked for.

    Args:
        places: of the records in the split [records].
    """

    def __init__(self, split: str, places: np.ndarray):
        self.split, self.places = split, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:  # a number of any integer type; nobody slices names
        return f"{self.split}/{int(self.places[number]):07d}"

    def subset(self, numbers: np.ndarray) -> "RecordNames":
        return RecordNames(self.split, self.places[numbers])


@dataclass(frozen=True, eq=False)
class AnswerExamples:
    """The questions of a split with their answers, and how a run wants them put together.

    Attributes:
        name: that the orders of these examples are remembered by.
        ids: names of the examples.
        clips: rows [questions, 2] of `features`: the clips that the shards pair.
        single: [questions], true where a question is about its first clip alone.
        prompts, answers: their tokens.
        features: arrays [clips, ...] of each distinct clip, by the name that the network reads them by.
        recordings: of each distinct clip, in place of `features`.
        questions_per_pack: neighbours on the same clips, which share a prefix; 1 gives each question its own.
        prompt_length: tokens that every prompt is filled to with `pad_token`, which is seen; None fills prompts to the
            longest of a micro-batch, unseen.
        partner_draws: whether the second clip of a question about one is the stored one, or drawn anew in every epoch,
            for each clip or for each question.
    """

    name: str
    ids: RecordNames
    clips: np.ndarray
    single: np.ndarray
    prompts: TokenTexts
    answers: TokenTexts
    features: Arrays
    pad_token: int
    questions_per_pack: int = 1
    prompt_length: int | None = None
    partner_draws: PartnerDraws = "stored"
    recordings: RecordingClips | None = None

    @classmethod
    def load(
        cls,
        shards: str,
        split: str,
        *,
        pad_token: int,
        prompt_length: int | None,
        questions_per_pack: int = 1,
        partner_draws: PartnerDraws = "stored",
        extractor: Any = None,
    ) -> "AnswerExamples":
        """Read the examples of `split`; the arguments are attributes of the class.

        Args:
            extractor: of `RecordingClips`, for a set with features: waveform.

        Raises:
            ValueError: the set has no such split, a question without a token, or another rule than `partner: random`
                where partners are to be drawn.
        """
        configuration = Manifest.read(shards).configuration
        if partner_draws != "stored" and configuration["partner"] != "random":
            raise ValueError(
                f"{shards} was written with partner: {configuration['partner']}, which leaves nothing to draw in an "
                "epoch: set partner_draws: stored, or run jobs/preprocess.py with --partner random"
            )
        records = read_records(shards, split)
        store = FeatureStore.load(shards)
        sides = [[store.rows[clip] for clip in records[side].to_pylist()] for side in ("clip1", "clip2")]
        rows, clips = np.unique(np.array(sides, np.int64).T, return_inverse=True)
        prompts = TokenTexts.from_column(records["prompt_ids"])
        if len(empty := np.flatnonzero(prompts.lengths == 0)):
            raise ValueError(f"{shards}: {len(empty)} questions of {split} have no token, the first is {empty[0]}")
        return cls(
            name=uuid.uuid4().hex,
            ids=RecordNames(split, np.arange(len(records))),
            clips=clips.reshape(-1, 2),
            single=pc.equal(records["filepath2"], "").to_numpy(),
            prompts=prompts,
            answers=TokenTexts.from_column(records["answer_ids"]),
            # Of the other splits' clips nothing is kept.
            features={NETWORK_NAMES[name]: array[rows] for name, array in store.arrays.items()},
            pad_token=pad_token,
            questions_per_pack=questions_per_pack,
            prompt_length=prompt_length,
            partner_draws=partner_draws,
            recordings=None if store.recordings is None else RecordingClips(store, rows, extractor),
        )

    def subset(self, numbers: np.ndarray) -> "AnswerExamples":
        """Return the numbered examples alone, in this order; of the clips, those that they are about."""
        rows, clips = np.unique(self.clips[numbers], return_inverse=True)
        return replace(
            self,
            name=uuid.uuid4().hex,
            ids=self.ids.subset(numbers),
            clips=clips.reshape(-1, 2),
            single=self.single[numbers],
            prompts=self.prompts.subset(numbers),
            answers=self.answers.subset(numbers),
            features={name: array[rows] for name, array in self.features.items()},
            recordings=self.recordings and replace(self.recordings, rows=self.recordings.rows[rows]),
        )

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens [questions] of every answer."""
        return self.answers.lengths

    def pairs(self, seed: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
        """Return the two clips [numbers, 2] that the numbered questions hear in an epoch.

        A partner that is drawn is any other clip that the split's questions are about. Drawn for a clip, it is the
        same for all questions about that clip alone, which then share the pair.
        """
        pairs = self.clips[numbers]
        count = len(self.recordings or next(iter(self.features.values())))
        if self.partner_draws == "stored" or count == 1:
            return pairs
        of_clip = self.partner_draws == "clip"
        drawn = random_generator(seed, epoch, "partners").integers(0, count - 1, count if of_clip else len(self))
        drawn = drawn[pairs[:, 0] if of_clip else numbers]
        partners = drawn + (drawn >= pairs[:, 0])
        pairs[:, 1] = np.where(self.single[numbers], partners, pairs[:, 1])
        return pairs

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order [questions] of an epoch: every question once, packs of neighbours in random order.

        The questions on a pair of clips are shuffled and cut into packs of at most `questions_per_pack`.
        """

        def compute() -> np.ndarray:
            return epoch_order(
                len(self), lambda numbers: self.pairs(seed, epoch, numbers), self.questions_per_pack, seed, epoch
            )

        return cached((self.name, seed, epoch), compute)

    def collate(self, seed: int, epoch: int, numbers: np.ndarray) -> Arrays:
        """Return what `MellowForConditionalGeneration.forward` reads of the numbered questions.

        `input_ids` and `labels` [questions, tokens], the clips' arrays [pairs, 2, ...], `attention_mask` where
        padding is not seen, and `pair_index` [questions] where neighbours on equal clips share them.
        """
        pairs = self.pairs(seed, epoch, numbers)
        arrays = {
            "input_ids": self.prompts.padded(numbers, self.pad_token, self.prompt_length),
            "labels": self.answers.padded(numbers, IGNORED_LABEL),
        }
        if self.prompt_length is None:
            lengths = self.prompts.offsets[numbers + 1] - self.prompts.offsets[numbers]
            seen = np.arange(arrays["input_ids"].shape[1]) < lengths[:, None]
            arrays["attention_mask"] = seen.astype(np.int64)
        if self.questions_per_pack > 1:
            begins = np.append(True, (pairs[1:] != pairs[:-1]).any(axis=1))
            arrays["pair_index"] = np.cumsum(begins) - 1
            pairs, numbers = pairs[begins], numbers[begins]
        if self.recordings:
            generators = [random_generator(seed, epoch, f"window {number}") for number in numbers]
            return arrays | {"input_features": self.recordings.log_mel(pairs, generators)}
        return arrays | {name: array[pairs] for name, array in self.features.items()}
