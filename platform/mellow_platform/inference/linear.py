"""Linear layers in the form that the device multiplies fastest: packed float32 or int8 on CPU, plain on a GPU."""

import warnings
from collections.abc import Callable
from typing import get_args

import torch
from torch import nn

from mellow_platform.option_values import Dtype

# Rows that oneDNN lays the weights out for. One layout serves a single token, a batch of them and a prompt: laid out
# for 1 row, two rows take 1.8 times as long.
PACKED_ROWS = 128

Linear = Callable[[torch.Tensor], torch.Tensor]


def pack(weight: torch.Tensor, bias: torch.Tensor | None, dtype: str) -> Linear:
    """Return the map [..., in] -> [..., out] of `weight` [out, in] in the named precision; `weight` is not kept.

    Args:
        dtype: `float32` or `int8` (weights and activations) on CPU, `bfloat16` (or `float32`) on a GPU.

    Raises:
        ValueError: the precision does not exist, or not on the weights' device.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}")
    if (dtype == "int8") == weight.is_cuda and dtype != "float32":
        raise ValueError(f"dtype {dtype} does not run on {weight.device.type}: int8 is for CPU, bfloat16 for GPUs")
    if dtype == "int8":
        return Int8Linear(weight, bias)
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return PlainLinear(weight, bias)
    return PackedLinear(weight, bias)


class PlainLinear:
    """torch's own linear layer."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight.contiguous(), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class PackedLinear:
    """float32 with the weights in oneDNN's own layout, as torch.compile packs them for inference.

    On two AVX-512 cores a token through SmolLM2's matrices took 31 ms with `linear` and 16 ms so; 16 tokens 49 and 20.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear:
    """int8 weights with a scale a channel; activations as two int8 rows with a scale a token; sums in int32 (FBGEMM).

    The second row holds what rounding left of the first. Activations of language models have outliers: with one row,
    SmolLM2's next-token distribution moved ten times as far from float32's (KL 0.052) as with two (0.005, which is what
    the weights cost). For a single token, where reading the weights is all the time, the second row is free.

    No scale is taken over the batch: a row's result depends on that row alone, and integer sums are exact in any order.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        scale = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).clamp(min=1e-12) / 127
        # Without VNNI, FBGEMM adds pairs of products in 16 bits, which eight bits on both sides overflow.
        self.levels = 127.0 if torch.cpu._is_vnni_supported() else 63.0
        quantized = torch.empty(weight.shape, dtype=torch.int8)
        # In blocks: the output layer is a hundred megabytes, and every temporary of it would be, too.
        for rows, own, place in zip(weight.split(1024), scale.split(1024), quantized.split(1024), strict=True):
            place.copy_((rows / own[:, None]).round_())
        with warnings.catch_warnings():
            # torch.ao's quantised tensors are to move to torchao; these operators stay.
            warnings.simplefilter("ignore")
            tensor = torch._make_per_channel_quantized_tensor(
                quantized, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0
            )
            self.weight = torch.ops.quantized.linear_prepack(tensor, None)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        values = x.reshape(-1, x.shape[-1])
        scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(self.levels)
        values = values / scale
        # Rounded here: the operator adds 128 before it rounds, and would now and then take the other neighbour of x.5.
        whole = values.round()
        remainder = values.sub_(whole).mul_(2 * self.levels)
        rows = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            torch.cat([whole, remainder]), 1.0, 128, self.weight
        )
        y, rest = rows.chunk(2)
        y = y.add_(rest, alpha=0.5 / self.levels).mul_(scale)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


class PackedModule(nn.Module):
    """A packed linear layer in the place of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, dtype: str):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.data.clone()
        self._linear = pack(linear.weight.data, bias, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x)


def pack_linears(module: nn.Module, dtype: str) -> None:
    """Put packed layers in the place of every `nn.Linear` inside `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedModule(child, dtype))
        else:
            pack_linears(child, dtype)
