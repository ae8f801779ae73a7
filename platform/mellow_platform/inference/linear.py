"""Linear layers in the fastest form for the device: packed float32 or int8 on CPU, plain on a GPU."""

import warnings
from collections.abc import Callable
from typing import get_args

import torch
from torch import nn

from mellow_platform.option_values import Dtype

# Number of rows for oneDNN's weight layout. One layout is used for a token, a batch of tokens and a prompt: with a
# layout for 1 row, two rows take 1.8 times as long.
PACKED_ROWS = 128

Linear = Callable[[torch.Tensor], torch.Tensor]


def pack(weight: torch.Tensor, bias: torch.Tensor | None, dtype: str) -> Linear:
    """Return the map [..., in] -> [..., out] of `weight` [out, in] in precision `dtype`; `weight` is not kept.

    Args:
        dtype: `float32` or `int8` (weights and activations) on CPU, `bfloat16` (or `float32`) on a GPU.

    Raises:
        ValueError: the precision is unknown, or not available on the weights' device.
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
    """float32 with weights in oneDNN's layout, as torch.compile packs them for inference.

    On two AVX-512 cores, SmolLM2's matrices took 31 ms per token with `linear` and 16 ms packed, 16 tokens 49 and 20.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear:
    """int8 weights with a scale per channel; activations as two int8 rows with a scale per token; int32 sums (FBGEMM).

    The second row contains the rounding error of the first. Activations of language models have outliers: with one row,
    SmolLM2's next-token distribution differed ten times as much from float32's (KL 0.052) as with two (0.005, the share
    of the weights). For a single token, whose time is spent reading weights, the second row is free.

    No scale depends on the batch: a row's result depends only on that row, and integer sums are exact in any order.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        scale = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).clamp(min=1e-12) / 127
        # Without VNNI, FBGEMM adds pairs of products in 16 bits, which 8-bit factors overflow.
        self.levels = 127.0 if torch.cpu._is_vnni_supported() else 63.0
        quantized = torch.empty(weight.shape, dtype=torch.int8)
        # In blocks, because each temporary of the output layer would take a hundred MB.
        for rows, scales, target in zip(weight.split(1024), scale.split(1024), quantized.split(1024), strict=True):
            target.copy_((rows / scales[:, None]).round_())
        with warnings.catch_warnings():
            # torch.ao warns that its quantised tensors move to torchao; these operators stay.
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
        # Rounded here, because the operator adds 128 before rounding and would round some x.5 to the other side.
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
    """Packed replacement of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, dtype: str):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.data.clone()
        self._linear = pack(linear.weight.data, bias, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x)


def pack_linears(module: nn.Module, dtype: str) -> None:
    """Replace every `nn.Linear` inside `module` with a packed layer."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedModule(child, dtype))
        else:
            pack_linears(child, dtype)
