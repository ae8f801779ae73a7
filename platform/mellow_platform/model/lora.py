"""Low-rank adapters of the decoder (LoRA, arXiv 2106.09685), by peft.

peft is imported on use: most models have no adapters.
"""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def add_adapters(decoder: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Add adapters to `decoder` in place, as configured by peft's `LoraConfig(**lora)`; the output is unchanged.

    The default of `target_modules` depends on the architecture: query and value projections of a Llama, as published,
    and the joint projection of GPT-2.

    Raises:
        ValueError: no layer has a name in `target_modules`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # GPT-2 stores its matrices as [in, out].
    transposed = any(isinstance(module, Conv1D) for module in decoder.modules())
    inject_adapter_in_model(LoraConfig(**lora, fan_in_fan_out=transposed), decoder)


def freeze_all_but_adapters(decoder: PreTrainedModel) -> None:
    """Freeze all weights of the decoder except its adapters."""
    decoder.requires_grad_(False)
    for layer in _adapted(decoder).values():
        for name in layer.adapter_layer_names:
            getattr(layer, name).requires_grad_(True)


def merge_adapters(decoder: PreTrainedModel) -> None:
    """Merge the adapters into the decoder's weights in place, which leaves a plain decoder with trainable weights."""
    for path, layer in _adapted(decoder).items():
        layer.merge()
        decoder.set_submodule(path, layer.get_base_layer())
    del decoder.peft_config
    decoder.requires_grad_(True)


def _adapted(decoder: PreTrainedModel) -> dict[str, "LoraLayer"]:
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in decoder.named_modules() if isinstance(module, LoraLayer)}
