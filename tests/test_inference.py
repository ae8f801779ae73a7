"""The engine: equal to the model in any batch and with any cache; queue, cancellation, sampling, protocol."""

import asyncio
import copy
import inspect
import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from mellow_platform.inference.answer_text import AnswerText
from mellow_platform.inference.cached_decoder import CachedDecoder
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.engine_protocol import InferenceEngine
from mellow_platform.inference.linear import pack
from mellow_platform.inference.prefix_cache import TensorLRU
from mellow_platform.inference.request import Answer, Cancelled, ClipFeatures, EngineClosed, QueueFull, Request
from mellow_platform.inference.sampling import Sampler
from mellow_platform.inference.windows import windows
from mellow_platform.model import (
    MellowConfig,
    MellowFeatureExtractor,
    MellowForConditionalGeneration,
    MellowProcessor,
)
from mellow_platform.model.tokenizer import train_tokenizer

TEXTS = [
    "which of these is heard? a) tone b) noise burst",
    "caption the audio.",
    "is the first sound louder than the second?",
    "how many sounds are there?",
]
CHOICES = ["a) tone", "b) noise burst", "yes"]


def build_processor() -> MellowProcessor:
    extractor = MellowFeatureExtractor.from_size("mellow-tiny")
    return MellowProcessor(extractor, train_tokenizer(TEXTS + CHOICES), prompt_length=24, answer_length=12)


def build_model() -> MellowForConditionalGeneration:
    torch.manual_seed(0)
    config = MellowConfig.from_size("mellow-tiny", vocab_size=len(build_processor().tokenizer))
    return MellowForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def processor() -> MellowProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def model() -> MellowForConditionalGeneration:
    """The model without engine, cache or batch."""
    return build_model()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(build_model(), build_processor()) as engine:
        yield engine


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, length).astype(np.float32) for length in (50_000, 320_000, 400_000, 8_000)]


@pytest.fixture(scope="module")
def requests(clips: list[np.ndarray]) -> list[Request]:
    """16 questions about one and two clips, each pair asked about several times, answers of 4 to 19 tokens."""
    pairs = [(clips[0],), (clips[0], clips[1]), (clips[2], clips[3]), (clips[1],)]
    asked = itertools.product(pairs, TEXTS)
    return [Request(text, pair, 4 + number, logprobs=True) for number, (pair, text) in enumerate(asked)]


def read(processor: MellowProcessor, request: Request) -> dict[str, torch.Tensor]:
    """Return what the model takes of a request about waveforms."""
    waveforms = [clip for clip in request.clips if isinstance(clip, np.ndarray)]
    return dict(processor(audio=[waveforms], text=[request.text]))


def uncached(
    model: MellowForConditionalGeneration, processor: MellowProcessor, request: Request
) -> tuple[list[int], list[float]]:
    """Answer greedily by running the whole sequence for every token; return tokens and their log-probabilities."""
    inputs = read(processor, request)
    tokens: list[int] = []
    logprobs: list[float] = []
    with torch.no_grad():
        while len(tokens) < request.max_new_tokens and tokens[-1:] != [processor.tokenizer.eos_token_id]:
            labels = torch.tensor([[*tokens, 0]])
            row = model(**inputs, labels=labels).logits[0, -1].log_softmax(-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return tokens, logprobs


@pytest.fixture(scope="module")
def expected(model, processor, requests) -> list[tuple[list[int], list[float]]]:
    return [uncached(model, processor, request) for request in requests]


def check(answers: list[Answer], expected: list[tuple[list[int], list[float]]]) -> None:
    for answer, (tokens, logprobs) in zip(answers, expected, strict=True):
        assert list(answer.tokens) == tokens
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def small_llama(family: type[PreTrainedConfig] = LlamaConfig, **options) -> PreTrainedModel:
    torch.manual_seed(1)
    config = family(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "layernorm.weight", ".bias")):
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


def small_gpt2() -> PreTrainedModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=101, n_positions=64, n_embd=48, n_layer=3, n_head=4, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


DECODERS = {
    "grouped queries": small_llama,
    "tied embeddings": lambda: small_llama(tie_word_embeddings=True),
    "biases": lambda: small_llama(attention_bias=True, mlp_bias=True),
    "scaled positions": lambda: small_llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
    ),
    "mistral": lambda: small_llama(MistralConfig),
    "qwen2": lambda: small_llama(Qwen2Config),
    "gpt2": small_gpt2,
}


@pytest.mark.parametrize("build", DECODERS.values(), ids=DECODERS.keys())
@torch.inference_mode()
def test_cached_logits_equal_uncached(build):
    reference = build()
    tokens = torch.randint(0, 101, (3, 20))
    logits = reference(tokens).logits
    decoder = CachedDecoder(build(), "float32")
    cache = decoder.new_cache(4, 32)
    # Sequences of different lengths in slots 1 to 3, read in two parts, then continued token by token together.
    lengths = [5, 11, 8]
    for slot, length in enumerate(lengths):
        embedded = decoder.embed(tokens[slot : slot + 1, :length])
        decoder(embedded[:, :3], cache, [0], first=1 + slot)
        hidden = decoder(embedded[:, 3:], cache, [3], first=1 + slot)
        torch.testing.assert_close(decoder.logits(hidden[0]), logits[slot, 3:length], atol=2e-5, rtol=1e-5)
    for step in range(8):
        known = [length + step for length in lengths]
        new = torch.stack([tokens[row, length] for row, length in enumerate(known)])[:, None]
        got = decoder.logits(decoder(decoder.embed(new), cache, known, first=1))[:, 0]
        wanted = torch.stack([logits[row, length] for row, length in enumerate(known)])
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_cuda_graph_step_equals_plain_step():
    decoder = CachedDecoder(small_llama(), "float32")
    cache, lengths = decoder.new_cache(3, 32), [5, 11, 8]
    for slot, length in enumerate(lengths):
        decoder(torch.randn(1, length, 48), cache, [0], first=slot)
    plain = decoder.step(cache, [7, 8, 9], lengths)
    static = decoder.static_step(cache, torch.tensor([[7], [8], [9]]), torch.tensor(lengths)[:, None])
    torch.testing.assert_close(static, plain, atol=2e-5, rtol=1e-5)


def test_decoder_does_not_copy_weights():
    model = small_llama()
    CachedDecoder(model, "float32")
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())


def test_unsupported_decoder_family_is_refused():
    model = small_llama()
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' model; the engine runs llama, mistral, qwen2, gpt2"):
        CachedDecoder(model, "float32")


def test_cache_past_decoder_positions_is_refused():
    with pytest.raises(ValueError, match=r"\b100\b.*\b64\b.*max_new_tokens"):
        CachedDecoder(small_llama(), "float32").new_cache(1, 100)


@pytest.mark.parametrize("encoder", ["htsat", "cnn14", "whisper"])
@pytest.mark.parametrize("projection", ["mellow", "linear", "mlp", "transformer"])
def test_every_encoder_and_projection(encoder: str, projection: str, clips):
    extractor = MellowFeatureExtractor.from_size("mellow-tiny", encoder=encoder)
    processor = MellowProcessor(extractor, build_processor().tokenizer, prompt_length=24, partner="silence")
    config = MellowConfig.from_size(
        "mellow-tiny", vocab_size=len(processor.tokenizer), encoder=encoder, projection=projection
    )
    config.text_config.max_position_embeddings = 1024
    config.lora = {"r": 4, "init_lora_weights": False}
    torch.manual_seed(0)
    model = MellowForConditionalGeneration(config).eval()
    request = Request(TEXTS[1], (clips[0],), 6, logprobs=True)
    wanted = uncached(model, processor, request)
    for dtype, tolerance in (("float32", 1e-4), ("int8", 0.2)):
        with Engine(copy.deepcopy(model), processor, dtype=dtype) as engine:
            answer = engine.generate([request])[0]
        assert answer.logprobs
        assert answer.logprobs[0] == pytest.approx(wanted[1][0], abs=tolerance)
        if dtype == "float32":
            check([answer], [wanted])


@torch.inference_mode()
def test_int8_linear_is_batch_invariant_and_close_to_float32():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(64, 96), torch.randn(64), torch.randn(7, 96)
    x[:, 5] *= 40  # an outlier channel, as language models have
    linear = pack(weight, bias, "int8")
    y = linear(x)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert float((y - exact).norm() / exact.norm()) < 0.01
    loud = x.clone()
    loud[1:] *= 1e4
    assert torch.equal(linear(loud)[0], y[0])
    assert torch.equal(linear(x[:1])[0], y[0])
    assert torch.equal(linear(torch.zeros(1, 96))[0], bias)


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype 'int3' is not one of float32, int8, bfloat16"):
        pack(torch.zeros(2, 2), None, "int3")


def test_single_answers_equal_uncached_model(engine: Engine, requests, expected):
    check([engine.generate([request])[0] for request in requests], expected)


def test_batched_answers_equal_uncached_model(engine: Engine, requests, expected):
    check(engine.generate(requests), expected)
    check(engine.generate(requests), expected)  # all caches warm


def test_answers_equal_generate(engine: Engine, model, processor, requests):
    request = requests[5]
    inputs = read(processor, request)
    tokens = model.generate(**inputs, max_new_tokens=request.max_new_tokens)[0].tolist()
    answer = engine.generate([request])[0]
    assert list(answer.tokens) == tokens
    # The engine leaves out an incomplete character at the end; the tokenizer writes a replacement character.
    assert answer.text == processor.decode_answers(torch.tensor([tokens]))[0].rstrip("\ufffd ")
    assert answer.prompt_tokens == len(processor.token_ids(request.text))


def test_fewer_slots_than_requests(requests, expected):
    with Engine(build_model(), build_processor(), slots=3, max_waiting=2) as engine:
        check(engine.generate(requests), expected)


def test_int8_answers_are_batch_invariant(requests):
    with Engine(build_model(), build_processor(), dtype="int8") as engine:
        alone = [engine.generate([request])[0] for request in requests]
        # Not approximately: integer sums are exact, and everything between them looks at one sequence at a time.
        for answer, together in zip(alone, engine.generate(requests), strict=True):
            assert (together.tokens, together.logprobs) == (answer.tokens, answer.logprobs)


def test_stored_features_score_as_waveform(engine: Engine, clips):
    stored = engine.encode(clips[:2])
    for features, clip in zip(stored, clips, strict=False):
        assert features.frames.dtype == np.float16
        (from_stored,) = engine.score(Request(TEXTS[0], (features,)), ["a) tone"])
        (from_waveform,) = engine.score(Request(TEXTS[0], (clip,)), ["a) tone"])
        assert from_stored.logprob == pytest.approx(from_waveform.logprob, abs=2e-2)


def test_clip_and_prefix_caches(engine: Engine, clips):
    one, two = clips[:2]
    engine.generate([Request(text, (one, two), 2) for text in TEXTS])
    assert (engine.stats["clip_misses"], engine.stats["prefix_misses"]) == (2, 1)
    assert engine.stats["prefix_hits"] == len(TEXTS) - 1
    engine.generate([Request(TEXTS[0], (two, one), 2)])  # the other order is another prefix of known clips
    assert (engine.stats["clip_misses"], engine.stats["prefix_misses"]) == (2, 2)
    engine.generate([Request(TEXTS[0], (one.copy(), two.copy()), 2)])  # content counts, not the array
    assert (engine.stats["clip_misses"], engine.stats["prefix_misses"]) == (2, 2)


def test_lru_cache_evicts_by_bytes():
    cache = TensorLRU(100)
    for name in "abc":
        cache.put(name, torch.zeros(10))
        cache.get("a")
    assert [cache.get(name) is None for name in "abc"] == [False, True, False]
    cache.put("too large", torch.zeros(30))
    assert cache.get("too large") is None
    assert (len(cache), cache.bytes) == (2, 80)


def test_caches_of_zero_bytes(requests, expected):
    with Engine(build_model(), build_processor(), clip_cache_bytes=0, prefix_cache_bytes=0) as engine:
        check(engine.generate(requests[:4]), expected[:4])
        assert engine.stats["prefix_bytes"] == 0


def long_request(engine: Engine, clip: np.ndarray) -> Request:
    """A request whose answer takes all the room there is: the end marker is not drawn at such a temperature."""
    return Request(TEXTS[0], (clip,), engine.max_new_tokens, temperature=10.0, seed=3)


def test_long_answer_does_not_delay_short_one(engine: Engine, clips):
    long = engine.submit(long_request(engine, clips[0]))
    next(iter(long))
    short = engine.submit(Request(TEXTS[1], (clips[0],), 2))
    assert len(short.result().tokens) <= 2
    assert engine.stats["active"] == 1
    assert len(long.result().tokens) > 20


def test_full_queue_refuses_until_cancel(clips):
    with Engine(build_model(), build_processor(), slots=1, max_waiting=1) as engine:
        long = engine.submit(long_request(engine, clips[0]))
        next(iter(long))
        waiting = engine.submit(Request(TEXTS[1], (clips[0],), 2))
        with pytest.raises(QueueFull, match="1 requests wait"):
            engine.submit(Request(TEXTS[2], (clips[0],), 2))
        long.cancel()
        waiting.result()
        with pytest.raises(Cancelled):
            long.result()
        assert engine.stats["active"] == 0


def test_cancelled_waiting_request_is_not_computed(clips):
    with Engine(build_model(), build_processor(), slots=1) as engine:
        long = engine.submit(long_request(engine, clips[0]))
        next(iter(long))
        before, waiting = (engine.submit(Request(TEXTS[1], (clips[1],), 2)) for _ in range(2))
        waiting.cancel()
        with pytest.raises(Cancelled):
            waiting.result()
        before.cancel()
        assert engine.stats["active"] == 1  # it did not have to wait for the answer before it
        long.cancel()
        with pytest.raises(Cancelled):
            long.result()
        assert engine.stats["clip_misses"] == 1


def test_failed_request_does_not_affect_others(engine: Engine, requests, expected):
    broken = ClipFeatures(np.zeros((3, 5), np.float16), np.zeros(7, np.float16))
    streams = [engine.submit(request) for request in (requests[0], Request(TEXTS[0], (broken,)), requests[1])]
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(7,\).* \(16, 64\) and \(128,\)"):
        streams[1].result()
    check([streams[0].result(), streams[2].result()], expected[:2])


def test_clips_with_nan_are_refused(engine: Engine, clips):
    features = ClipFeatures(np.full((16, 64), np.nan, np.float16), np.zeros(128, np.float16))
    spoilt, loud = clips[0].copy(), clips[0].copy()
    spoilt[100], loud[100] = np.inf, 1e20
    for second in (features, spoilt, loud):
        with pytest.raises(ValueError, match=r"clip 1 .*NaN.*1e\+10"):
            engine.submit(Request(TEXTS[0], (clips[0], second)))


def test_failed_sampler_ends_its_answer_only(requests, expected):
    model = build_model()
    with Engine(model, build_processor()) as engine:
        engine._decoder.parts.head = lambda hidden: torch.full((*hidden.shape[:-1], 300), torch.nan)
        with pytest.raises(RuntimeError, match="probability"):
            engine.generate([Request(TEXTS[0], requests[0].clips, temperature=1.0, seed=0)])
        assert engine.stats["active"] == 0
        assert engine.generate([Request(TEXTS[0], requests[0].clips, 3)])[0].finish_reason in ("stop", "length")


def test_closed_engine_refuses_waiting_and_new_requests(clips):
    engine = Engine(build_model(), build_processor())
    stream = engine.submit(long_request(engine, clips[0]))
    next(iter(stream))
    engine.close()
    with pytest.raises(EngineClosed, match="was closed"):
        stream.result()
    with pytest.raises(EngineClosed, match="was closed"):
        engine.submit(Request(TEXTS[0], (clips[0],)))


def test_cancelled_score_is_skipped(clips):
    with Engine(build_model(), build_processor()) as engine:
        over = threading.Event()
        hanging = engine._call(over.wait)
        request = Request(TEXTS[0], (clips[0],))
        left, waited = (engine.submit_score(request, CHOICES) for _ in range(2))
        assert left.cancel()
        over.set()
        assert hanging.result()
        assert waited.result() == engine.score(request, CHOICES)


def test_calls_do_not_block_answers(clips):
    with Engine(build_model(), build_processor()) as engine:
        stream = engine.submit(long_request(engine, clips[0]))
        calls = [engine._call(lambda: None) for _ in range(200)]
        next(iter(stream))
        assert not calls[-1].done()  # a token came before all of them had their turn
        stream.cancel()


def test_tiny_temperature_is_greedy(clips):
    with Engine(build_model(), build_processor()) as engine:
        greedy, cold = (Request(TEXTS[0], (clips[0],), 8, temperature=value, seed=0) for value in (0.0, 1e-40))
        assert engine.generate([cold])[0].text == engine.generate([greedy])[0].text


def test_check_detects_hanging_loop(clips):
    engine = Engine(build_model(), build_processor())
    engine.check(timeout=10)
    stream = engine.submit(long_request(engine, clips[0]))
    engine.check(timeout=10)  # between two tokens
    stream.cancel()
    begun, over = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        over.wait()

    hanging = engine._call(hang)
    begun.wait()
    with pytest.raises(TimeoutError):
        engine.check(timeout=0.1)
    over.set()
    hanging.result()
    engine.check(timeout=10)
    engine.close()
    with pytest.raises(EngineClosed, match="was closed"):
        engine.check(timeout=10)


def test_concurrent_async_streams(engine: Engine, requests, expected):
    async def read(request: Request) -> list[int]:
        return [token.id async for token in engine.submit(request)]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*map(read, requests))

    assert asyncio.run(read_all()) == [tokens for tokens, _ in expected]


def test_stream_pieces_join_to_answer(engine: Engine, clips):
    stream = engine.submit(Request(TEXTS[0], (clips[0],), 60, temperature=2.0, seed=1))
    pieces = [token.text for token in stream]
    assert "".join(pieces) == stream.result().text


def test_drawn_answers_follow_seed(engine: Engine, clips):
    def draw(seed: int | None, **options) -> tuple[int, ...]:
        options = {"temperature": 2.0} | options
        return engine.generate([Request(TEXTS[0], (clips[0],), 20, seed=seed, **options)])[0].tokens

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert draw(None) != draw(None)
    greedy = engine.generate([Request(TEXTS[0], (clips[0],), 20)])[0].tokens
    assert draw(1, top_p=1e-6) == draw(1, temperature=1e-3) == greedy


def test_draws_follow_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    request = Request("?", (np.zeros(1),), temperature=0.7, top_p=0.95, seed=0, logprobs=True)
    sampler = Sampler(request, "cpu")
    drawn = [sampler.choose(logits, 0) for _ in range(4000)]
    share = torch.bincount(torch.tensor([token for token, _ in drawn]), minlength=4) / len(drawn)
    warm = (logits / 0.7).softmax(0)
    assert warm[:2].sum() < 0.95 < warm[:3].sum()
    kept = torch.tensor([*warm[:3].tolist(), 0.0])
    assert (share - kept / kept.sum()).abs().max() < 0.03
    token, logprob = drawn[0]
    assert logprob == pytest.approx(float(logits.log_softmax(0)[token]))


def test_answer_ends_before_stop_string(engine: Engine, clips):
    request = Request(TEXTS[0], (clips[0],), 60, temperature=2.0, seed=1)
    whole = engine.generate([request])[0].text
    stop = whole[10:13]
    stopped = engine.generate([Request(TEXTS[0], (clips[0],), 60, temperature=2.0, seed=1, stop=(stop,))])[0]
    assert stopped.text == whole[: whole.index(stop)].rstrip()
    assert stopped.finish_reason == "stop"


def test_incomplete_text_is_withheld(processor: MellowProcessor):
    tokenizer = processor.tokenizer
    ids = tokenizer("a naïve 音 end of it")["input_ids"]
    text = AnswerText(tokenizer, ())
    pieces = [text.push(token) for token in ids]
    assert "".join(pieces) + text.finish() == "a naïve 音 end of it"
    assert not any("�" in piece for piece in pieces)

    text = AnswerText(tokenizer, ("end now", "stop"))
    pieces = [text.push(token) for token in ids] + [text.finish()]
    assert "".join(pieces) == text.text == "a naïve 音 end of it"
    text = AnswerText(tokenizer, ("end o",))
    shown = ""
    for token in ids:
        shown += text.push(token)
        assert "a naïve 音".startswith(shown)  # never a piece of the stop string, nor the space before it
        if text.stopped:
            break
    assert text.stopped
    assert shown == text.text == "a naïve 音"


@torch.no_grad()
def test_scores_are_log_probabilities(engine: Engine, model, processor, clips):
    request = Request(TEXTS[0], (clips[0], clips[1]))
    scores = engine.score(request, CHOICES)
    inputs = read(processor, request)
    for score in scores:
        ids = torch.tensor([processor.answer_ids(score.choice)])
        logprobs = model(**inputs, labels=ids).logits[0].log_softmax(-1)
        assert score.logprob == pytest.approx(float(logprobs.gather(1, ids[0, :, None]).sum()), abs=1e-4)
    assert [score.logprob for score in scores] == sorted((score.logprob for score in scores), reverse=True)
    assert sum(score.probability for score in scores) == pytest.approx(1)
    with pytest.raises(ValueError, match="choices"):
        engine.score(request, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": ()}, "0 clips"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stop": ("",)}, "stop string"),
    ],
)
def test_requests_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Request(**{"text": "?", "clips": (np.zeros(1),)} | options)


def test_too_many_new_tokens_are_refused(engine: Engine, clips):
    with pytest.raises(ValueError, match=r"max_new_tokens is 301.* 300"):
        engine.submit(Request("?", (clips[0],), 301))


def test_windows_of_recordings():
    recording = np.arange(25, dtype=np.float32)
    (first,) = windows([recording], 10, 1, "first")
    assert first.seconds == ((0.0, 10.0),)
    assert first.clips[0].base is None  # no view, which would keep all of the recording in memory
    each = windows([recording], 10, 1, "each")
    assert [heard.seconds for heard in each] == [((0.0, 10.0),), ((10.0, 20.0),), ((20.0, 25.0),)]
    assert each[1].clips[0].tolist() == list(range(10, 20))
    (pair,) = windows([recording], 10, 1, "pair")
    assert pair.seconds == ((0.0, 10.0), (15.0, 25.0))
    assert windows([recording[:4]], 10, 1, "pair")[0].seconds == ((0.0, 4.0), (0.0, 4.0))
    side_by_side = windows([recording, recording[:12]], 10, 1, "each")
    assert [heard.seconds for heard in side_by_side] == [((0.0, 10.0), (0.0, 10.0)), ((10.0, 20.0), (10.0, 12.0))]


@pytest.mark.parametrize(
    ("recordings", "rule", "message"),
    [
        ([np.zeros(5)], "last", "'last' is not one of first, each, pair"),
        ([np.zeros(5), np.zeros(5)], "pair", "makes two clips of one recording"),
        ([np.zeros(0)], "first", "0 samples"),
        ([], "first", "0 recordings"),
    ],
)
def test_invalid_windows_are_refused(recordings: list[np.ndarray], rule: str, message: str):
    with pytest.raises(ValueError, match=message):
        windows(recordings, 10, 1, rule)


def test_engine_implements_the_protocol(engine: Engine):
    implementation: InferenceEngine = engine  # checked by mypy
    assert isinstance(implementation, InferenceEngine)
    methods = {name: method for name, method in vars(InferenceEngine).items() if inspect.isfunction(method)}
    for name in methods.keys() - {"__init__", "__subclasshook__"}:
        parameters = [list(inspect.signature(getattr(kind, name)).parameters) for kind in (InferenceEngine, Engine)]
        assert parameters[0] == parameters[1], name
    extractor = build_processor().feature_extractor
    assert (engine.sampling_rate, engine.clip_samples) == (extractor.sampling_rate, extractor.clip_samples)
    assert engine.token_text(build_processor().tokenizer.eos_token_id) is None
