"""Plan of a run before its start: steps, memory per worker, checkpoint size, estimated time."""

import time
from typing import Any

import numpy as np
import torch

from mellow_platform import storage
from mellow_platform.model import MellowForConditionalGeneration
from mellow_platform.model.folder import load_processor
from mellow_platform.training.examples import AnswerExamples
from mellow_platform.training.finetune import build_model
from mellow_platform.training.flops import ModelFlops
from mellow_platform.training.step_plan import StepPlan
from mellow_platform.training.train_config import TrainConfig
from mellow_platform.training.trainer import build_plan, total_steps

SAMPLE = 16  # micro-batches that the work of a step is estimated from
GIB = 2**30
# Assumed for GPUs, which are not measured: bfloat16 peak of an A100, and the share of it that small models reach.
GPU_FLOPS, GPU_SHARE = 312e12, 0.3


def describe(config: TrainConfig, examples: AnswerExamples) -> dict[str, Any]:
    """Return the plan of a run, for which one micro-batch, the longest of a sample, is computed on this machine.

    Raises:
        ValueError: configuration and shards do not match, as in `build_model`.
    """
    plan = build_plan(config, examples, config.scaling.workers)
    model = build_model(config, load_processor(storage.join(config.shards, "processor"))).train()
    flops = ModelFlops.from_model(model)
    samples = _samples(config, plan, examples)
    work = [flops.work(arrays) for arrays in samples]
    longest = samples[int(np.argmax([counts["tokens"] for counts in work]))]
    activations, seconds = _measured_pass(config, model, longest)
    steps, micro_batches = total_steps(config, len(examples)), plan.accumulation_steps * plan.workers
    per_step = float(np.mean([counts["model_flops"] for counts in work])) * micro_batches
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config.scaling.gpus_per_worker:
        seconds_per_step = per_step / (plan.workers * GPU_FLOPS * GPU_SHARE)
    else:
        seconds_per_step = seconds * plan.accumulation_steps
    return {
        "run": storage.join(config.storage, config.run),
        "examples": len(examples),
        "steps": steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "workers": plan.workers,
        "micro_batches_per_worker_and_step": plan.accumulation_steps,
        "tokens_per_step": round(float(np.mean([counts["tokens"] for counts in work])) * micro_batches),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": trained,
        "memory_gib_per_worker": {
            name: round(size / GIB, 3) for name, size in memory(config, model, activations).items()
        },
        # Float32 weights with two moments each.
        "checkpoint_gib": round(12 * trained / GIB, 3),
        "checkpoints_gib": round(12 * trained * (config.keep_checkpoints + bool(config.validate_every)) / GIB, 3),
        "model_flops": per_step * steps,
        "hours": round(seconds_per_step * steps / 3600, 2),
        "hours_from": (
            f"{GPU_SHARE:.0%} of {GPU_FLOPS / 1e12:g} TFLOP/s a GPU (an A100)"
            if config.scaling.gpus_per_worker
            else "a micro-batch computed on this machine"
        ),
    }


def memory(config: TrainConfig, model: MellowForConditionalGeneration, activations: float) -> dict[str, float]:
    """Return the bytes of each kind of state that a worker has on its device, their sum, and the bytes offloaded."""
    half = bool(config.scaling.gpus_per_worker)
    width, workers = 2 if half else 4, config.scaling.workers
    share = [1.0 / workers if config.zero_stage >= stage else 1.0 for stage in range(4)]
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Two moments, and from stage 1 on (or for bfloat16) a separate float32 copy of the weights.
    state = trained * (12 if half or config.zero_stage else 8) * share[1]
    weights, gradients = total * width * share[3], trained * width * share[2]
    sizes = {"weights": weights, "gradients": gradients, "optimizer": state, "activations": activations}
    host = {"none": [], "optimizer": ["optimizer"], "parameters": ["optimizer", "weights"]}[config.offload]
    offloaded = sum(sizes.pop(name) for name in host)
    return sizes | {"device": sum(sizes.values())} | ({"host": offloaded} if host else {})


def report(plan: dict[str, Any]) -> str:
    """Return the plan as text, one line per figure."""
    lines = []
    for name, value in plan.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {size:g}" for part, size in value.items())
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{name.replace('_', ' '):36} {value if not isinstance(value, float) else format(value, '.4g')}")
    return "\n".join(lines)


def _samples(config: TrainConfig, plan: StepPlan, examples: AnswerExamples) -> list[dict[str, torch.Tensor]]:
    """Return the first micro-batches of the run."""
    order = examples.order(config.seed, 0)
    parts = [order[start : start + plan.micro_batch] for start in range(0, len(order), plan.micro_batch)][:SAMPLE]
    return [
        {name: torch.from_numpy(array) for name, array in examples.collate(config.seed, 0, part).items()}
        for part in parts
    ]


def _measured_pass(
    config: TrainConfig, model: MellowForConditionalGeneration, arrays: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """Return the bytes that a forward pass saves for the backward pass, and the seconds of both."""
    if config.activation_checkpointing:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    activations: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        block = tensor.untyped_storage()
        if block.data_ptr() not in weights:
            activations[block.data_ptr()] = block.nbytes()
        return tensor

    threads = torch.get_num_threads()
    torch.set_num_threads(config.scaling.threads_per_worker)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(**arrays).loss.backward()
    start = time.perf_counter()
    model(**arrays).loss.backward()
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    half = 0.5 if config.scaling.gpus_per_worker else 1.0
    return half * sum(activations.values()), seconds
