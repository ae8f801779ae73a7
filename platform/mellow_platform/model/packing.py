"""Packing of questions on the same clips into one sequence that shares the clips' prefix and contains no padding.

The decoder reads `[prefix of pair 1] ... [prefix of pair G] [question 1] ... [question Q]` as one sequence. A prefix is
two clips with their separators; a question is a prompt with its answer. Only attention mixes positions. It is computed
in two parts that never mix pairs: prefixes among themselves, and questions after their own prefix. One mask over the
whole sequence would give the same result at three times the attention cost, for eight questions per pair.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "mellow_shared_prefix"  # name in transformers' table of attention functions


@dataclass(frozen=True)
class Packing:
    """Layout of a packed sequence.

    Attributes:
        pairs: number of clip pairs, G.
        prefix: length of a pair's prefix, P positions.
        longest: length of the longest question, S positions.
        pair_index: clip pair of each question [Q].
        slots: flat index in [Q, S] of every question token [tokens], question by question.
        ends: index in the packed sequence of each prompt's last token [Q].
    """

    pairs: int
    prefix: int
    longest: int
    pair_index: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def from_lengths(
        cls, pairs: int, prefix: int, pair_index: torch.Tensor, prompts: torch.Tensor, lengths: torch.Tensor
    ) -> "Packing":
        """Return the packing of questions of `lengths` [Q] tokens, the first `prompts` [Q] of which are the prompt."""
        longest = int(lengths.max())
        starts = lengths.cumsum(0) - lengths
        within = torch.arange(longest, device=lengths.device) < lengths[:, None]
        ends = pairs * prefix + starts + prompts - 1
        return cls(pairs, prefix, longest, pair_index, within.flatten().nonzero()[:, 0], ends)

    @property
    def position_ids(self) -> torch.Tensor:
        """Position of every token [1, sequence]; the positions of each question continue those of the prefix."""
        prefixes = torch.arange(self.prefix, device=self.slots.device).repeat(self.pairs)
        return torch.cat([prefixes, self.prefix + self.slots % self.longest])[None]

    @property
    def mask(self) -> torch.Tensor:
        """Causal mask of a question over `[prefix, question]`: [1, 1, S, P + S], the same for all questions.

        Padding to the longest question comes last, so no real token attends to it.
        """
        visible = torch.ones(self.longest, self.prefix + self.longest, dtype=torch.bool, device=self.slots.device)
        return visible.tril(self.prefix)[None, None]

    def prefixes(self, states: torch.Tensor) -> torch.Tensor:
        """Return the prefix positions of `states` [1, heads, sequence, head] as [G, heads, P, head]."""
        return states[0, :, : self.pairs * self.prefix].unflatten(1, (self.pairs, self.prefix)).transpose(0, 1)

    def questions(self, states: torch.Tensor) -> torch.Tensor:
        """Return the question positions of `states` [1, heads, sequence, head] as [Q, heads, S, head], zero-padded."""
        tokens = states[0, :, self.pairs * self.prefix :].transpose(0, 1)
        count = len(self.pair_index)
        padded = tokens.new_zeros(count * self.longest, *tokens.shape[1:]).index_copy(0, self.slots, tokens)
        return padded.unflatten(0, (count, self.longest)).transpose(1, 2)

    def with_prefix(self, states: torch.Tensor) -> torch.Tensor:
        """Return keys or values [1, heads, sequence, head] of prefix and question: [Q, heads, P + S, head]."""
        return torch.cat([self.prefixes(states)[self.pair_index], self.questions(states)], dim=2)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute attention in a packed sequence [1, heads, sequence, head]; without `packing`, transformers' default.

    Returns:
        [1, sequence, heads, head], as transformers' attention functions return it.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    states = [packing.prefixes(part) for part in (query, key, value)]
    prefixes, _ = sdpa_attention_forward(module, *states, None, **kwargs)
    states = [packing.questions(query), packing.with_prefix(key), packing.with_prefix(value)]
    questions, _ = sdpa_attention_forward(module, *states, attention_mask, **kwargs)
    return torch.cat([prefixes.flatten(0, 1), questions.flatten(0, 1)[packing.slots]])[None], None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
