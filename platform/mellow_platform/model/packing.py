"""Questions on the same clips in one sequence: they share the clips' prefix, and no position of it is padding.

The decoder reads `[prefix of pair 1] ... [prefix of pair G] [question 1] ... [question Q]` as one sequence, where a
prefix is two clips with their separators and a question is a prompt with its answer. Everything in a decoder but
attention works on each position by itself, so positions are all that has to be told apart there; attention is computed
in two parts, each of whose sequences are of one pair: prefixes among themselves, and questions behind their prefix.
A mask over the whole sequence would say the same, at three times the attention for eight questions on a pair.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "mellow_shared_prefix"  # name in transformers' table of attention functions


@dataclass(frozen=True)
class Packing:
    """Where each position of the packed sequence belongs.

    Attributes:
        pairs: number G of clip pairs.
        prefix: positions P of a pair's prefix.
        longest: positions S of the longest question.
        pair_index: pair [Q] of each question.
        slots: place [tokens] of every question token in [Q, S], flat; question by question.
        ends: place [Q] in the packed sequence of each prompt's last token.
    """

    pairs: int
    prefix: int
    longest: int
    pair_index: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(
        cls, pairs: int, prefix: int, pair_index: torch.Tensor, prompts: torch.Tensor, lengths: torch.Tensor
    ) -> "Packing":
        """Return the packing of questions of `lengths` [Q] tokens, of which `prompts` [Q] are the prompt's."""
        longest = int(lengths.max())
        starts = lengths.cumsum(0) - lengths
        within = torch.arange(longest, device=lengths.device) < lengths[:, None]
        ends = pairs * prefix + starts + prompts - 1
        return cls(pairs, prefix, longest, pair_index, within.flatten().nonzero()[:, 0], ends)

    @property
    def position_ids(self) -> torch.Tensor:
        """Position [1, sequence] of every token; they go on behind the prefix in every question."""
        prefixes = torch.arange(self.prefix, device=self.slots.device).repeat(self.pairs)
        return torch.cat([prefixes, self.prefix + self.slots % self.longest])[None]

    @property
    def mask(self) -> torch.Tensor:
        """What a question's positions see of `[prefix, question]`: [1, 1, S, P + S], the same for all questions.

        Padding to the longest comes last in a question, where nothing that is read looks.
        """
        seen = torch.ones(self.longest, self.prefix + self.longest, dtype=torch.bool, device=self.slots.device)
        return seen.tril(self.prefix)[None, None]

    def prefixes(self, states: torch.Tensor) -> torch.Tensor:
        """Return the prefixes' part of `states` [1, heads, sequence, head] as [G, heads, P, head]."""
        return states[0, :, : self.pairs * self.prefix].unflatten(1, (self.pairs, self.prefix)).transpose(0, 1)

    def questions(self, states: torch.Tensor) -> torch.Tensor:
        """Return the questions' part of `states` [1, heads, sequence, head] as [Q, heads, S, head], zeros behind."""
        tokens = states[0, :, self.pairs * self.prefix :].transpose(0, 1)
        count = len(self.pair_index)
        padded = tokens.new_zeros(count * self.longest, *tokens.shape[1:]).index_copy(0, self.slots, tokens)
        return padded.unflatten(0, (count, self.longest)).transpose(1, 2)

    def behind_prefix(self, states: torch.Tensor) -> torch.Tensor:
        """Return keys or values [1, heads, sequence, head] as each question sees them: [Q, heads, P + S, head]."""
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
    """Attend within a packed sequence [1, heads, sequence, head]; without `packing`, as transformers does by default.

    Returns:
        [1, sequence, heads, head], as transformers' attention functions do.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    states = [packing.prefixes(part) for part in (query, key, value)]
    prefixes, _ = sdpa_attention_forward(module, *states, None, **kwargs)
    states = [packing.questions(query), packing.behind_prefix(key), packing.behind_prefix(value)]
    questions, _ = sdpa_attention_forward(module, *states, attention_mask, **kwargs)
    return torch.cat([prefixes.flatten(0, 1), questions.flatten(0, 1)[packing.slots]])[None], None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
