"""Low-rank adapters on the decoder (LoRA, arXiv 2106.09685), through peft.

peft is imported when there are adapters: most models have none.
"""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def add_adapters(decoder: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Put adapters into `decoder` in place, as peft's `LoraConfig(**lora)` describes; they change nothing yet.

    Without `target_modules`, peft chooses by the architecture: the query and value projections of a Llama, as
    published, and the joint one of GPT-2.

    Raises:
        ValueError: no layer has one of the names in `target_modules`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # GPT-2 stores its matrices as [in, out].
    transposed = any(isinstance(module, Conv1D) for module in decoder.modules())
    inject_adapter_in_model(LoraConfig(**lora, fan_in_fan_out=transposed), decoder)


def freeze_all_but_adapters(decoder: PreTrainedModel) -> None:
    """Exclude the decoder's own weights from training."""
    decoder.requires_grad_(False)
    for layer in _adapted(decoder).values():
        for name in layer.adapter_layer_names:
            getattr(layer, name).requires_grad_(True)


def merge_adapters(decoder: PreTrainedModel) -> None:
    """Add the adapters into the decoder's own weights in place, and leave a plain decoder that trains in full."""
    for path, layer in _adapted(decoder).items():
        layer.merge()
        decoder.set_submodule(path, layer.get_base_layer())
    del decoder.peft_config
    decoder.requires_grad_(True)


def _adapted(decoder: PreTrainedModel) -> dict[str, "LoraLayer"]:
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in decoder.named_modules() if isinstance(module, LoraLayer)}
