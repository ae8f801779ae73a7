"""Decoder for inference: fused layers with packed weights, and a key-value cache of preallocated slots.

Weights come from a transformers model of one of `FAMILIES`. The arithmetic is the same, but the channels of attention
heads have another order: rotary pairs are adjacent, so that a rotation is one complex product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from mellow_platform.inference.linear import Linear, pack

Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder."""

    hidden: int
    heads: int
    key_value_heads: int
    head: int  # channels of a head


@dataclass
class Layer:
    """Linear maps and norms of one decoder layer."""

    norm1: Norm
    query_key_value: Linear
    attention_out: Linear
    norm2: Norm
    up: Linear  # gate and up in one map if `gated`
    down: Linear
    scale: float | None = None  # of attention; None is 1/sqrt(head)


@dataclass
class DecoderParts:
    """Weights and layers of a decoder."""

    shape: DecoderShape
    embedding: torch.Tensor
    layers: list[Layer]
    norm: Norm
    head: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    gated: bool
    max_positions: int
    rotation: torch.Tensor | None = None  # complex [positions, head / 2]
    position_embedding: torch.Tensor | None = None  # [positions, hidden]


class KeyValueCache:
    """Keys and values of `slots` sequences of at most `length` positions, allocated once.

    On CPU, positions take no memory until they are written, because the operating system supplies zeros on demand.
    """

    def __init__(self, layers: int, shape: DecoderShape, slots: int, length: int, like: torch.Tensor):
        self.slots, self.length, self.shape = slots, length, shape
        size = (layers, slots, 2, shape.key_value_heads, length, shape.head)
        if like.is_cuda:
            self.data = torch.zeros(size, dtype=like.dtype, device=like.device)
        else:
            # torch.zeros would write the zeros.
            self.data = torch.from_numpy(np.zeros(size, np.float32))
        self._rows = self.data.view(layers, -1, shape.head)
        streams = torch.arange(slots * 2 * shape.key_value_heads, device=like.device)
        self._first_row = (streams * length).view(slots, 1, 2 * shape.key_value_heads)

    def rows_of(self, slots: slice, positions: torch.Tensor) -> torch.Tensor:
        """Return the cache rows of `positions` [slots, new] of `slots`, as an index for `write`."""
        return (self._first_row[slots] + positions[:, :, None]).flatten()

    def write(self, layer: int, rows: torch.Tensor, keys_values: torch.Tensor) -> None:
        """Store `keys_values` [slots, new, 2 * key-value heads * head]."""
        self._rows[layer].index_copy_(0, rows, keys_values.reshape(-1, self.shape.head))

    def read(self, layer: int, slots: slice, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [slots, heads, length, head], as views."""
        data = self.data[layer, slots]
        return data[:, 0, :, :length], data[:, 1, :, :length]

    def copy_out(self, slot: int, length: int) -> torch.Tensor:
        """Return a copy [layers, 2, heads, length, head] of a slot's first positions."""
        return self.data[:, slot, :, :, :length].clone()

    def copy_in(self, slot: int, prefix: torch.Tensor) -> None:
        """Start a slot with a prefix from `copy_out`."""
        self.data[:, slot, :, :, : prefix.shape[3]] = prefix

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of slot `source` to slot `target`."""
        self.data[:, target, :, :, :length] = self.data[:, source, :, :, :length]


class CachedDecoder:
    """A causal language model for inference.

    Args:
        model: a transformers model of one of `FAMILIES`. Its weights are moved out layer by layer, so that they are
            never in memory twice.
        dtype: see `linear.pack`.

    Raises:
        ValueError: the family is not one of `FAMILIES`.
    """

    def __init__(self, model: PreTrainedModel, dtype: str):
        family = model.config.model_type
        if family not in FAMILIES:
            raise ValueError(f"the decoder is a {family!r} model; the engine runs {', '.join(FAMILIES)}")
        self.parts = FAMILIES[family](model, dtype)
        self.shape = self.parts.shape

    def new_cache(self, slots: int, length: int) -> KeyValueCache:
        """Return an empty cache of `slots` sequences.

        Raises:
            ValueError: `length` exceeds the model's positions.
        """
        if length > self.parts.max_positions:
            raise ValueError(
                f"{length} positions per sequence: the decoder has {self.parts.max_positions}; lower max_new_tokens"
            )
        return KeyValueCache(len(self.parts.layers), self.shape, slots, length, self.parts.embedding)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., hidden] of `tokens`."""
        return nn.functional.embedding(tokens, self.parts.embedding)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [..., vocabulary] of final hidden states."""
        return self.parts.head(hidden).float()

    def __call__(
        self, embeddings: torch.Tensor, cache: KeyValueCache, lengths: Sequence[int], first: int = 0
    ) -> torch.Tensor:
        """Append positions to the sequences in slots `first`, `first + 1`, ...; return their final hidden states.

        Args:
            embeddings: [sequences, new, hidden].
            lengths: cached positions per sequence.

        Returns:
            [sequences, new, hidden], normalised: the input of `logits`.
        """
        sequences, new, _ = embeddings.shape
        slots = slice(first, first + sequences)
        start = torch.tensor(lengths, device=embeddings.device)[:, None]
        positions = start + torch.arange(new, device=embeddings.device)
        if new == 1:
            # One sequence at a time, at its own length: as fast on CPU as one masked call, and the values of a sequence
            # do not depend on the lengths of others.
            groups = [(slice(first + n, first + n + 1), length + 1) for n, length in enumerate(lengths)]
            return self._layers(embeddings, cache, slots, positions, groups)
        total = max(lengths) + new
        causal = total == new
        mask = None if causal else self._mask(positions, total)
        return self._layers(embeddings, cache, slots, positions, [(slots, total)], mask, causal)

    def step(self, cache: KeyValueCache, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append one token to each of the first sequences and return the logits [sequences, vocabulary] after it."""
        embeddings = self.embed(torch.tensor(tokens, device=cache.data.device)[:, None])
        return self.logits(self(embeddings, cache, lengths)[:, 0])

    def static_step(self, cache: KeyValueCache, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """`step` for CUDA graphs, with tensors [sequences, 1] as the only varying inputs: attends to the whole cache,
        with a mask."""
        slots = slice(0, len(tokens))
        mask = self._mask(lengths, cache.length)
        whole = [(slots, cache.length)]
        return self.logits(self._layers(self.embed(tokens), cache, slots, lengths, whole, mask)[:, 0])

    def _mask(self, positions: torch.Tensor, total: int) -> torch.Tensor:
        """Return the additive attention mask [sequences, 1, new, total]: -inf for later positions."""
        later = torch.arange(total, device=positions.device) > positions[:, None, :, None]
        zeros = torch.zeros(later.shape, dtype=self.parts.embedding.dtype, device=positions.device)
        return zeros.masked_fill_(later, -torch.inf)

    def _layers(
        self,
        embeddings: torch.Tensor,
        cache: KeyValueCache,
        slots: slice,
        positions: torch.Tensor,
        groups: Sequence[tuple[slice, int]],
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """Run all layers on new `positions` [sequences, new] of `slots`.

        Args:
            groups: slots with a common attention call, and the number of their positions, in order.
            mask: additive mask of the attention scores.
            causal: alternative to `mask`: a position attends to itself and earlier ones.
        """
        parts, shape = self.parts, self.shape
        sequences, new, _ = embeddings.shape
        rows = cache.rows_of(slots, positions)
        rotation = parts.rotation[positions][:, :, None] if parts.rotation is not None else None
        rotated = shape.heads + shape.key_value_heads
        sizes = [group.stop - group.start for group, _ in groups]
        x = embeddings
        if parts.position_embedding is not None:
            x = x + parts.position_embedding[positions]
        for number, layer in enumerate(parts.layers):
            mixed = layer.query_key_value(layer.norm1(x))
            heads = mixed.view(sequences, new, -1, shape.head)
            if rotation is not None:
                _rotate(heads[:, :, :rotated], rotation)
            cache.write(number, rows, heads[:, :, shape.heads :])
            queries = heads[:, :, : shape.heads].transpose(1, 2).split(sizes)
            outputs = [
                nn.functional.scaled_dot_product_attention(
                    query, *cache.read(number, group, total), mask,
                    is_causal=causal, scale=layer.scale, enable_gqa=shape.heads != shape.key_value_heads,
                )
                for query, (group, total) in zip(queries, groups, strict=True)
            ]  # fmt: skip
            attention = (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).transpose(1, 2)
            x = x + layer.attention_out(attention.reshape(sequences, new, -1))
            inner = layer.up(layer.norm2(x))
            if parts.gated:
                gate, inner = inner.chunk(2, dim=-1)
                inner = parts.activation(gate).mul_(inner)
            else:
                inner = parts.activation(inner)
            x = x + layer.down(inner)
        return parts.norm(x)


def _rotate(heads: torch.Tensor, rotation: torch.Tensor) -> None:
    """Rotate adjacent channels of `heads` [sequences, new, heads, head] by their position, in place."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    pairs.mul_(rotation)
    if heads.dtype != torch.float32:  # float() returned a copy
        heads.copy_(torch.view_as_real(pairs).flatten(-2))


class _Stack:
    """Stacks matrices in a reused buffer.

    A new buffer per layer would leave a gap beside every layer's packed weights, hundreds of MB in all.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, parts: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        """Return the matrices [rows, in] on top of each other; valid until the next call.

        Args:
            parts: matrices with 0, or with the rows of an attention head; rows i and i + head / 2 of a head, which are
                rotated together, then become adjacent.
        """
        if len(parts) == 1 and not parts[0][1]:
            return parts[0][0]
        rows, (first, _) = sum(len(matrix) for matrix, _ in parts), parts[0]
        if self._buffer.numel() < rows * first.shape[1]:
            self._buffer = first.new_empty(rows * first.shape[1])
        whole = self._buffer[: rows * first.shape[1]].view(rows, -1)
        for target, (matrix, head) in zip(whole.split([len(matrix) for matrix, _ in parts]), parts, strict=True):
            if head:
                target.unflatten(0, (-1, head // 2, 2)).copy_(matrix.unflatten(0, (-1, 2, head // 2)).transpose(1, 2))
            else:
                target.copy_(matrix)
        return whole


def _llama(model: PreTrainedModel, dtype: str) -> DecoderParts:
    config, decoder = model.config, model.model
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = DecoderShape(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head)

    def norm(module: Any) -> Norm:
        weight, epsilon = _copy(module.weight), module.variance_epsilon
        return lambda x: nn.functional.rms_norm(x, weight.shape, weight, epsilon)

    stacked = _Stack()

    def linear(*modules: nn.Linear, rotated: int = 0) -> Linear:
        """Stack layers with the same input; heads of the first `rotated` layers are rotated."""
        parts = [(module.weight.data, shape.head if number < rotated else 0) for number, module in enumerate(modules)]
        biases = [
            (module.bias.data[:, None], shape.head if number < rotated else 0)
            for number, module in enumerate(modules)
            if module.bias is not None
        ]
        bias = stacked(biases).flatten().clone() if biases else None
        return pack(stacked(parts), bias, dtype)

    positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
    cosine, sine = decoder.rotary_emb(decoder.embed_tokens.weight.data[:1].float(), positions)
    layers = []
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                norm(block.input_layernorm),
                linear(attention.q_proj, attention.k_proj, attention.v_proj, rotated=2),
                linear(attention.o_proj),
                norm(block.post_attention_layernorm),
                linear(mlp.gate_proj, mlp.up_proj),
                linear(mlp.down_proj),
            )
        )
        block.to("meta")
    return DecoderParts(
        shape=shape,
        embedding=decoder.embed_tokens.weight.data,
        layers=layers,
        norm=norm(decoder.norm),
        head=linear(model.lm_head),
        activation=ACT2FN[config.hidden_act],
        gated=True,
        max_positions=config.max_position_embeddings,
        rotation=torch.complex(cosine[0], sine[0])[:, : shape.head // 2],
    )


def _gpt2(model: PreTrainedModel, dtype: str) -> DecoderParts:
    config, decoder = model.config, model.transformer
    shape = DecoderShape(config.n_embd, config.n_head, config.n_head, config.n_embd // config.n_head)

    def norm(module: nn.LayerNorm) -> Norm:
        weight, bias, epsilon = _copy(module.weight), _copy(module.bias), module.eps
        return lambda x: nn.functional.layer_norm(x, weight.shape, weight, bias, epsilon)

    def linear(module: Any) -> Linear:
        """Pack a `Conv1D`, whose weight is [in, out]."""
        return pack(module.weight.data.T, _copy(module.bias), dtype)

    layers = []
    for block in decoder.h:
        attention, mlp = block.attn, block.mlp
        layers.append(
            Layer(
                norm(block.ln_1),
                linear(attention.c_attn),
                linear(attention.c_proj),
                norm(block.ln_2),
                linear(mlp.c_fc),
                linear(mlp.c_proj),
                scale=attention.scaling,
            )
        )
        block.to("meta")
    return DecoderParts(
        shape=shape,
        embedding=decoder.wte.weight.data,
        layers=layers,
        norm=norm(decoder.ln_f),
        head=pack(model.lm_head.weight.data, None, dtype),
        activation=ACT2FN[config.activation_function],
        gated=False,
        max_positions=config.n_positions,
        position_embedding=decoder.wpe.weight.data,
    )


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy, because a loaded parameter is a view that keeps the memory map of its whole file."""
    return parameter.data.clone()


# Conversion of each family of transformers models. Mistral and Qwen 2 equal Llama within their attention windows, which
# are longer than any sequence here.
FAMILIES: dict[str, Callable[[PreTrainedModel, str], DecoderParts]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt2": _gpt2,
}
