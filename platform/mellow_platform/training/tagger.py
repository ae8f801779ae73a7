"""Train an audio encoder as a multi-label sound tagger, which is what HTSAT was before Mellow froze it.

Clips are those of the train split of a `features: logmel` shard set that have labels; the loss is binary
cross-entropy over the clip's tags (arXiv 2202.00874).
"""

import contextlib
import functools
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from mellow_platform import storage
from mellow_platform.data.shards import Manifest
from mellow_platform.model import MellowFeatureExtractor, encoder_config
from mellow_platform.model.encoders import encoder_parts
from mellow_platform.model.folder import save_pretrained
from mellow_platform.training.batches import batches
from mellow_platform.training.checkpoints import Tensors
from mellow_platform.training.learning_rate_schedule import learning_rate_factor
from mellow_platform.training.recorder import Recorder
from mellow_platform.training.tagged_clips import TaggedClips
from mellow_platform.training.tagger_config import EncoderConfig
from mellow_platform.training.trainer import plan_of, prepare_worker, run_training


def pretrain(config: EncoderConfig) -> dict[str, Any]:
    """Run the training that `config` describes to its end, and return its result.

    Raises:
        ValueError: shards and labels do not go together, or the run of this name was begun with other values.
    """
    return run_training(train_tagger, config, TaggedClips.load(config))


def build_encoder(config: EncoderConfig, names: list[str]) -> Any:
    """Return the encoder to train, with a class for every tag: fresh, or that of `init_from`.

    Raises:
        ValueError: it has no tags, `init_from` was trained on other tags, or it hears another front end than that of
            the shards.
    """
    _, network = encoder_parts(config.encoder_name)
    torch.manual_seed(config.seed)
    if config.init_from:
        encoder = network.from_pretrained(storage.local_copy(config.init_from))
        if list(encoder.config.labels) != names:
            raise ValueError(f"{config.init_from} was trained on other tags than {config.labels} holds")
    else:
        encoder = network(encoder_config(config.size, names, config.encoder_name))
    made = Manifest.read(config.shards).configuration
    # Shard sets from before encoders had names are HTSAT's.
    heard = MellowFeatureExtractor.from_size(made["size"], encoder=made.get("encoder_name", "htsat"))
    heard.check_matches(encoder.config, config.init_from or config.encoder_name)
    return encoder


def build_optimizers(trained: list[torch.nn.Parameter], config: EncoderConfig) -> list[torch.optim.Optimizer]:
    """Return Muon (arXiv 2502.16982) for the matrices and AdamW for everything else, at one learning rate.

    After 320 steps of 16 synthetic scenes, four-way choice among kinds stood at 0.92 so, and at 0.50 with AdamW alone,
    the optimizer published for AudioSet. Muon takes a third of a step of the tiny size on a CPU, so each worker does it
    for its share of the matrices, and gets the others.
    """
    matrices = [parameter for parameter in trained if parameter.ndim == 2]
    others = [parameter for parameter in trained if parameter.ndim != 2]
    return [
        ZeroRedundancyOptimizer(
            matrices,
            torch.optim.Muon,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_tagger(values: dict[str, Any]) -> None:
    """The loop of one worker; rank 0 saves the encoder folder at the end."""
    config = EncoderConfig(**values["config"])
    prepare_worker(config)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    clips: TaggedClips = ray.get(values["examples"])
    plan = plan_of(config, clips, workers)
    progress = Recorder(config, plan, clips, clip_seconds=10.0)

    encoder = build_encoder(config, clips.names)
    model = ray.train.torch.prepare_model(encoder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = build_optimizers(trained, config)
    device = ray.train.torch.get_device()
    if tensors := progress.resume():
        restore(encoder, optimizers, tensors)
    model.train()
    for turns in progress.waiting(batches(plan, values["examples"], rank, progress.step, progress.total)):
        rate = config.learning_rate * learning_rate_factor(progress.step, progress.total, config.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for micro in turns:
            torch.manual_seed(micro.draw)
            # Gradients go between the workers once a step, and come as their mean.
            together = contextlib.nullcontext() if micro is turns[-1] or workers == 1 else model.no_sync()
            with together:
                logits = model(micro.arrays["input_features"].to(device)).logits
                targets = micro.arrays["targets"].to(device)
                errors = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
                loss = errors.mean(dim=1).sum() / micro.size * micro.counts
                (loss * workers).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        progress.advance(total, rate, functools.partial(snapshot, encoder, optimizers))
    if rank == 0:
        save_pretrained(encoder.eval(), config.output)
    progress.finish()


def snapshot(encoder: torch.nn.Module, optimizers: list[torch.optim.Optimizer], keep: bool) -> Tensors:
    """Return weights, statistics and optimizer state on the host, by name; nothing where they are not to `keep`.

    All workers call it together; the first one keeps.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict(to=0)
    if not keep:
        return {}
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    for place, optimizer in enumerate(optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def restore(encoder: torch.nn.Module, optimizers: list[torch.optim.Optimizer], tensors: Tensors) -> None:
    """Take a snapshot over."""
    weights = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
    encoder.load_state_dict(weights)
    for place, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{place}."):
                number, key = name.split(".")[2:]
                state.setdefault(int(number), {})[key] = value
        # That of ZeroRedundancyOptimizer itself asks for the state of all workers first.
        groups = torch.optim.Optimizer.state_dict(optimizer)
        optimizer.load_state_dict(groups | {"state": state})
