"""Fine-tuning of Mellow on answers with DeepSpeed; the audio encoder is frozen, and its features may be stored.

The loss is that of `MellowForConditionalGeneration.forward`, cross-entropy over the tokens of the answers.
"""

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
from mellow_platform.training.trainer import build_plan, prepare_worker, run_training
from mellow_platform.training.verify_export import Question, check_published, greedy_answers

BETAS = (0.9, 0.98)
CHECK_QUESTIONS = 8  # whose answers are compared before publication
PUBLISHED = "training.json"


def finetune(config: TrainConfig) -> dict[str, Any]:
    """Train Mellow to the end of its run, and return the run's result.

    Raises:
        ValueError: configuration and shards do not match, or the run of this name has other options.
    """
    require("deepspeed", extra="train")
    validation = load_examples(config, "val") if config.validate_every else None
    if validation is not None and not len(validation):
        raise ValueError(
            f"{config.shards} has no questions in split val, and validate_every is {config.validate_every}; "
            "add questions to the split, or set validate_every to 0"
        )
    return run_training(train_answers, config, load_examples(config), validation)


def build_model(config: TrainConfig, processor: MellowProcessor) -> MellowForConditionalGeneration:
    """Return the model to train: that of `init_from`, or one of `size` with a trained encoder (and decoder).

    Raises:
        ValueError: `init_from` has another projection or other adapters, or encoder or tokenizer are not those of the
            shards.
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
            f"{config.init_from} has the projection {model.config.projection}, not {config.projection}; "
            f"set `projection` to {model.config.projection}, or `encoder` instead of `init_from`"
        )
    return model


def _model_of_parts(config: TrainConfig, processor: MellowProcessor) -> MellowForConditionalGeneration:
    assert config.encoder  # set if init_from is not
    encoder = load_encoder(config.encoder)
    decoder = load_decoder(config.decoder) if config.decoder and config.pretrained else None
    model_config = MellowConfig.from_size(
        config.size,
        projection=config.projection,
        vocab_size=len(processor.tokenizer),
        audio_config=encoder.config,
        text_config=load_decoder_config(config.decoder) if config.decoder else None,
    )
    model = MellowForConditionalGeneration(model_config)
    model.audio_encoder.load_state_dict(encoder.state_dict())
    if decoder:
        model.language_model.load_state_dict(decoder.state_dict())
    return model


def check_encoder(config: TrainConfig, model: MellowForConditionalGeneration, processor: MellowProcessor) -> None:
    """Check that the shards' features are those of the model's encoder.

    Raises:
        ValueError: front end, shapes of features, or encoder weights differ.
    """
    audio, name = model.config.audio_config, config.encoder or config.init_from
    processor.feature_extractor.check_matches(audio, name)
    expected = {"frames": [audio.num_frames, audio.frame_size], "latent": [audio.hidden_size]}
    manifest = Manifest.read(config.shards)
    if "frames" not in manifest.features:
        return
    remedy = "run jobs/preprocess.py with this encoder, or use the encoder of the shards"
    if manifest.features != expected:
        raise ValueError(
            f"{config.shards} contains features {manifest.features}, encoder {name} gives {expected}: {remedy}"
        )
    if manifest.encoder != encoder_digest(model.audio_encoder):
        raise ValueError(f"{config.shards} was written with other encoder weights than those of {name}: {remedy}")


def check_tokenizer(config: TrainConfig, processor: MellowProcessor) -> None:
    """Check that the shards' token ids are those of the decoder.

    Raises:
        ValueError: the decoder has another vocabulary.
    """
    if config.init_from:
        tokenizer, name = load_processor(config.init_from).tokenizer, config.init_from
    elif config.decoder:
        tokenizer, name = load_tokenizer(config.decoder), config.decoder
    else:
        return  # a fresh decoder has the vocabulary of the shards
    if tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(
            f"{config.shards} was written with another tokenizer than that of {name}: run jobs/preprocess.py with "
            + ("--encoder" if config.init_from else "--decoder")
            + f" {name} into another folder"
        )


def load_examples(config: TrainConfig, split: str = "train") -> AnswerExamples:
    """Read the examples of a split, with the collation options of `config`.

    Raises:
        ValueError: the shards contain other features than the run needs, or lack questions for `synthetic_share`.
    """
    if config.augment and (features := Manifest.read(config.shards).configuration["features"]) == "encoder":
        raise ValueError(
            f"augment needs features: logmel or waveform, and {config.shards} has features: {features}; "
            "set other shards, or unset augment"
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
    return examples.subset(select_synthetic_share(config, config.synthetic_share))


def select_synthetic_share(config: TrainConfig, share: float) -> np.ndarray:
    """Return the numbers of as many training questions as possible of which `share` is synthetic.

    All questions of one kind are kept, and a random part of the other kind, drawn by the run's seed.

    Raises:
        ValueError: a required kind has no questions.
    """
    subtypes = (
        Manifest.read(config.shards).read_table(config.shards, "records/train", ["subtype"])["subtype"].to_pylist()
    )
    names = {name.removesuffix(".json") for name in config.synthetic_subtypes}
    is_synthetic = np.array([subtype.removesuffix(".json") in names for subtype in subtypes])
    kinds = [(np.flatnonzero(is_synthetic), share), (np.flatnonzero(~is_synthetic), 1 - share)]
    if any(part and not len(numbers) for numbers, part in kinds):
        raise ValueError(
            f"synthetic_share {share:g} cannot be reached: {is_synthetic.sum()} of the {len(subtypes)} training "
            f"questions in {config.shards} have a subtype of {', '.join(sorted(names))}; it has "
            f"{', '.join(sorted(set(subtypes)))}. Set synthetic_subtypes, or remove synthetic_share"
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
        "gradient_accumulation_steps": plan.accumulation_steps,
        "train_batch_size": config.micro_batch * plan.accumulation_steps * plan.workers,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bool(config.scaling.gpus_per_worker)},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class FinetuneWorker:
    """Mellow in a DeepSpeed engine on one worker: steps, state, validation. All workers call each method together."""

    def __init__(
        self, config: TrainConfig, plan: StepPlan, model: MellowForConditionalGeneration, tensors: Tensors | None
    ):
        """
        Args:
            tensors: tensors of the checkpoint to resume from, if any.
        """
        # Imported here because it takes seconds, which a driver and a dry run need not wait for.
        import deepspeed

        from mellow_platform.training.engine_state import EngineState, model_weights

        self.config, self.plan = config, plan
        self.flops = ModelFlops.from_model(model)  # before ZeRO partitions the weights
        if config.activation_checkpointing:
            model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        if config.augment:
            for module in model.audio_encoder.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.momentum = 0.0  # keeps the statistics of the frozen encoder
        if tensors:
            model.load_state_dict(model_weights(tensors), strict=False)
        if not config.scaling.gpus_per_worker:
            # Otherwise DeepSpeed compiles its shared-memory collectives, which takes a C++ compiler and a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            # Fused: one pass over the weights, in a third of the unfused optimizer's time on a CPU.
            optimizer=torch.optim.AdamW(
                trained, config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
            ),
            config=deepspeed_config(config, plan),
        )
        self.state = EngineState(self.engine)

    def step(self, micro_batches: list[MicroBatch], learning_rate: float) -> torch.Tensor:
        """Train on a step's micro-batches; return this worker's share of the step's mean loss."""
        self.engine.train()
        if self.config.augment:
            self.engine.module.audio_encoder.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.engine.device)
        for micro_batch in micro_batches:
            torch.manual_seed(micro_batch.seed)
            loss = self.engine(**self._on_device(micro_batch), num_items_in_batch=micro_batch.step_weight).loss
            loss = loss * micro_batch.active
            # The engine averages over workers and micro-batches, and these losses are already shares of one mean.
            self.engine.backward(loss * (self.plan.workers * self.plan.accumulation_steps))
            self.engine.step()
            total += loss.detach()
        return total

    def work(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Return the work of this worker's micro-batches of a step, as in `ModelFlops.work`."""
        total = dict.fromkeys(("tokens", "useful_tokens", "model_flops"), 0.0)
        for micro_batch in micro_batches:
            for name, count in self.flops.work(micro_batch.arrays).items():
                total[name] += count * micro_batch.active
        return total

    def restore(self, tensors: Tensors, step: int, micro_batches: list[MicroBatch]) -> None:
        """Restore a snapshot after `step` steps; `micro_batches` are those of any step."""
        fillers = [dataclasses.replace(micro_batch, active=False) for micro_batch in micro_batches]
        self.step(fillers, 0.0)  # an optimizer allocates its state in its first step
        self.state.restore(tensors, step)

    @torch.no_grad()
    def validate(self, examples: AnswerExamples, rank: int) -> dict[str, float]:
        """Return `val_loss`, and `val_accuracy`: the share of examples whose greedy answer is the reference answer.

        The greedy answer equals the reference if each reference token is the likeliest after the previous ones.
        """
        self.engine.eval()
        # The first examples of a fixed order; all workers make the same number of passes.
        count = min(self.config.validation_examples, len(examples))
        numbers = examples.order(self.config.seed, 0)[:count]
        size = self.config.micro_batch
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        for start in range(0, count, size * self.plan.workers):
            share = numbers[start + rank * size :][:size]
            active = float(len(share) > 0)
            arrays = examples.collate(self.config.seed, 0, share if len(share) else numbers[:1])
            batch = {name: torch.from_numpy(array).to(self.engine.device) for name, array in arrays.items()}
            output, labelled = self.engine(**batch), batch["labels"] >= 0
            tokens = labelled.sum()
            correct = ((output.logits.argmax(-1) == batch["labels"]) | ~labelled).all(dim=1).sum()
            sums += active * torch.stack([output.loss * tokens, tokens, correct, torch.tensor(len(share))]).to(sums)
        torch.distributed.all_reduce(sums)
        loss, tokens, correct, total = sums.tolist()
        return {"val_loss": loss / tokens, "val_accuracy": correct / total}

    def _on_device(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {name: value.to(self.engine.device) for name, value in micro_batch.arrays.items()}


def publish(worker: FinetuneWorker, recorder: Recorder, processor: MellowProcessor, examples: AnswerExamples) -> None:
    """Check the model and save it to the run's output; all workers call it together.

    Args:
        examples: examples whose first questions both the engine and the saved model answer.

    Raises:
        RuntimeError: the saved model differs from the trained one.
    """
    from mellow_platform.training.engine_state import model_weights  # imports DeepSpeed, as above

    config = worker.config
    checkpoint, tensors = recorder.checkpoint_to_publish(best=config.publish == "best")
    if checkpoint.step != recorder.step:
        tensors = tensors or recorder.store.load(checkpoint)[0]
        worker = FinetuneWorker(config, worker.plan, build_model(config, processor), tensors)
    worker.engine.eval()
    questions = check_questions(examples, config)
    answers = greedy_answers(worker.engine.module, questions)
    if tensors is None or not recorder.is_first:
        return
    model = build_model(config, processor).eval()
    # The float32 weights of the checkpoint; the engine may compute with rounded ones.
    model.load_state_dict(model_weights(tensors), strict=False)
    # Prompts of the published processor are padded as in training.
    processor.pad_prompt = config.pad_prompts
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, processor, folder)
        check_published(folder, model, questions, answers, like=next(worker.engine.module.parameters()))
        storage.upload(folder, config.output)
        digests = {path.name: storage.sha256(path) for path in sorted(Path(folder).iterdir())}
    # Written last: a folder without it is incomplete.
    storage.write_json(
        storage.join(config.output, PUBLISHED),
        {
            "run": recorder.folder,
            "step": checkpoint.step,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "files": digests,
        },
    )


def check_questions(examples: AnswerExamples, config: TrainConfig) -> list[Question]:
    """Return the first questions of a fixed order."""
    questions = []
    for number in examples.order(config.seed, 0)[:CHECK_QUESTIONS]:
        arrays = examples.collate(config.seed, 0, np.array([number]))
        names = ("input_ids", "input_features", "audio_frames", "audio_latent")
        questions.append({name: torch.from_numpy(arrays[name]) for name in names if name in arrays})
    return questions


def peak_flops_of_workers(config: TrainConfig) -> float:
    """Return the total floating-point operations per second of all workers' devices, measured simultaneously."""
    device = ray.train.torch.get_device()
    dtype = torch.bfloat16 if config.scaling.gpus_per_worker else torch.float32
    peak = torch.tensor(measured_peak(device, dtype), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(peak)
    return peak.item()


def train_answers(values: dict[str, Any]) -> None:
    """Run the training loop of one worker; rank 0 publishes the model folder at the end."""
    config = TrainConfig(**values["config"])
    prepare_worker(config)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    examples: AnswerExamples = ray.get(values["examples"])
    plan = build_plan(config, examples, workers)
    recorder = Recorder(config, plan, examples, clip_seconds=20.0, peak_flops=peak_flops_of_workers(config))
    processor = load_processor(storage.join(config.shards, "processor"))
    model = build_model(config, processor)
    tensors = recorder.resume()
    worker = FinetuneWorker(config, plan, model, tensors)
    validation = ray.get(values["validation"]) if config.validate_every else None
    validate = functools.partial(worker.validate, validation, rank) if validation is not None else None
    steps = batches(plan, values["examples"], rank, recorder.step, recorder.total)
    for micro_batches in recorder.until_done(steps):
        if tensors:
            worker.restore(tensors, recorder.step, micro_batches)
            tensors = None
        rate = config.learning_rate * learning_rate_factor(recorder.step, recorder.total, config.warmup)
        loss, work = worker.step(micro_batches, rate), worker.work(micro_batches)
        recorder.advance(loss, rate, worker.state.snapshot, validate, work)
    publish(worker, recorder, processor, examples if validation is None else validation)
    recorder.finish()
