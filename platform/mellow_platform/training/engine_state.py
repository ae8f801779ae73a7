"""State of a DeepSpeed engine by parameter name, unpartitioned, so that any number of workers can resume from it.

DeepSpeed's own checkpoints are pickles, one file per worker, and need an offline conversion (`ds_to_universal`) for
another number of workers. This module reads and sets parameters through `deepspeed.utils`, for every ZeRO stage.
"""

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from mellow_platform.training.checkpoints import Tensors

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


class EngineState:
    """Weights and optimizer moments of an engine's trained parameters. All workers call each method together."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.engine = engine
        self.trained = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
        # ZeRO and bfloat16 wrap the optimizer; otherwise the engine has it unwrapped.
        self.optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def snapshot(self, keep: bool) -> Tensors:
        """Return the float32 weight and moments of every trained parameter on the host; nothing unless `keep`."""
        tensors = {}
        for name, parameter in self.trained.items():
            for key in (WEIGHT, *MOMENTS):
                value = self._read(parameter, key)
                if keep:
                    tensors[f"{key}.{name}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        return tensors

    def restore(self, tensors: Tensors, step: int) -> None:
        """Set weights and moments to a snapshot after `step` steps; needs an optimizer that has made a step."""
        for name, parameter in self.trained.items():
            for key in (WEIGHT, *MOMENTS):
                self._write(parameter, key, tensors[f"{key}.{name}"])
        for state in self.optimizer.state.values():
            if torch.is_tensor(state["step"]):
                state["step"].fill_(step)
            else:
                state["step"] = step

    def _read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        if not _is_partitioned(parameter):
            return parameter if key == WEIGHT else self.optimizer.state[parameter][key]
        if key == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    def _write(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        value = value.to(self.engine.device)
        if hasattr(parameter, "ds_tensor"):
            # `safe_set_full_*` fails for a last worker whose share ends in padding.
            share = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, share * self.engine.world_size - value.numel()))
            value = padded[share * self.engine.global_rank :][:share]
            if key == WEIGHT:
                safe_set_local_fp32_param(parameter, value)
            else:
                safe_set_local_optimizer_state(parameter, value, key)
        elif _is_partitioned(parameter):
            if key == WEIGHT:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        else:
            with torch.no_grad():
                (parameter if key == WEIGHT else self.optimizer.state[parameter][key]).copy_(value)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether DeepSpeed stores the float32 state of a parameter outside it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def model_weights(tensors: Tensors) -> Tensors:
    """Return the weights of a snapshot by their names in the model."""
    return {name.removeprefix(f"{WEIGHT}."): value for name, value in tensors.items() if name.startswith(f"{WEIGHT}.")}
