"""Training speed on stored features at the published size, compared with the published recipe.

python tests/benchmarks/training.py             # random weights, eight minutes on two cores
python tests/benchmarks/training.py --rounds 1  # one measurement per figure

Published: batches of 4; both clips of every question go through the frozen encoder and 1025 positions of the
projection, prompts are padded to 129 tokens and answers to 250, logits of all 639 positions; plain PyTorch.
Packed: the step of `jobs/train.py` on one worker with options of the recipe `encoder-cached`: stored features, 8
questions per prefix, no padding, logits only for labels; DeepSpeed engine. Padded: packed, with prompts of 129 tokens.
Each measures the whole step (forward, backward, clipping, AdamW); the three alternate in one run after a warm-up.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # has only the script's folder by default

import tests  # noqa: F401  # sets a token for Ray, before Ray is imported

# isort: split
import numpy as np
import ray
import torch
from torch import nn

from mellow_platform import training
from mellow_platform.model import MellowConfig, MellowForConditionalGeneration
from mellow_platform.training.batches import MicroBatch, batches
from mellow_platform.training.examples import AnswerExamples, RecordNames, TokenTexts
from mellow_platform.training.finetune import BETAS, FinetuneWorker
from mellow_platform.training.flops import ModelFlops, measured_peak
from mellow_platform.training.step_plan import StepPlan
from mellow_platform.training.train_config import TrainConfig
from tests.benchmarks.recorded import add_record_option, report

THREADS = 2
VOCABULARY, PAD_TOKEN = 49152, 17
PROMPT, ANSWER, BATCH = 129, 250, 4  # of the published recipe
# Numbers of tokens as in ReasonAQA, about 40 and about 30.
PROMPTS, ANSWERS = (30, 51), (20, 41)
PAIRS, QUESTIONS_PER_PACK, MICRO_BATCH = 64, 8, 16
# Steps with batches from Ray Data, and micro-batches per window: few, so that the next window is collated throughout
# the measurement.
LIVE_STEPS, LIVE_WINDOW = 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each recipe")
    add_record_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    os.environ["LOCAL_RANK"] = "0"  # required by DeepSpeed
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=500_000_000, logging_level="warning")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        report("training", measure(arguments.rounds), arguments.record)
        torch.distributed.destroy_process_group()
    ray.shutdown()


def measure(rounds: int) -> dict[str, float]:
    """Measure the three recipes alternately, and packed with its input pipeline; print tables, return the figures."""
    torch.manual_seed(0)
    published, packed = Published(), Packed()
    examples = {"packed": make_examples(None), "padded": make_examples(PROMPT)}
    seconds: dict[str, list[float]] = {"published": [], "packed": [], "padded": []}
    peaks = []
    for number in range(rounds + 1):
        times = {"published": published.step(number)}
        for name, each in examples.items():
            times[name] = packed.step(packed.collate(each, number))
        peaks.append(measured_peak(torch.device("cpu"), torch.float32))
        print(", ".join(f"{name} {value:.1f} s" for name, value in times.items()), file=sys.stderr)
        if number:  # round 0 is the warm-up
            for name, value in times.items():
                seconds[name].append(value)
    live = packed.live(examples["packed"])
    # The minimum, because other programs on the machine can only add time.
    return tabulate({name: min(values) for name, values in seconds.items()}, examples, live, max(peaks))


def make_examples(prompt_length: int | None) -> AnswerExamples:
    """Return questions with random tokens and features, `QUESTIONS_PER_PACK` on each pair of clips."""
    generator = np.random.default_rng(0)
    count = PAIRS * QUESTIONS_PER_PACK

    def texts(lengths: np.ndarray) -> TokenTexts:
        offsets = np.append(0, np.cumsum(lengths))
        return TokenTexts(generator.integers(18, VOCABULARY, offsets[-1], dtype=np.int32), offsets)

    frames = generator.random((2 * PAIRS, 32, 527), np.float32).astype(np.float16)
    return AnswerExamples(
        name=f"benchmark-{prompt_length}",
        ids=RecordNames("train", np.arange(count)),
        clips=np.arange(2 * PAIRS).reshape(PAIRS, 2).repeat(QUESTIONS_PER_PACK, axis=0),
        single=np.zeros(count, bool),
        prompts=texts(generator.integers(*PROMPTS, count)),
        answers=texts(generator.integers(*ANSWERS, count)),
        features={
            "audio_frames": frames,
            "audio_latent": generator.standard_normal((2 * PAIRS, 768), np.float32).astype(np.float16),
        },
        pad_token=PAD_TOKEN,
        questions_per_pack=QUESTIONS_PER_PACK,
        prompt_length=prompt_length,
    )


class Published:
    """The published recipe in plain PyTorch, with the same network and the same kernels."""

    def __init__(self) -> None:
        self.model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0")).freeze_encoder().train()
        self.model.audio_encoder.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4, betas=BETAS, weight_decay=1e-4, fused=True)

    def step(self, number: int) -> float:
        """Train on one batch; return the seconds."""
        generator = torch.Generator().manual_seed(number)
        log_mel = 20 * torch.randn(BATCH, 2, 1001, 64, generator=generator) - 40
        prompts = torch.randint(18, VOCABULARY, (BATCH, PROMPT), generator=generator)
        answers = torch.randint(18, VOCABULARY, (BATCH, ANSWER), generator=generator)
        lengths = torch.randint(*ANSWERS, (BATCH, 1), generator=generator)
        answers = answers.masked_fill(torch.arange(ANSWER) >= lengths, PAD_TOKEN)
        start = time.perf_counter()
        self.loss(log_mel, prompts, answers).backward()
        nn.utils.clip_grad_norm_(self.trained, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def loss(self, log_mel: torch.Tensor, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        model, config = self.model, self.model.config
        with torch.no_grad():
            encoded = model.audio_encoder(log_mel.flatten(0, 1))
        frames = model.frame_embedding(encoded.frames.repeat_interleave(config.frame_repeat, dim=1))
        projected = model.projection(torch.cat([encoded.latent[:, None], frames], dim=1))
        pooled = projected[:, 1:].unflatten(1, (-1, config.pool_size)).mean(2)
        audio = torch.cat([projected[:, :1], pooled], dim=1).unflatten(0, (BATCH, 2))
        embed = model.get_input_embeddings()
        separator = embed(torch.full((BATCH, 1), config.separator_token_id))
        sequence = torch.cat([audio[:, 0], separator, audio[:, 1], separator, embed(prompts), embed(answers)], dim=1)
        logits = model.language_model(inputs_embeds=sequence, use_cache=False).logits
        predicted = logits[:, -ANSWER - 1 : -1]
        return nn.functional.cross_entropy(predicted.flatten(0, 1), answers.flatten(), ignore_index=PAD_TOKEN)


class Packed:
    """Training step of `jobs/train.py` on one worker."""

    def __init__(self) -> None:
        config = TrainConfig(
            shards="/none", encoder="/none", output="/none", storage="/none", run="benchmark",
            batch=MICRO_BATCH, micro_batch=MICRO_BATCH, learning_rate=1e-4, pad_prompts=False,
            questions_per_pack=QUESTIONS_PER_PACK,
            zero_stage=0,  # one worker has nothing to partition
        )  # fmt: skip
        model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0")).freeze_encoder()
        self.plan = StepPlan(0, PAIRS * QUESTIONS_PER_PACK, MICRO_BATCH, MICRO_BATCH, workers=1)
        self.worker = FinetuneWorker(config, self.plan, model, None)

    def collate(self, examples: AnswerExamples, step: int) -> list[MicroBatch]:
        numbers = self.plan.numbers(examples, step)
        arrays = examples.collate(0, 0, numbers)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return [MicroBatch(tensors, float(examples.loss_weights[numbers].sum()), active=True, seed=step)]

    def step(self, micro_batches: list[MicroBatch]) -> float:
        """Train on one batch; return the seconds."""
        start = time.perf_counter()
        self.worker.step(micro_batches, 1e-4)
        return time.perf_counter() - start

    def live(self, examples: AnswerExamples) -> dict[str, float]:
        """Train on batches from Ray Data; return the share of time waiting for a batch, and counts per second."""
        training.batches.WINDOW = LIVE_WINDOW
        steps: Iterator[list[MicroBatch]] = batches(self.plan, ray.put(examples), 0, 0, 1 + LIVE_STEPS)
        self.step(next(steps))  # waits for the pipeline to start
        waited = busy = 0.0
        work: dict[str, float] = {}
        start = time.perf_counter()
        for _ in range(LIVE_STEPS):
            before = time.perf_counter()
            micro_batches = next(steps)
            waited += time.perf_counter() - before
            busy += self.step(micro_batches)
            for name, count in self.worker.work(micro_batches).items():
                work[name] = work.get(name, 0.0) + count
        whole = time.perf_counter() - start
        rates = {f"{name}_per_second": count / whole for name, count in work.items()}
        return {"data_wait_share": waited / whole, "outside_model_share": 1 - busy / whole} | rates


def published_flops(flops: ModelFlops) -> float:
    """Return the floating-point operations of the published recipe per question."""
    length = flops.prefix + PROMPT + ANSWER
    config = MellowConfig.from_size("mellow-v0")
    copies = (1 + config.audio_config.num_frames * config.frame_repeat) / (1 + config.audio_config.num_frames)
    return (
        length * (flops.position + flops.label)
        + length * (length + 1) / 2 * flops.attention
        + copies * flops.pair
        + 2 * flops.clip
    )


def tabulate(
    seconds: dict[str, float], examples: dict[str, AnswerExamples], live: dict[str, float], peak: float
) -> dict[str, float]:
    """Print the tables and return the figures."""
    with torch.device("meta"):
        flops = ModelFlops.from_model(
            MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0")).freeze_encoder()
        )
    count = dict.fromkeys(examples, MICRO_BATCH) | {"published": BATCH}
    needed = {"published": published_flops(flops)}
    for name, each in examples.items():
        arrays = each.collate(0, 0, each.order(0, 0))
        needed[name] = flops.work({key: torch.from_numpy(array) for key, array in arrays.items()})["model_flops"]
        needed[name] /= len(each)
    rate = {name: count[name] / seconds[name] for name in seconds}
    print(f"{'':10} s a step  examples   ex/s  GFLOP/ex  utilised  speedup  bound")
    for name in seconds:
        print(
            f"{name:10} {seconds[name]:8.2f} {count[name]:9} {rate[name]:6.3f} {needed[name] / 1e9:9.1f} "
            f"{rate[name] * needed[name] / peak:9.3f} {rate[name] / rate['published']:8.2f} "
            f"{needed['published'] / needed[name]:6.2f}"
        )
    print(f"\nfloat32 products: {peak / 1e9:.0f} GFLOP/s on {THREADS} threads; batches from Ray Data:")
    for name, value in live.items():
        print(f"{name:28} {value:12.4g}")
    figures = {
        "speedup_vs_published": rate["packed"] / rate["published"],
        "speedup_padded_prompts": rate["padded"] / rate["published"],
        "data_wait_share": live["data_wait_share"],
        "bound_vs_published": needed["published"] / needed["packed"],
        "bound_padded_prompts": needed["published"] / needed["padded"],
        "examples_per_second": rate["packed"],
        "published_examples_per_second": rate["published"],
        "gflop_per_example": needed["packed"] / 1e9,
        "published_gflop_per_example": needed["published"] / 1e9,
        "tokens_per_second": live["tokens_per_second"],
        "useful_tokens_per_second": live["useful_tokens_per_second"],
        "model_flop_utilization": live["model_flops_per_second"] / peak,
        "published_flop_utilization": rate["published"] * needed["published"] / peak,
    }
    figures["share_of_bound"] = figures["speedup_vs_published"] / figures["bound_vs_published"]
    figures["share_of_bound_padded"] = figures["speedup_padded_prompts"] / figures["bound_padded_prompts"]
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    main()
