"""How fast the engine answers at the published size, against the published algorithm and transformers' generate.

python tests/benchmarks/inference.py                            # random weights, about ten minutes on two cores
python tests/benchmarks/inference.py --decoder SmolLM2.gguf     # real decoder weights: also what int8 costs
python tests/benchmarks/inference.py --quick                    # every figure once

Everything is timed in one run on one machine, the systems in turn, after a warm-up of each; ratios are what counts.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mellow_platform.inference.decoder import Decoder
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.request import Answer, Request
from mellow_platform.model import MellowConfig, MellowFeatureExtractor, MellowForConditionalGeneration, MellowProcessor
from mellow_platform.model.decoder import load_decoder, load_tokenizer
from mellow_platform.model.folder import load_model, save_model
from mellow_platform.model.tokenizer import train_tokenizer

DTYPES = ("float32", "int8")
QUESTIONS = [
    "what is the sound in the first clip?",
    "caption the audio.",
    "explain the difference between the two sounds in detail.",
    "which of these is heard? a) rain b) a dog c) an engine d) people talking",
]
README = Path(__file__).resolve().parents[2] / "README.md"
NEW_TOKENS = 32
LENGTHS = list(range(4, 65, 4))  # of the 16 answers
TOLERANCE = 1e-4  # of float32 logits, whatever the batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", help="hub name, folder or GGUF file of SmolLM2-135M; random weights without it")
    parser.add_argument("--quick", action="store_true", help="every figure once instead of three times")
    parser.add_argument("--memory", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_gib_after_one_request(*arguments.memory))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(*build(arguments.decoder), folder)
        peaks = {dtype: peak_in_a_fresh_process(folder, dtype) for dtype in DTYPES}
        report = measure(folder, repetitions=1 if arguments.quick else 3)
        if arguments.decoder:
            print_table("What int8 costs on running text", int8_cost(folder))
    for dtype in DTYPES:
        report[dtype]["peak_gib"] = peaks[dtype]
    print_table("Ratios and peaks", {key: [report[d][key] for d in DTYPES] for key in report[DTYPES[0]]}, DTYPES)
    print(json.dumps(report))


def build(decoder: str | None) -> tuple[MellowForConditionalGeneration, MellowProcessor]:
    """Return a model of the published size: random, but for the decoder's weights where they are given."""
    torch.manual_seed(0)
    if not decoder:
        tokenizer = train_tokenizer(QUESTIONS)
        model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0"))
    else:
        tokenizer, language_model = load_tokenizer(decoder), load_decoder(decoder)
        model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0", text_config=language_model.config))
        model.language_model.load_state_dict(language_model.state_dict())
        # Audio as loud as words, or it drowns what the decoder knows.
        model.projection.layer_norm.weight.data.fill_(float(model.get_input_embeddings().weight.std()))
    return model.eval(), MellowProcessor(MellowFeatureExtractor(), tokenizer)


def make_clips(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, 320_000).astype(np.float32) for _ in range(count)]


def peak_gib_after_one_request(folder: str, dtype: str) -> float:
    """Load the model into an engine of 16 slots, answer a request, and return the process's peak memory in GiB."""
    with Engine.load(folder, dtype=dtype) as engine:
        engine.generate([Request(QUESTIONS[0], tuple(make_clips(2)), NEW_TOKENS)])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_in_a_fresh_process(folder: str, dtype: str) -> float:
    command = [sys.executable, __file__, "--memory", folder, dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return round(float(output.splitlines()[-1]), 3)


class Published:
    """The published algorithm: the whole sequence through the decoder for every token, nothing cached."""

    def __init__(self, model: MellowForConditionalGeneration, processor: MellowProcessor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(self, request: Request, new_tokens: int) -> list[int]:
        inputs = self.processor(audio=[request.clips], text=[request.text])
        embeddings = self.model.prefix(**inputs)
        tokens: list[int] = []
        for _ in range(new_tokens):
            logits = self.model.language_model(inputs_embeds=embeddings, use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
            new = self.model.get_input_embeddings()(torch.tensor([tokens[-1:]]))
            embeddings = torch.cat([embeddings, new], dim=1)
        return tokens


class Generate:
    """transformers' generate with its cache, on one padded batch."""

    def __init__(self, model: MellowForConditionalGeneration, processor: MellowProcessor):
        self.model, self.processor = model, processor

    def __call__(self, requests: list[Request], new_tokens: int) -> list[list[int]]:
        inputs = self.processor(audio=[request.clips for request in requests], text=[r.text for r in requests])
        return self.model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=-1).tolist()


def forget(engine: Engine) -> None:
    """Empty the engine's caches, as for clips that were never heard."""
    for cache in (engine._clip_tokens, engine._prefixes):
        capacity, cache.capacity = cache.capacity, 0
        cache.put(object(), torch.empty(0))
        cache.capacity = capacity


def cold(engine: Engine, requests: list[Request]) -> list[Answer]:
    forget(engine)
    answers = engine.generate(requests)
    if any(len(answer.tokens) != request.max_new_tokens for answer, request in zip(answers, requests, strict=True)):
        raise SystemExit("an answer ended by itself: the times of answers of other lengths do not compare")
    return answers


def first_token(engine: Engine, request: Request) -> None:
    stream = engine.submit(request)
    next(iter(stream))
    stream.cancel()


def cold_first_token(engine: Engine, request: Request) -> None:
    forget(engine)
    first_token(engine, request)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(systems: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Return the median seconds of each system; they take turns, so that none has the quieter machine."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repetitions):
        for name, function in systems.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(folder: str, repetitions: int) -> dict[str, dict[str, float]]:
    """Time everything and print it; return the ratios by precision."""
    clips = make_clips(8)
    model, processor = load_model(folder)
    published, generate = Published(model, processor), Generate(model, processor)
    engines = {dtype: Engine.load(folder, dtype=dtype) for dtype in DTYPES}
    one = Request(QUESTIONS[0], tuple(clips[:2]), NEW_TOKENS)
    short = Request(QUESTIONS[0], tuple(clips[:2]), 1)
    pairs = [tuple(clips[start : start + 2]) for start in (0, 2, 4, 6)]
    many = [
        Request(QUESTIONS[number % 4], pairs[number // 4], length, logprobs=True)
        # Every pair has short and long answers.
        for number, length in enumerate(np.random.default_rng(0).permutation(LENGTHS).tolist())
    ]
    longest = [Request(request.text, request.clips, LENGTHS[-1]) for request in many]
    shortest = [Request(request.text, request.clips, LENGTHS[0]) for request in many]
    for engine in engines.values():  # warm-up
        engine.generate(many)
    generate([one], 2)
    published(one, 1)

    print_bounds(model, processor, engines, clips)
    systems: dict[str, Callable[[], object]] = {
        "published": lambda: published(one, NEW_TOKENS),
        "generate": lambda: generate([one], NEW_TOKENS),
        "generate, 1 token": lambda: generate([one], 1),
        "generate, 16 x 64": lambda: generate(longest, LENGTHS[-1]),
        "generate, 16 x 4": lambda: generate(longest, LENGTHS[0]),
    }
    for dtype, engine in engines.items():
        asked = {"": [one], ", 1 token": [short], ", 16 answers": many, ", 16 x 64": longest, ", 16 x 4": shortest}
        for name, requests in asked.items():
            systems[f"{dtype}{name}"] = partial(cold, engine, requests)
        systems[f"{dtype}, cold first token"] = partial(cold_first_token, engine, one)
        systems[f"{dtype}, warm first token"] = partial(first_token, engine, replace(one, text=QUESTIONS[1]))
    times = in_turn(systems, repetitions)

    def per_token(name: str, prefix: str, short: str, tokens: int) -> float:
        return (times[f"{name}{prefix}"] - times[f"{name}, {short}"]) / tokens

    names = ("generate", *DTYPES)
    decode = {name: per_token(name, "", "1 token", NEW_TOKENS - 1) for name in names}
    decode16 = {name: per_token(name, ", 16 x 64", "16 x 4", LENGTHS[-1] - LENGTHS[0]) for name in names}
    answers16 = {name: times[f"{name}, 16 answers" if name in DTYPES else f"{name}, 16 x 64"] for name in names}
    blank = float("nan")
    print_table(
        "Seconds",
        {
            "one request, 32 tokens": [times["published"], *(times[name] for name in names)],
            "first token, new clips": [blank, blank, *(times[f"{name}, cold first token"] for name in DTYPES)],
            "first token, same clips": [blank, blank, *(times[f"{name}, warm first token"] for name in DTYPES)],
            "16 answers of 4 to 64 tokens": [blank, *answers16.values()],
            "a token, batch 1": [times["published"] / NEW_TOKENS, *decode.values()],
            "a token each, batch 16": [blank, *decode16.values()],
            "tokens per second, batch 16": [blank, *(16 / value for value in decode16.values())],
        },
        ("published", *names),
    )
    report = {}
    for dtype, engine in engines.items():
        changed, worst = changed_by_batch(engine, many)
        print(f"{dtype}: {changed} of {len(many)} answers differ between alone, batch of 16 and warm caches; ", end="")
        print(f"log-probabilities by at most {worst:.1e}" + (f" (bound {TOLERANCE:g})" if dtype == "float32" else ""))
        report[dtype] = {
            "speedup_vs_published": round(times["published"] / times[dtype], 2),
            "speedup_vs_generate": round(times["generate"] / times[dtype], 2),
            "decode_speedup_vs_generate": round(decode["generate"] / decode[dtype], 2),
            "decode16_speedup_vs_generate": round(decode16["generate"] / decode16[dtype], 2),
            "warm_ttft_ratio": round(times[f"{dtype}, warm first token"] / times[f"{dtype}, cold first token"], 3),
            "batch16_answers_ratio": round(answers16["generate"] / answers16[dtype], 2),
            "changed_by_batch": changed,
        }
        engine.close()
    return report


def changed_by_batch(engine: Engine, requests: list[Request]) -> tuple[int, float]:
    """Return how many answers depend on the batch or the caches, and by how much a log-probability does at most.

    Greedy answers, and drawn ones with a seed, which wander over the vocabulary where greedy ones repeat themselves.
    """
    changed: set[int] = set()
    worst = 0.0
    for temperature in (0.0, 1.0):
        asked = [replace(request, temperature=temperature, seed=0, logprobs=True) for request in requests]
        alone = []
        for request in asked:
            forget(engine)
            alone += engine.generate([request])
        forget(engine)
        for together in (engine.generate(asked), engine.generate(asked)):
            for number, (one, other) in enumerate(zip(alone, together, strict=True)):
                same = one.tokens == other.tokens
                if not same:
                    changed.add(number)
                elif one.logprobs and other.logprobs:
                    worst = max(worst, *(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)))
    return len(changed), worst


def print_bounds(
    model: MellowForConditionalGeneration,
    processor: MellowProcessor,
    engines: dict[str, Engine],
    clips: list[np.ndarray],
) -> None:
    """Print what the parts of a request take, and the least that memory and arithmetic of this machine allow."""
    memory, square = torch.ones(2**26), torch.ones(2048, 2048)
    bandwidth = memory.nbytes / fastest(memory.sum)
    gemm = 2 * 2048**3 / fastest(lambda: square @ square)
    print(f"\nmeasured: memory {bandwidth / 1e9:.1f} GB/s, float32 products {gemm / 1e12:.3f} TFLOP/s")
    layers, head = (
        sum(part.numel() for part in module.parameters())
        for module in (model.language_model.model.layers, model.language_model.lm_head)
    )
    pair = np.stack(clips[:2])
    spectrograms = processor.feature_extractor.log_mel(pair)
    prefix = 2 * (model.config.num_audio_tokens + 1)
    prompt = processor.prompt_length
    rows: dict[str, list[float]] = {
        "front end, 2 clips": [fastest(lambda: processor.feature_extractor.log_mel(pair))] * 2
    }
    for engine in engines.values():
        for name, function in parts(engine, spectrograms, prefix, prompt).items():
            rows.setdefault(name, []).append(fastest(function))
    print_table("Seconds a part", rows, DTYPES)
    bytes_a_token = {"float32": 4 * (layers + head), "int8": layers + head}
    print_table(
        "Least seconds",
        {
            "a token: weights / memory": [bytes_a_token[dtype] / bandwidth for dtype in DTYPES],
            "prefix: operations / products": [2 * layers * prefix / gemm, float("nan")],
            "prompt: operations / products": [2 * layers * prompt / gemm, float("nan")],
        },
        DTYPES,
    )


def parts(
    engine: Engine, spectrograms: torch.Tensor, prefix: int, prompt: int
) -> dict[str, Callable[[], torch.Tensor | list]]:
    """Return what an engine computes for a request, part by part."""
    decoder, cache = engine._decoder, engine._cache
    token = torch.zeros(1, 1, dtype=torch.long)
    embeddings = torch.randn(1, prefix, decoder.shape.hidden) * 0.05
    return {
        "encoder, 2 clips": lambda: [engine._model.audio_encoder(row) for row in spectrograms.split(1)],
        f"prefix, {prefix} positions": lambda: decoder(embeddings, cache, [0]),
        f"prompt, {prompt} positions": lambda: decoder(embeddings[:, :prompt], cache, [prefix]),
        "a token": lambda: decoder.logits(decoder(decoder.embed(token), cache, [prefix + prompt])),
    }


@torch.inference_mode()
def fastest(function: Callable[[], object], repetitions: int = 5) -> float:
    function()
    return min(seconds(function) for _ in range(repetitions))


@torch.inference_mode()
def int8_cost(folder: str) -> dict[str, list[float]]:
    """Compare the decoder's next-token distributions on the README in float32 and int8."""
    logits = {}
    tokens = torch.empty(0)
    for dtype in DTYPES:
        model, processor = load_model(folder)
        tokens = torch.tensor([processor.tokenizer(README.read_text())["input_ids"][:1024]])
        decoder = Decoder(model.language_model, dtype)
        logits[dtype] = decoder.logits(decoder(decoder.embed(tokens), decoder.new_cache(1, 1024), [0]))[0, :-1]
    exact, rounded = (logits[dtype].log_softmax(-1) for dtype in DTYPES)
    following = tokens[0, 1 : len(exact) + 1, None]
    return {
        "perplexity, float32": [float(exact.gather(1, following).mean().neg().exp())],
        "perplexity, int8": [float(rounded.gather(1, following).mean().neg().exp())],
        "KL divergence": [float((exact.exp() * (exact - rounded)).sum(-1).mean())],
        "same most likely token": [float((exact.argmax(-1) == rounded.argmax(-1)).float().mean())],
    }


def print_table(title: str, rows: dict[str, list[float]], columns: tuple[str, ...] = ("",)) -> None:
    width = max(map(len, rows))
    print(f"\n{title:{width}} " + "".join(f"{column:>12}" for column in columns))
    for name, values in rows.items():
        print(f"{name:{width}} " + "".join(f"{'-':>12}" if np.isnan(v) else f"{v:12.4g}" for v in values))


if __name__ == "__main__":
    main()
