"""Fine-tune Mellow on answers with DeepSpeed; the audio encoder stays frozen and is read from its stored features."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from mellow_platform import storage
from mellow_platform.data.shards import Manifest
from mellow_platform.extras import require
from mellow_platform.model import (
    MellowConfig,
    MellowForConditionalGeneration,
    MellowProcessor,
    encoder_digest,
    load_encoder,
)
from mellow_platform.model.decoder import load_decoder, load_decoder_config, load_tokenizer
from mellow_platform.model.folder import load_processor, save_model
from mellow_platform.training.batches import MicroBatch, batches
from mellow_platform.training.checkpoints import Tensors
from mellow_platform.training.examples import AnswerExamples
from mellow_platform.training.flops import ModelFlops, measured_peak
from mellow_platform.training.learning_rate_schedule import learning_rate_factor
from mellow_platform.training.recorder import Recorder
from mellow_platform.training.step_plan import StepPlan
from mellow_platform.training.train_config import TrainConfig
from mellow_platform.training.trainer import plan_of, prepare_worker, run_training
from mellow_platform.training.verify_export import Question, check_published, greedy_answers

BETAS = (0.9, 0.98)
GATE_QUESTIONS = 8
PUBLISHED = "training.json"


def finetune(config: TrainConfig) -> dict[str, Any]:
    """Run the training that `config` describes to its end, and return its result.

    Raises:
        ValueError: configuration and shards do not go together, or the run of this name was begun with other values.
    """
    require("deepspeed", extra="train")
    validation = load_examples(config, "val") if config.validate_every else None
    if validation is not None and not len(validation):
        raise ValueError(
            f"{config.shards} has no questions in its val split, and validate_every is {config.validate_every}: "
            "put some there, or set validate_every to 0"
        )
    return run_training(train_answers, config, load_examples(config), validation)


def build_model(config: TrainConfig, processor: MellowProcessor) -> MellowForConditionalGeneration:
    """Return the model to train: that of `init_from`, or the named size around a trained encoder (and decoder).

    Raises:
        ValueError: `init_from` has another projection or adapters of its own, or the encoder or the tokenizer is not
            that of the shards.
    """
    check_tokenizer(config, processor)
    torch.manual_seed(config.seed)
    model = _model_of_folder(config) if config.init_from else _model_of_parts(config, processor)
    lora = config.lora.peft_fields()
    if lora and model.config.lora != lora:
        model.add_lora(lora)
    if model.config.lora:
        model.freeze_decoder()
    check_encoder(config, model, processor)
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
    decoder = load_decoder(config.decoder) if config.decoder and config.pretrained else None
    shape = load_decoder_config(config.decoder) if config.decoder else None
    settings = MellowConfig.from_size(
        config.size,
        projection=config.projection,
        vocab_size=len(processor.tokenizer),
        audio_config=encoder.config,
        text_config=shape,
    )
    model = MellowForConditionalGeneration(settings)
    model.audio_encoder.load_state_dict(encoder.state_dict())
    if decoder:
        model.language_model.load_state_dict(decoder.state_dict())
    return model


def check_encoder(config: TrainConfig, model: MellowForConditionalGeneration, processor: MellowProcessor) -> None:
    """Make sure that the shards' features are those of the model's encoder.

    Raises:
        ValueError: its front end, the shape of its features, or a weight is another one.
    """
    audio, name = model.config.audio_config, config.encoder or config.init_from
    processor.feature_extractor.check_matches(audio, name)
    expected = {"frames": [audio.num_frames, audio.frame_size], "latent": [audio.hidden_size]}
    manifest = Manifest.read(config.shards)
    if "frames" not in manifest.features:
        return
    remedy = "run jobs/preprocess.py with this encoder, or take the one that made the shards"
    if manifest.features != expected:
        raise ValueError(
            f"{config.shards} holds features {manifest.features}, encoder {name} gives {expected}: {remedy}"
        )
    if manifest.encoder != encoder_digest(model.audio_encoder):
        raise ValueError(f"{config.shards} was written by an encoder with other weights than {name} has: {remedy}")


def check_tokenizer(config: TrainConfig, processor: MellowProcessor) -> None:
    """Make sure that the shards' token ids are those of the decoder that is trained.

    Raises:
        ValueError: it has another vocabulary.
    """
    if config.init_from:
        own, name = load_processor(config.init_from).tokenizer, config.init_from
    elif config.decoder:
        own, name = load_tokenizer(config.decoder), config.decoder
    else:
        return  # fresh, with as many tokens as the shards' tokenizer
    if own.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(
            f"{config.shards} was written with another tokenizer than that of {name}: run jobs/preprocess.py with "
            + ("--encoder" if config.init_from else "--decoder")
            + f" {name} into another folder"
        )


def load_examples(config: TrainConfig, split: str = "train") -> AnswerExamples:
    """Read the examples of a split, and how `config` wants them put together.

    Raises:
        ValueError: the shard set holds other features than the run needs, or not the questions for its share of
            synthetic ones.
    """
    if config.augment and (features := Manifest.read(config.shards).configuration["features"]) == "encoder":
        raise ValueError(
            f"augment: the encoder has heard the clips of {config.shards} already (features: {features}): "
            "give shards with features: logmel or waveform, or unset augment"
        )
    processor = load_processor(storage.join(config.shards, "processor"))
    examples = AnswerExamples.load(
        config.shards,
        split,
        pad_token=processor.tokenizer.pad_token_id,
        prompt_length=processor.prompt_length if config.pad_prompts else None,
        questions_per_pack=config.questions_per_pack,
        partner_draws=config.partner_draws,
        extractor=processor.feature_extractor,
    )
    if split != "train" or config.synthetic_share is None:
        return examples
    return examples.subset(with_synthetic_share(config, config.synthetic_share))


def with_synthetic_share(config: TrainConfig, share: float) -> np.ndarray:
    """Return the numbers of training questions of which `share` is synthetic, as many as there are for it.

    All of one kind are kept, and of the other a part that the run's seed draws.

    Raises:
        ValueError: there are none of a kind that is needed.
    """
    subtypes = (
        Manifest.read(config.shards).read_table(config.shards, "records/train", ["subtype"])["subtype"].to_pylist()
    )
    names = {name.removesuffix(".json") for name in config.synthetic_subtypes}
    is_synthetic = np.array([subtype.removesuffix(".json") in names for subtype in subtypes])
    kinds = [(np.flatnonzero(is_synthetic), share), (np.flatnonzero(~is_synthetic), 1 - share)]
    if any(part and not len(numbers) for numbers, part in kinds):
        there = ", ".join(sorted(set(subtypes)))
        raise ValueError(
            f"synthetic_share {share:g} cannot be reached: {is_synthetic.sum()} of the {len(subtypes)} training "
            f"questions in {config.shards} are of {', '.join(sorted(names))} (it has {there}): "
            "set synthetic_subtypes, or leave synthetic_share out"
        )
    total = min(len(numbers) / part for numbers, part in kinds if part)
    generator = np.random.default_rng([config.seed, *b"synthetic"])
    kept = [generator.permutation(numbers)[: round(total * part)] for numbers, part in kinds]
    return np.sort(np.concatenate(kept))


def deepspeed_config(config: TrainConfig, plan: StepPlan) -> dict[str, Any]:
    """Return the DeepSpeed engine's configuration."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": plan.turns,
        "train_batch_size": config.micro_batch * plan.turns * plan.workers,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bool(config.scaling.gpus_per_worker)},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Finetuning:
    """Mellow in a DeepSpeed engine on one worker: steps, state, validation. All workers call its methods together."""

    def __init__(
        self, config: TrainConfig, plan: StepPlan, model: MellowForConditionalGeneration, tensors: Tensors | None
    ):
        """
        Args:
            tensors: of the checkpoint to go on from, when there is one.
        """
        # Loading DeepSpeed takes seconds, which a driver and a dry run do not wait for.
        import deepspeed

        from mellow_platform.training.engine_state import EngineState, weights_of

        self.config, self.plan = config, plan
        self.flops = ModelFlops.from_model(model)  # before ZeRO cuts the weights up
        if config.activation_checkpointing:
            model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        if config.augment:
            for module in model.audio_encoder.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.momentum = 0.0  # its statistics are the frozen encoder's, and stay
        if tensors:
            model.load_state_dict(weights_of(tensors), strict=False)
        if not config.scaling.gpus_per_worker:
            # DeepSpeed would compile its shared-memory collectives first, which takes a C++ compiler and a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            # One pass over the weights: a third of the unfused optimizer's time on a CPU.
            optimizer=torch.optim.AdamW(
                trained, config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
            ),
            config=deepspeed_config(config, plan),
        )
        self.state = EngineState(self.engine)

    def step(self, turns: list[MicroBatch], learning_rate: float) -> torch.Tensor:
        """Learn from a step's micro-batches; return this worker's share of the step's mean loss."""
        self.engine.train()
        if self.config.augment:
            self.engine.module.audio_encoder.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.engine.device)
        for micro in turns:
            torch.manual_seed(micro.draw)
            loss = self.engine(**self._moved(micro), num_items_in_batch=micro.size).loss * micro.counts
            # The engine takes the mean over workers and turns; these losses are shares of one mean already.
            self.engine.backward(loss * (self.plan.workers * self.plan.turns))
            self.engine.step()
            total += loss.detach()
        return total

    def work(self, turns: list[MicroBatch]) -> dict[str, float]:
        """Return what this worker's micro-batches of a step come to, as in `ModelFlops.work`."""
        total = dict.fromkeys(("tokens", "useful_tokens", "model_flops"), 0.0)
        for micro in turns:
            for name, count in self.flops.work(micro.arrays).items():
                total[name] += count * micro.counts
        return total

    def restore(self, tensors: Tensors, step: int, turns: list[MicroBatch]) -> None:
        """Take the optimizer's state after `step` steps over; `turns` are those of any step."""
        empty = [dataclasses.replace(micro, counts=False) for micro in turns]
        self.step(empty, 0.0)  # an optimizer allocates its state in its first step
        self.state.restore(tensors, step)

    @torch.no_grad()
    def validate(self, examples: AnswerExamples, rank: int) -> dict[str, float]:
        """Return `val_loss`, and `val_accuracy`: the share of examples whose greedy answer is the true one.

        It is exactly where every true token is the likeliest behind those before it.
        """
        self.engine.eval()
        # The first examples of a fixed order; all workers make as many passes.
        count = min(self.config.validation_examples, len(examples))
        numbers = examples.order(self.config.seed, 0)[:count]
        size = self.config.micro_batch
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        for start in range(0, count, size * self.plan.workers):
            own = numbers[start + rank * size :][:size]
            share = float(len(own) > 0)
            arrays = examples.collate(self.config.seed, 0, own if len(own) else numbers[:1])
            batch = {name: torch.from_numpy(array).to(self.engine.device) for name, array in arrays.items()}
            output, answered = self.engine(**batch), batch["labels"] >= 0
            tokens = answered.sum()
            right = ((output.logits.argmax(-1) == batch["labels"]) | ~answered).all(dim=1).sum()
            sums += share * torch.stack([output.loss * tokens, tokens, right, torch.tensor(len(own))]).to(sums)
        torch.distributed.all_reduce(sums)
        loss, tokens, right, seen = sums.tolist()
        return {"val_loss": loss / tokens, "val_accuracy": right / seen}

    def _moved(self, micro: MicroBatch) -> dict[str, torch.Tensor]:
        return {name: value.to(self.engine.device) for name, value in micro.arrays.items()}


def publish(tuning: Finetuning, progress: Recorder, processor: MellowProcessor, examples: AnswerExamples) -> None:
    """Save the model to the run's output, where it passes the gate; all workers call it together.

    Args:
        examples: whose first questions the trainer and the saved model are asked.
    """
    from mellow_platform.training.engine_state import weights_of  # with DeepSpeed, as above

    config = tuning.config
    chosen, tensors = progress.choose(best=config.publish == "best")
    if chosen.step != progress.step:
        tensors = tensors or progress.store.load(chosen)[0]
        tuning = Finetuning(config, tuning.plan, build_model(config, processor), tensors)
    tuning.engine.eval()
    questions = gate_questions(examples, config)
    answers = greedy_answers(tuning.engine.module, questions)
    if tensors is None or not progress.is_first:
        return
    model = build_model(config, processor).eval()
    # Of the checkpoint, not the engine, which may compute with rounded ones.
    model.load_state_dict(weights_of(tensors), strict=False)
    # The weights have seen prompts in this form.
    processor.pad_prompt = config.pad_prompts
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, processor, folder)
        check_published(folder, model, questions, answers, like=next(tuning.engine.module.parameters()))
        storage.upload(folder, config.output)
        digests = {path.name: storage.sha256(path) for path in sorted(Path(folder).iterdir())}
    # Written last: a folder without it is not all there.
    storage.write_json(
        storage.join(config.output, PUBLISHED),
        {
            "run": progress.folder,
            "step": chosen.step,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "files": digests,
        },
    )


def gate_questions(examples: AnswerExamples, config: TrainConfig) -> list[Question]:
    """Return the first examples of a fixed order without their answers, one at a time."""
    questions = []
    for number in examples.order(config.seed, 0)[:GATE_QUESTIONS]:
        arrays = examples.collate(config.seed, 0, np.array([number]))
        read = ("input_ids", "input_features", "audio_frames", "audio_latent")
        questions.append({name: torch.from_numpy(arrays[name]) for name in read if name in arrays})
    return questions


def peak_of_all(config: TrainConfig) -> float:
    """Return the floating-point operations a second of all workers' devices, measured at the same time."""
    device = ray.train.torch.get_device()
    dtype = torch.bfloat16 if config.scaling.gpus_per_worker else torch.float32
    peak = torch.tensor(measured_peak(device, dtype), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(peak)
    return peak.item()


def train_answers(values: dict[str, Any]) -> None:
    """The loop of one worker; rank 0 publishes the model folder at the end."""
    config = TrainConfig(**values["config"])
    prepare_worker(config)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    examples: AnswerExamples = ray.get(values["examples"])
    plan = plan_of(config, examples, workers)
    progress = Recorder(config, plan, examples, clip_seconds=20.0, peak_flops=peak_of_all(config))
    processor = load_processor(storage.join(config.shards, "processor"))
    model = build_model(config, processor)
    tensors = progress.resume()
    tuning = Finetuning(config, plan, model, tensors)
    validation = ray.get(values["validation"]) if config.validate_every else None
    validate = functools.partial(tuning.validate, validation, rank) if validation is not None else None
    steps = batches(plan, values["examples"], rank, progress.step, progress.total)
    for turns in progress.waiting(steps):
        if tensors:
            tuning.restore(tensors, progress.step, turns)
            tensors = None
        rate = config.learning_rate * learning_rate_factor(progress.step, progress.total, config.warmup)
        progress.advance(tuning.step(turns, rate), rate, tuning.state.snapshot, validate, tuning.work(turns))
    publish(tuning, progress, processor, examples if validation is None else validation)
    progress.finish()
