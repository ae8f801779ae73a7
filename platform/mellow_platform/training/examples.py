"""Training examples of Mellow, questions with answers from a shard set: clip pairs, epoch order, collation.

Clips are rows of feature arrays and texts are slices of flat token arrays: millions of questions are a few arrays,
which every task reads in place from Ray's object store.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
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
# Arguments of `forward` by the name of the shards' arrays.
FORWARD_ARGUMENTS = {"log_mel": "input_features", "frames": "audio_frames", "latent": "audio_latent"}


@dataclass(frozen=True)
class TokenTexts:
    """Token ids of many texts in one array: text n is `tokens[offsets[n] : offsets[n + 1]]`."""

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_column(cls, column: pa.ChunkedArray) -> "TokenTexts":
        """Return the texts of a column of lists of int32."""
        lists = column.combine_chunks()
        offsets = lists.offsets.to_numpy()
        # `lists.values` of a sliced column has the tokens outside the slice too.
        return cls(lists.values.to_numpy()[offsets[0] : offsets[-1]], (offsets - offsets[0]).astype(np.int64))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def subset(self, numbers: np.ndarray) -> "TokenTexts":
        """Return the numbered texts, in this order."""
        lengths = self.lengths[numbers]
        offsets = np.append(0, np.cumsum(lengths))
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets[numbers] - offsets[:-1], lengths)
        return TokenTexts(self.tokens[positions], offsets)

    def padded(self, numbers: np.ndarray, fill: int, length: int | None = None) -> np.ndarray:
        """Return texts as int64 [texts, length], padded with `fill`; `length` defaults to that of the longest text."""
        starts = self.offsets[numbers]
        lengths = self.offsets[numbers + 1] - starts
        columns = np.arange(length or lengths.max())
        is_token = columns < lengths[:, None]
        padded = np.full(is_token.shape, fill, np.int64)
        padded[is_token] = self.tokens[(starts[:, None] + columns)[is_token]]
        return padded


@dataclass(frozen=True, eq=False)
class RecordingClips:
    """Whole recordings of clips; each question takes its own random window as input.

    Attributes:
        store: feature store of shards with features: waveform.
        rows: row of each clip [clips] in the store.
        extractor: front end that computes `input_features` from the start of a waveform.
    """

    store: FeatureStore
    rows: np.ndarray
    extractor: Any

    def __len__(self) -> int:
        return len(self.rows)

    def log_mel(self, pairs: np.ndarray, generators: list[np.random.Generator]) -> np.ndarray:
        """Return log-mels [pairs, 2, frames, bands] of random windows of `pairs` [pairs, 2], one generator per pair."""
        windows = []
        for pair, generator in zip(pairs, generators, strict=True):
            for clip in pair:
                waveform = self.store.waveform(self.rows[clip])
                start = generator.integers(0, max(0, len(waveform) - self.extractor.clip_samples) + 1)
                windows.append(self.extractor(waveform[start:])["input_features"][0].numpy())
        return np.stack(windows).reshape(len(pairs), 2, *windows[0].shape)


class RecordNames(Sequence[str]):
    """Names of the records of a split, computed on access.

    Args:
        rows: row of each record [records] in the split.
    """

    def __init__(self, split: str, rows: np.ndarray):
        self.split, self.rows = split, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:  # any integer type; slices are not supported
        return f"{self.split}/{int(self.rows[number]):07d}"

    def subset(self, numbers: np.ndarray) -> "RecordNames":
        return RecordNames(self.split, self.rows[numbers])


@dataclass(frozen=True, eq=False)
class AnswerExamples:
    """Questions of a split with their answers, and the options of their collation.

    Attributes:
        name: key of these examples among the cached orders.
        ids: names of the examples.
        clips: stored clip pairs, as rows [questions, 2] of `features`.
        single: whether a question is about only its first clip [questions].
        prompts, answers: token ids.
        features: arrays [clips, ...] of the distinct clips, by argument of `forward`.
        recordings: recordings of the distinct clips, instead of `features`.
        questions_per_pack: most consecutive questions on the same clips that share a prefix; 1: no sharing.
        prompt_length: length in tokens that prompts are padded to with visible `pad_token`; None pads to the longest
            prompt of a micro-batch, and masks the padding.
        partner_draws: second clip of a question about one clip: the stored one, or drawn in every epoch per clip or
            per question.
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
        """Read the examples of `split`; the other arguments are attributes of the class.

        Args:
            extractor: of `RecordingClips`, for shards with features: waveform.

        Raises:
            ValueError: the split is missing, a question has no token, or partners are to be drawn for shards without
                `partner: random`.
        """
        configuration = Manifest.read(shards).configuration
        if partner_draws != "stored" and configuration["partner"] != "random":
            raise ValueError(
                f"{shards} was written with partner: {configuration['partner']}, and partner_draws: {partner_draws} "
                "needs random; set partner_draws: stored, or run jobs/preprocess.py with --partner random"
            )
        records = read_records(shards, split)
        store = FeatureStore.load(shards)
        sides = [[store.rows[clip] for clip in records[side].to_pylist()] for side in ("clip1", "clip2")]
        rows, clips = np.unique(np.array(sides, np.int64).T, return_inverse=True)
        prompts = TokenTexts.from_column(records["prompt_ids"])
        if len(empty := np.flatnonzero(prompts.lengths == 0)):
            raise ValueError(
                f"{shards}: {len(empty)} questions of split {split} have no tokens, the first in row {empty[0]}"
            )
        return cls(
            name=uuid.uuid4().hex,
            ids=RecordNames(split, np.arange(len(records))),
            clips=clips.reshape(-1, 2),
            single=pc.equal(records["filepath2"], "").to_numpy(),
            prompts=prompts,
            answers=TokenTexts.from_column(records["answer_ids"]),
            # Without the clips of other splits.
            features={FORWARD_ARGUMENTS[name]: array[rows] for name, array in store.arrays.items()},
            pad_token=pad_token,
            questions_per_pack=questions_per_pack,
            prompt_length=prompt_length,
            partner_draws=partner_draws,
            recordings=None if store.recordings is None else RecordingClips(store, rows, extractor),
        )

    def subset(self, numbers: np.ndarray) -> "AnswerExamples":
        """Return the numbered examples, in this order, with only their clips."""
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
    def loss_weights(self) -> np.ndarray:
        """Number of tokens of each answer [questions]."""
        return self.answers.lengths

    def pairs(self, seed: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
        """Return the clip pairs [numbers, 2] of the numbered questions in an epoch.

        A drawn partner is any other clip of the split's questions. If it is drawn per clip, all questions about only
        that clip share the pair.
        """
        pairs = self.clips[numbers]
        count = len(self.recordings or next(iter(self.features.values())))
        if self.partner_draws == "stored" or count == 1:
            return pairs
        per_clip = self.partner_draws == "clip"
        draws = random_generator(seed, epoch, "partners").integers(0, count - 1, count if per_clip else len(self))
        draws = draws[pairs[:, 0] if per_clip else numbers]
        partners = draws + (draws >= pairs[:, 0])
        pairs[:, 1] = np.where(self.single[numbers], partners, pairs[:, 1])
        return pairs

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order [questions] of an epoch: each question once, in shuffled packs.

        The questions on a pair of clips are shuffled and divided into packs of at most `questions_per_pack`.
        """
        pairs_of = partial(self.pairs, seed, epoch)
        order = partial(epoch_order, len(self), pairs_of, self.questions_per_pack, seed, epoch)
        return cached((self.name, seed, epoch), order)

    def collate(self, seed: int, epoch: int, numbers: np.ndarray) -> Arrays:
        """Return the arguments of `MellowForConditionalGeneration.forward` for the numbered questions.

        These are `input_ids` and `labels` [questions, tokens], the clips' arrays [pairs, 2, ...], `attention_mask`
        if padding is masked, and `pair_index` [questions] if consecutive questions on the same clips share a prefix.
        """
        pairs = self.pairs(seed, epoch, numbers)
        arrays = {
            "input_ids": self.prompts.padded(numbers, self.pad_token, self.prompt_length),
            "labels": self.answers.padded(numbers, IGNORED_LABEL),
        }
        if self.prompt_length is None:
            lengths = self.prompts.offsets[numbers + 1] - self.prompts.offsets[numbers]
            mask = np.arange(arrays["input_ids"].shape[1]) < lengths[:, None]
            arrays["attention_mask"] = mask.astype(np.int64)
        if self.questions_per_pack > 1:
            starts = np.append(True, (pairs[1:] != pairs[:-1]).any(axis=1))
            arrays["pair_index"] = np.cumsum(starts) - 1
            pairs, numbers = pairs[starts], numbers[starts]
        if self.recordings:
            generators = [random_generator(seed, epoch, f"window {number}") for number in numbers]
            return arrays | {"input_features": self.recordings.log_mel(pairs, generators)}
        return arrays | {name: array[pairs] for name, array in self.features.items()}
