"""Speed of the engine at the published size, against the published algorithm and transformers' generate.

python tests/benchmarks/inference.py                            # random weights, about seven minutes on two cores
python tests/benchmarks/inference.py --decoder SmolLM2.gguf     # real decoder weights: also the cost of int8
python tests/benchmarks/inference.py --quick                    # every figure once

All systems are timed in turn, in one run on one machine, after a warm-up of each. Only ratios are comparable.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # otherwise, it contains only the script's folder

import numpy as np
import torch
import transformers

from mellow_platform.inference.cached_decoder import CachedDecoder
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.request import Request
from mellow_platform.model import MellowConfig, MellowFeatureExtractor, MellowForConditionalGeneration, MellowProcessor
from mellow_platform.model.decoder import load_decoder, load_tokenizer
from mellow_platform.model.folder import load_model, save_model
from mellow_platform.model.tokenizer import train_tokenizer
from tests.benchmarks.recorded import add_record_option, report

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
TOLERANCE = 1e-4  # of float32 log-probabilities over batches

Pair = list[np.ndarray]  # two waveforms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", help="hub name, folder or GGUF file of SmolLM2-135M; random weights without it")
    parser.add_argument("--quick", action="store_true", help="every figure once instead of three times")
    add_record_option(parser)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_model(*build(arguments.decoder), folder)
        systems = {name: stack.enter_context(System(name, folder)) for name in ("reference", *DTYPES)}
        figures = measure(systems, repetitions=1 if arguments.quick else 3)
        if arguments.decoder:
            print_table("Cost of int8 on running text", int8_cost(folder))
    print_table("Ratios and peaks", {key: [figures[d][key] for d in DTYPES] for key in figures[DTYPES[0]]}, DTYPES)
    report("inference", figures, arguments.record)


def build(decoder: str | None) -> tuple[MellowForConditionalGeneration, MellowProcessor]:
    """Return a random model of the published size, with the weights of `decoder` if it is set."""
    torch.manual_seed(0)
    if not decoder:
        tokenizer = train_tokenizer(QUESTIONS)
        model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0"))
    else:
        tokenizer, language_model = load_tokenizer(decoder), load_decoder(decoder)
        model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0", text_config=language_model.config))
        model.language_model.load_state_dict(language_model.state_dict())
        # Audio embeddings get the scale of text embeddings, so that they do not dominate the decoder.
        scale = language_model.get_input_embeddings().weight.std()
        torch.nn.init.constant_(model.get_parameter("projection.layer_norm.weight"), float(scale))
    return model.eval(), MellowProcessor(MellowFeatureExtractor(), tokenizer)


def make_clips(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, 320_000).astype(np.float32) for _ in range(count)]


class Reference:
    """Model without an engine."""

    def __init__(self, folder: str):
        self.model, self.processor = load_model(folder)

    @torch.no_grad()
    def published(self, text: str, pair: Pair, new_tokens: int) -> None:
        """Run the published algorithm: the whole sequence through the decoder for every token, without a cache."""
        embeddings = self.model.prefix(**self.processor(audio=[pair], text=[text]))
        for _ in range(new_tokens):
            logits = self.model.language_model(inputs_embeds=embeddings, use_cache=False).logits
            new = self.model.get_input_embeddings()(logits[:, -1:].argmax(dim=-1))
            embeddings = torch.cat([embeddings, new], dim=1)

    def generate(self, texts: list[str], pairs: list[Pair], new_tokens: int) -> None:
        """Run transformers' generate with its cache, on one padded batch."""
        inputs = self.processor(audio=pairs, text=texts)
        tokens = self.model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=None)
        assert tokens.shape == (len(texts), new_tokens)

    def bounds(self) -> dict[str, float]:
        """Measure memory bandwidth and float32 products per second of this machine, and count weights and positions."""
        memory, square = torch.ones(2**26), torch.ones(2048, 2048)
        decoder = self.model.language_model
        layers, head = (sum(p.numel() for p in part.parameters()) for part in (decoder.model.layers, decoder.lm_head))
        return {
            "bandwidth": memory.nbytes / fastest(memory.sum),
            "products": 2 * 2048**3 / fastest(lambda: square @ square),
            "layer_weights": layers,
            "head_weights": head,
            "prefix": 2 * (self.model.config.num_audio_tokens + 1),
            "prompt": self.processor.prompt_length,
        }


class EngineSystem:
    """Engine in one precision."""

    def __init__(self, folder: str, dtype: str):
        self.engine = Engine.load(folder, dtype=dtype)

    def peak_gib(self) -> float:
        """Return the peak memory of this process, in GiB."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20

    def clear_caches(self) -> None:
        """Empty the caches, as for new clips."""
        for cache in (self.engine._clip_tokens, self.engine._prefixes):
            cache.clear()

    def cold(self, requests: list[Request]) -> None:
        self.clear_caches()
        for answer, request in zip(self.engine.generate(requests), requests, strict=True):
            if len(answer.tokens) != request.max_new_tokens:
                raise RuntimeError("an answer ended before max_new_tokens, so its time is not comparable")

    def cold_first_token(self, request: Request) -> None:
        self.clear_caches()
        self.warm_first_token(request)

    def warm_first_token(self, request: Request) -> None:
        stream = self.engine.submit(request)
        next(iter(stream))
        stream.cancel()

    def changed_by_batch(self, requests: list[Request]) -> tuple[int, float]:
        """Return the number of answers that depend on batch or caches, and the largest difference of log-probabilities.

        Both greedy and sampled answers (with a seed), because greedy ones repeat few tokens.
        """
        changed: set[int] = set()
        worst = 0.0
        for temperature in (0.0, 1.0):
            batch = [replace(request, temperature=temperature, seed=0, logprobs=True) for request in requests]
            single = []
            for request in batch:
                self.clear_caches()
                single += self.engine.generate([request])
            self.clear_caches()
            for together in (self.engine.generate(batch), self.engine.generate(batch)):
                for number, (one, other) in enumerate(zip(single, together, strict=True)):
                    if one.tokens != other.tokens:
                        changed.add(number)
                    elif one.logprobs and other.logprobs:
                        worst = max(worst, *(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)))
        return len(changed), worst

    def parts(self, pair: Pair, prefix: int, prompt: int) -> dict[str, float]:
        """Return the seconds of each part of a request."""
        return self.engine._call(lambda: self._parts(pair, prefix, prompt)).result()

    def _parts(self, pair: Pair, prefix: int, prompt: int) -> dict[str, float]:
        decoder, cache, extractor = self.engine._decoder, self.engine._cache, self.engine.processor.feature_extractor
        embeddings = torch.randn(1, prefix, decoder.shape.hidden) * 0.05
        spectrograms = extractor.spectrogram(np.stack(pair))
        return {
            "front end, 2 clips": fastest(lambda: extractor.spectrogram(np.stack(pair))),
            "encoder, 2 clips": fastest(
                lambda: [self.engine._model.audio_encoder(row) for row in spectrograms.split(1)]
            ),
            f"prefix, {prefix} positions": fastest(lambda: decoder(embeddings, cache, [0])),
            f"prompt, {prompt} positions": fastest(lambda: decoder(embeddings[:, :prompt], cache, [prefix])),
            "a token": fastest(lambda: decoder.step(cache, [0], [prefix + prompt])),
        }


class System:
    """A `Reference` or `EngineSystem` in a process of its own, which sleeps between calls.

    In one process, their threads would slow each other down: OpenMP lets idle threads spin only if there are no more of
    them than cores, and waking a sleeping thread takes longer than a layer's product.
    """

    def __init__(self, name: str, folder: str):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child, name, folder), daemon=True)

    def __enter__(self) -> "System":
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def __call__(self, method: str, *arguments: Any) -> tuple[float, Any]:
        """Call a method in the process; return its seconds and its result."""
        self._pipe.send((method, arguments))
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result


def serve(pipe: Connection, name: str, folder: str) -> None:
    """Run calls in the process of a `System`."""
    transformers.utils.logging.disable_progress_bar()
    system = Reference(folder) if name == "reference" else EngineSystem(folder, name)
    while True:
        method, arguments = pipe.recv()
        try:
            start = time.perf_counter()
            value = getattr(system, method)(*arguments)
            pipe.send((time.perf_counter() - start, value))
        except Exception as error:
            pipe.send(error)


@torch.inference_mode()
def fastest(function: Callable[[], object], repetitions: int = 5) -> float:
    """Return the seconds of the fastest call."""
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(systems: dict[str, System], repetitions: int) -> dict[str, dict[str, Any]]:
    """Time and print all figures; return the ratios by precision, and the table of seconds."""
    clips = make_clips(8)
    pairs = [clips[start : start + 2] for start in (0, 2, 4, 6)]
    one = Request(QUESTIONS[0], tuple(pairs[0]), NEW_TOKENS)
    # Every pair has all questions, with short and long answers.
    lengths = np.random.default_rng(0).permutation(LENGTHS).tolist()
    many = [Request(QUESTIONS[n % 4], tuple(pairs[n // 4]), length) for n, length in enumerate(lengths)]
    texts, clip_pairs = [request.text for request in many], [list(request.clips) for request in many]

    figures: dict[str, dict[str, Any]] = {dtype: {} for dtype in DTYPES}
    for dtype in DTYPES:
        systems[dtype]("cold", [one])  # the first request of a fresh process
        figures[dtype]["peak_gib"] = round(systems[dtype]("peak_gib")[1], 3)
        systems[dtype]("cold", many)
    warm_ups: dict[str, tuple] = {
        "reference": ("generate", texts[:1], clip_pairs[:1], 2),
        **{dtype: ("cold", [replace(one, max_new_tokens=2)]) for dtype in DTYPES},
    }

    bounds = systems["reference"]("bounds")[1]
    print_bounds(
        bounds, {dtype: systems[dtype]("parts", pairs[0], bounds["prefix"], bounds["prompt"])[1] for dtype in DTYPES}
    )

    calls: dict[str, tuple] = {
        "published": ("reference", "published", one.text, pairs[0], NEW_TOKENS),
        "generate": ("reference", "generate", texts[:1], clip_pairs[:1], NEW_TOKENS),
        "generate, 1 token": ("reference", "generate", texts[:1], clip_pairs[:1], 1),
        "generate, 16 x 64": ("reference", "generate", texts, clip_pairs, LENGTHS[-1]),
        "generate, 16 x 4": ("reference", "generate", texts, clip_pairs, LENGTHS[0]),
    }
    for dtype in DTYPES:
        calls |= {
            dtype: (dtype, "cold", [one]),
            f"{dtype}, 1 token": (dtype, "cold", [replace(one, max_new_tokens=1)]),
            f"{dtype}, 16 answers": (dtype, "cold", many),
            f"{dtype}, 16 x 64": (dtype, "cold", [replace(request, max_new_tokens=LENGTHS[-1]) for request in many]),
            f"{dtype}, 16 x 4": (dtype, "cold", [replace(request, max_new_tokens=LENGTHS[0]) for request in many]),
            f"{dtype}, first token": (dtype, "cold_first_token", one),
            f"{dtype}, first token again": (dtype, "warm_first_token", replace(one, text=QUESTIONS[1])),
        }
    seconds_of: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        # In turn, so that load on the machine affects all systems; each has a warm-up call, because a process that
        # slept may have lost memory and clock rate.
        for name, (system, method, *arguments) in calls.items():
            systems[system](*warm_ups[system])
            seconds_of[name].append(systems[system](method, *arguments)[0])
    times = {name: statistics.median(values) for name, values in seconds_of.items()}

    names = ("generate", *DTYPES)
    decode = {name: (times[name] - times[f"{name}, 1 token"]) / (NEW_TOKENS - 1) for name in names}
    steps = LENGTHS[-1] - LENGTHS[0]
    decode16 = {name: (times[f"{name}, 16 x 64"] - times[f"{name}, 16 x 4"]) / steps for name in names}
    answers16 = {name: times[f"{name}, 16 answers" if name in DTYPES else f"{name}, 16 x 64"] for name in names}
    first = {dtype: times[f"{dtype}, first token"] for dtype in DTYPES}
    again = {dtype: times[f"{dtype}, first token again"] for dtype in DTYPES}
    blank = float("nan")
    columns = ("published", *names)
    seconds = {
        "one request, 32 tokens": [times["published"], *(times[name] for name in names)],
        "first token, new clips": [blank, blank, *first.values()],
        "first token, same clips": [blank, blank, *again.values()],
        "16 answers of 4 to 64 tokens": [blank, *answers16.values()],
        "a token, batch 1": [times["published"] / NEW_TOKENS, *decode.values()],
        "a token each, batch 16": [blank, *decode16.values()],
    }
    rates = {"tokens per second, batch 16": [blank, *(16 / value for value in decode16.values())]}
    print_table("Seconds", seconds | rates, columns)
    figures["seconds"] = {
        row: {name: round(value, 3) for name, value in zip(columns, values, strict=True) if value == value}
        for row, values in seconds.items()
    }
    print()
    for dtype in DTYPES:
        changed, worst = systems[dtype]("changed_by_batch", many)[1]
        bound = f" (bound {TOLERANCE:g})" if dtype == "float32" else ""
        print(f"{dtype}: {changed} of {len(many)} answers differ between single, batch of 16 and warm caches,")
        print(f"    log-probabilities by at most {worst:.1e}{bound}")
        figures[dtype] |= {
            "speedup_vs_published": round(times["published"] / times[dtype], 2),
            "speedup_vs_generate": round(times["generate"] / times[dtype], 2),
            "decode_speedup_vs_generate": round(decode["generate"] / decode[dtype], 2),
            "decode16_speedup_vs_generate": round(decode16["generate"] / decode16[dtype], 2),
            "warm_ttft_ratio": round(again[dtype] / first[dtype], 3),
            "batch16_answers_ratio": round(answers16["generate"] / answers16[dtype], 2),
            "changed_by_batch": changed,
        }
    return figures


def print_bounds(bounds: dict[str, float], parts: dict[str, dict[str, float]]) -> None:
    """Print the seconds of each part of a request, and their lower bounds by memory and arithmetic of this machine."""
    bandwidth, products = bounds["bandwidth"], bounds["products"]
    print(f"\nmeasured: memory {bandwidth / 1e9:.1f} GB/s, float32 products {products / 1e12:.3f} TFLOP/s")
    print_table("Part, seconds", {name: [parts[dtype][name] for dtype in DTYPES] for name in parts[DTYPES[0]]}, DTYPES)
    weights = bounds["layer_weights"] + bounds["head_weights"]
    print_table(
        "Bounds in seconds",
        {
            "a token: bytes of weights / memory": [4 * weights / bandwidth, weights / bandwidth],
            "prefix: float32 operations / products": [2 * bounds["layer_weights"] * bounds["prefix"] / products] * 2,
            "prompt: float32 operations / products": [2 * bounds["layer_weights"] * bounds["prompt"] / products] * 2,
        },
        DTYPES,
    )


@torch.inference_mode()
def int8_cost(folder: str) -> dict[str, list[float]]:
    """Compare the decoder's next-token distributions on the README in float32 and int8."""
    logits = {}
    tokens = torch.empty(0)
    for dtype in DTYPES:
        model, processor = load_model(folder)
        tokens = torch.tensor([processor.tokenizer(README.read_text())["input_ids"][:1024]])
        decoder = CachedDecoder(model.language_model, dtype)
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
