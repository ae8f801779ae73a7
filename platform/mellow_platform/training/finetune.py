"""Fine-tune Mellow on answers with DeepSpeed; the audio encoder stays frozen and is read from its stored features."""

import contextlib
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import ray
import ray.train
import torch

from mellow_platform import storage
from mellow_platform.config import TrainConfig
from mellow_platform.data.shards import Manifest, read_records
from mellow_platform.features.store import FeatureStore
from mellow_platform.model import (
    MellowConfig,
    MellowForConditionalGeneration,
    MellowProcessor,
    load_encoder,
    pad_labels,
)
from mellow_platform.model.decoder import load_decoder
from mellow_platform.model.folder import load_processor, save_model
from mellow_platform.training.batches import Plan, batches
from mellow_platform.training.loop import (
    Progress,
    learning_rate_factor,
    seed_step,
    total_steps,
    worker_threads,
)


def build_model(config: TrainConfig, processor: MellowProcessor) -> MellowForConditionalGeneration:
    """Return the model to train: that of `init_from`, or the named size around a trained encoder (and decoder).

    Raises:
        ValueError: `init_from` has another projection or adapters of its own, or the encoder is not that of the shards.
    """
    torch.manual_seed(config.seed)
    model = _model_of_folder(config) if config.init_from else _model_of_parts(config, processor)
    lora = config.lora.peft_fields()
    if lora and model.config.lora != lora:
        model.add_lora(lora)
    if model.config.lora:
        model.freeze_decoder()
    check_encoder(config, model.config, processor)
    return model.freeze_encoder()


def _model_of_folder(config: TrainConfig) -> MellowForConditionalGeneration:
    assert config.init_from
    model = MellowForConditionalGeneration.from_pretrained(storage.local_copy(config.init_from), dtype="float32")
    if model.config.projection != config.projection:
        raise ValueError(
            f"{config.init_from} has the projection {model.config.projection}, not {config.projection}: "
            "set `projection` to it, or give `encoder` in place of init_from"
        )
    return model


def _model_of_parts(config: TrainConfig, processor: MellowProcessor) -> MellowForConditionalGeneration:
    assert config.encoder  # the configuration has one of the two
    encoder = load_encoder(config.encoder)
    decoder = load_decoder(config.decoder) if config.decoder else None
    settings = MellowConfig.from_size(
        config.size,
        projection=config.projection,
        vocab_size=len(processor.tokenizer),
        audio_config=encoder.config,
        text_config=decoder.config if decoder else None,
    )
    model = MellowForConditionalGeneration(settings)
    model.audio_encoder.load_state_dict(encoder.state_dict())
    if decoder:
        model.language_model.load_state_dict(decoder.state_dict())
    return model


def check_encoder(config: TrainConfig, model: MellowConfig, processor: MellowProcessor) -> None:
    """Make sure that the shards' features are those of the model's encoder.

    Raises:
        ValueError: its front end or the shape of its features is another one.
    """
    audio, name = model.audio_config, config.encoder or config.init_from
    processor.feature_extractor.check_hears_as(audio, name)
    expected = {"frames": [audio.num_frames, audio.frame_size], "latent": [audio.hidden_size]}
    stored = Manifest.read_with(config.shards, "encoder").features
    if stored != expected:
        raise ValueError(
            f"{config.shards} holds features {stored}, encoder {name} gives {expected}: "
            "run jobs/preprocess.py with this encoder, or take the one that made the shards"
        )


class AnswerExamples:
    """Arrays of numbered examples of the train split; made once, read in place from Ray's object store."""

    def __init__(self, shards: str):
        Manifest.read_with(shards, "encoder")
        records = read_records(shards, "train")
        store = FeatureStore.load(shards)
        self.features = store.arrays
        self.clips = np.array(
            [
                [store.rows[one], store.rows[two]]
                for one, two in zip(records["clip1"].to_pylist(), records["clip2"].to_pylist(), strict=True)
            ],
            np.int64,
        ).reshape(-1, 2)
        self.prompts = np.array(records["prompt_ids"].to_pylist(), np.int64)
        self.labels = pad_labels(records["answer_ids"].to_pylist()).numpy()

    def __len__(self) -> int:
        return len(self.clips)


def gather_answers(examples: np.ndarray, source: ray.ObjectRef) -> dict[str, np.ndarray]:
    """Return what `MellowForConditionalGeneration.forward` reads of the numbered examples."""
    data: AnswerExamples = ray.get(source)
    clips = data.clips[examples]
    return {
        "input_ids": data.prompts[examples],
        "labels": data.labels[examples],
        "audio_frames": data.features["frames"][clips],
        "audio_latent": data.features["latent"][clips],
    }


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed engine's configuration."""
    on_gpu = bool(config.scaling.gpus_per_worker)
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "train_batch_size": config.micro_batch * config.gradient_accumulation * world_size,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": on_gpu},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def train_answers(values: dict[str, Any]) -> None:
    """The loop of one worker; rank 0 saves the model folder at the end."""
    config = TrainConfig(**values)
    worker_threads(config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    processor = load_processor(storage.join(config.shards, "processor"))
    model = build_model(config, processor)
    examples = AnswerExamples(config.shards)
    accumulation = config.gradient_accumulation
    per_step = config.micro_batch * world * accumulation
    total = total_steps(config, len(examples), per_step)

    if not config.scaling.gpus_per_worker:
        # DeepSpeed would compile its shared-memory collectives first, which takes a C++ compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay),
        config=deepspeed_config(config, world),
    )

    progress = Progress(config, total, per_step, clip_seconds=20.0)
    step = progress.resume(lambda folder: _load(engine, folder))
    plan = Plan(config.seed, len(examples), config.micro_batch, rank, world)
    source = ray.put(examples)
    losses = torch.zeros(())
    rate = 0.0
    engine.train()
    for number, batch in enumerate(
        batches(plan, gather_answers, source, step * accumulation, total * accumulation),
        start=step * accumulation,
    ):
        if number % accumulation == 0:
            seed_step(config.seed, progress.step, rank)
            rate = config.learning_rate * learning_rate_factor(progress.step, total, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = torch.zeros((), device=engine.device)
        loss = engine(**{name: value.to(engine.device) for name, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        losses += loss.detach() / accumulation
        if number % accumulation == accumulation - 1:
            progress.advance(losses, rate, lambda folder: _save(engine, folder))
    with _gathered(engine, config.zero_stage):
        if rank == 0:
            save_model(model.eval(), processor, config.output)


def _save(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)


def _load(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    loaded, _ = engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
    if loaded is None:
        raise RuntimeError(f"checkpoint {folder} holds no engine state: delete it to go on from the one before")


def _gathered(engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> contextlib.AbstractContextManager:
    """Make every rank's share of the parameters whole on rank 0 while it saves them (ZeRO 3 splits them)."""
    if zero_stage < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None)
