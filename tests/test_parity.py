"""Reference checkpoints: conversion, errors, and equality of outputs with the reference."""

import importlib.util
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DynamicCache, PreTrainedTokenizerFast

from mellow_platform.cli import main
from mellow_platform.inference.cached_decoder import CachedDecoder
from mellow_platform.inference.linear import pack_linears
from mellow_platform.model import MellowConfig, MellowFeatureExtractor, MellowForConditionalGeneration
from mellow_platform.model.conversion import TIED, from_reference, read_state_dict, to_reference
from mellow_platform.model.folder import load_model
from tests.conftest import SHARED

PARITY = SHARED / "parity"
TINY_FRONT_END = MellowFeatureExtractor.from_size("mellow-tiny")
HTSAT = "audio_encoder.base.htsat."


def greatest(ours: torch.Tensor, expected: np.ndarray) -> float:
    """Return the greatest absolute difference."""
    return float(np.abs(ours.numpy() - expected).max())


@pytest.fixture(scope="module")
def smollm2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with SmolLM2's layout: end token 0, sixteen other special tokens, then bytes from `!`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *(f"<special-{number}>" for number in range(16))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: Path) -> Iterator[SimpleNamespace]:
    """A filled reference checkpoint of the published size, its converted folder, and the reference's outputs."""
    if not PARITY.is_dir():
        pytest.skip(f"{PARITY} is absent: no reference outputs to compare with")
    spec = importlib.util.spec_from_file_location("fill", PARITY / "fill.py")
    assert spec and spec.loader
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    keys = json.loads((PARITY / "keys.json").read_text())
    learned = {
        name: torch.from_numpy(fill.fill(name, tuple(entry["shape"]), 7))
        for name, entry in keys.items()
        if not entry["derived"] and name != TIED
    }
    learned[TIED] = learned[keys[TIED]["tied_to"]]
    folder = tmp_path_factory.mktemp("reference")
    checkpoint = folder / "v0.ckpt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in learned.items()}}, checkpoint)
    main(["convert", str(checkpoint), str(folder / "model"), "--decoder", str(smollm2_tokenizer)])
    model, processor = load_model(str(folder / "model"))
    expected = np.load(PARITY / "expected.npz")
    pairs = np.stack([expected["audio1"], expected["audio2"]], axis=1)
    log_mel = processor.feature_extractor(list(pairs.reshape(4, -1)))["input_features"]
    yield SimpleNamespace(
        keys=keys,
        learned=learned,
        folder=folder / "model",
        model=model,
        processor=processor,
        expected=expected,
        log_mel=log_mel,
        inputs={
            "input_ids": torch.from_numpy(expected["prompt_ids"]).long(),
            "input_features": log_mel.unflatten(0, (2, 2)),
        },
    )
    shutil.rmtree(folder)  # pytest would keep its two gigabytes


@torch.no_grad()
def test_front_end_and_encoder_equal_reference(reference: SimpleNamespace):
    expected = reference.expected
    first = reference.log_mel[::2]
    assert greatest(first, expected["logmel"]) <= 1e-3
    encoded = reference.model.audio_encoder(first)
    assert greatest(encoded.frames, expected["framewise"]) <= 1e-5
    assert greatest(encoded.latent, expected["latent"]) <= 1e-4
    # The fixture holds every 32nd of 1025 tokens: the latent, then one copy of each distinct frame.
    frames = reference.model.frame_embedding(encoded.frames)
    projected = reference.model.projection(torch.cat([encoded.latent[:, None], frames], dim=1))
    assert greatest(projected, expected["projected"]) <= 1e-4
    assert greatest(reference.model.prefix(**reference.inputs), expected["prefix"]) <= 1e-4


@torch.no_grad()
def test_logits_without_cache_equal_reference(reference: SimpleNamespace):
    expected = reference.expected
    assert greatest(reference.model(**reference.inputs).logits[:, -1], expected["first_logits"]) <= 1e-3
    forced = torch.from_numpy(expected["forced_tokens"]).long()
    # The logits at position k see the labels before k: one more label makes the thirteenth position.
    logits = reference.model(**reference.inputs, labels=torch.nn.functional.pad(forced, (0, 1))).logits
    assert greatest(logits[..., expected["vocabulary_ids"]], expected["forced_logits"]) <= 1e-3
    assert (logits.argmax(-1).numpy() == expected["forced_argmax"]).all()


@torch.no_grad()
def test_logits_with_cache_equal_reference(reference: SimpleNamespace):
    expected, language_model = reference.expected, reference.model.language_model
    forced = torch.from_numpy(expected["forced_tokens"]).long()
    cache = DynamicCache(config=language_model.config)
    steps = [
        language_model(inputs_embeds=reference.model.prefix(**reference.inputs), past_key_values=cache, use_cache=True)
    ]
    steps += [language_model(token[:, None], past_key_values=cache, use_cache=True) for token in forced.unbind(1)]
    logits = torch.stack([step.logits[:, -1] for step in steps], dim=1)
    assert greatest(logits[..., expected["vocabulary_ids"]], expected["forced_logits"]) <= 1e-3
    assert (logits.argmax(-1).numpy() == expected["forced_argmax"]).all()


@torch.inference_mode()
def test_engine_equals_reference(reference: SimpleNamespace):
    expected = reference.expected
    model, _ = load_model(str(reference.folder))  # CachedDecoder takes over its weights
    prefix = model.prefix(**reference.inputs)
    pack_linears(model.audio_encoder, "float32")
    encoded = model.audio_encoder(reference.log_mel[::2])
    assert greatest(encoded.frames, expected["framewise"]) <= 1e-5
    assert greatest(encoded.latent, expected["latent"]) <= 1e-4
    decoder = CachedDecoder(model.language_model, "float32")
    cache = decoder.new_cache(2, 389 + 12)
    # Like the engine: prefill of clips and prompt separately per sequence, then joint decoding token by token.
    for row in range(2):
        decoder(prefix[row : row + 1, :260], cache, [0], first=row)
    last = [decoder(prefix[row : row + 1, 260:], cache, [260], first=row)[:, -1:] for row in range(2)]
    steps = [decoder.logits(torch.cat(last))]
    for number, token in enumerate(torch.from_numpy(expected["forced_tokens"]).long().unbind(1)):
        steps.append(decoder.logits(decoder(decoder.embed(token[:, None]), cache, [389 + number] * 2)))
    logits = torch.cat(steps, dim=1)
    assert greatest(logits[:, 0], expected["first_logits"]) <= 1e-3
    assert greatest(logits[..., expected["vocabulary_ids"]], expected["forced_logits"]) <= 1e-3
    assert (logits.argmax(-1).numpy() == expected["forced_argmax"]).all()


@torch.no_grad()
def test_greedy_answers_and_loss_equal_reference(reference: SimpleNamespace):
    expected, padding = reference.expected, reference.processor.tokenizer.pad_token_id
    assert padding == 17
    tokens = reference.model.generate(**reference.inputs, max_new_tokens=12)
    assert (tokens.numpy() == expected["greedy_tokens"]).all()
    answers = torch.from_numpy(expected["answer_ids"]).long()
    loss = reference.model(**reference.inputs, labels=answers.masked_fill(answers == padding, -100)).loss
    assert abs(float(loss) - float(expected["train_loss"])) <= 1e-4


@pytest.mark.extended
def test_export_restores_checkpoint_bits(reference: SimpleNamespace):
    back = reference.folder.parent / "back.ckpt"
    main(["export", str(reference.folder), str(back)])
    entries = read_state_dict(back)
    assert {name: list(value.shape) for name, value in entries.items()} == {
        name: entry["shape"] for name, entry in reference.keys.items()
    }
    assert {name: str(value.dtype) for name, value in entries.items()} == {
        name: f"torch.{entry['dtype']}" for name, entry in reference.keys.items()
    }
    assert all(torch.equal(entries[name], value) for name, value in reference.learned.items())
    # A checkpoint with all constants converts too.
    again = from_reference(back).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in reference.model.state_dict().items())


def test_converted_folder_has_end_token_0(reference: SimpleNamespace):
    settings = json.loads((reference.folder / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (0, 17)
    assert reference.model.language_model.generation_config.eos_token_id == 0
    assert reference.processor.prompt_length == 129


@pytest.fixture(scope="module")
def tiny() -> MellowForConditionalGeneration:
    torch.manual_seed(0)
    return MellowForConditionalGeneration(MellowConfig.from_size("mellow-tiny")).eval()


@pytest.fixture
def entries(tiny: MellowForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The tiny model as a reference checkpoint."""
    return to_reference(tiny, TINY_FRONT_END)


def converted(entries: object, folder: Path) -> MellowForConditionalGeneration:
    """Save `entries` as a checkpoint and return the converted model."""
    torch.save(entries, folder / "tiny.ckpt")
    return from_reference(folder / "tiny.ckpt", MellowConfig.from_size("mellow-tiny"), TINY_FRONT_END)


@pytest.mark.parametrize("form", ["plain", "wrapped", "prefixed", "wrapped and prefixed", "without constants"])
def test_checkpoint_forms_round_trip(form: str, tiny, entries: dict, tmp_path: Path):
    stored = dict(entries)
    if form == "without constants":
        learned = {"weight", "bias", "relative_position_bias_table", "running_mean", "running_var"}
        stored = {name: value for name, value in entries.items() if name.rpartition(".")[2] in learned}
        stored = {name: value for name, value in stored.items() if ".stft." not in name and name != TIED}
    if "prefixed" in form:
        stored = {f"module.{name}": value for name, value in stored.items()}
    model = converted({"state_dict": stored, "epoch": 3} if "wrapped" in form else stored, tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tiny.state_dict().items())
    again = to_reference(model, TINY_FRONT_END)
    assert again.keys() == entries.keys()
    assert all(torch.equal(value, entries[name]) for name, value in again.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_becomes_float32(dtype: torch.dtype, entries: dict, tmp_path: Path):
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in entries.items()}
    model = converted(half, tmp_path)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    weight = "audio_encoder.base.c2l.weight"
    assert torch.equal(model.frame_embedding.weight, half[weight].float())


def test_rotary_frequencies_of_older_checkpoints(tiny, entries: dict, tmp_path: Path):
    frequencies = tiny.language_model.model.rotary_emb.inv_freq
    name = "caption_decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq"
    converted(entries | {name: frequencies}, tmp_path)
    with pytest.raises(ValueError, match=f"wrong value: {name}"):
        converted(entries | {name: frequencies * 2}, tmp_path)


def test_all_mismatches_are_in_one_error(entries: dict, tmp_path: Path):
    for name in ("audio_encoder.base.c2l.bias", "caption_decoder.lm.model.norm.weight"):
        del entries[name]
    entries["caption_decoder.lm.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(1)
    entries["epoch"] = 3
    entries[f"{HTSAT}head.bias"] = torch.zeros(7)
    entries[f"{HTSAT}layers.0.blocks.0.attn.qkv.weight"] = torch.zeros(95, 32)
    entries[f"{HTSAT}layers.0.blocks.1.attn_mask"] = torch.zeros(1, 64, 64)
    entries[f"{HTSAT}norm.weight"] = torch.zeros(128, dtype=torch.int64)
    entries[f"{HTSAT}norm.bias"] = [0.0] * 128
    entries[TIED] = entries[TIED] + 1
    with pytest.raises(ValueError, match=r"tiny\.ckpt") as error:
        converted(entries, tmp_path)
    assert str(error.value).split("\n  ")[1:] == [
        "missing: audio_encoder.base.c2l.bias",
        "missing: caption_decoder.lm.model.norm.weight",
        "unexpected: caption_decoder.lm.model.layers.0.self_attn.q_proj.lora_A.weight",
        "unexpected: epoch",
        f"wrong shape: {HTSAT}head.bias is [7]; expected [64]",
        f"wrong shape: {HTSAT}layers.0.blocks.0.attn.qkv.weight is [95, 32]; expected [96, 32]",
        f"wrong shape: {HTSAT}layers.0.blocks.1.attn_mask is [1, 64, 64]; expected [16, 64, 64]",
        f"wrong type: {HTSAT}norm.bias is a list; expected a tensor",
        f"wrong type: {HTSAT}norm.weight is torch.int64; expected torch.float32",
        f"wrong value: {TIED} differs from caption_decoder.lm.model.embed_tokens.weight, but this network ties them",
    ]


def test_exported_front_end_equals_ours(entries: dict):
    waveform = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, 320_000).astype(np.float32))
    framed = torch.nn.functional.pad(waveform[None, None], (1024, 1024), mode="reflect")
    kernels = [entries[f"{HTSAT}spectrogram_extractor.stft.{part}.weight"] for part in ("conv_real", "conv_imag")]
    real, imaginary = (torch.nn.functional.conv1d(framed, kernel, stride=1280)[0].T for kernel in kernels)
    power = real.square() + imaginary.square()
    decibels = 10 * torch.log10((power @ entries[f"{HTSAT}logmel_extractor.melW"]).clamp(min=1e-10))
    torch.testing.assert_close(decibels, TINY_FRONT_END.spectrogram(waveform[None].numpy())[0], atol=1e-3, rtol=0)


def test_other_front_end_raises(entries: dict, tmp_path: Path):
    entries[f"{HTSAT}logmel_extractor.melW"] = entries[f"{HTSAT}logmel_extractor.melW"].roll(1, dims=0)
    with pytest.raises(ValueError, match=r"logmel_extractor\.melW .*mel bank"):
        converted(entries, tmp_path)


class Payload:
    """An object of a malicious checkpoint: unpickling it creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_code_in_checkpoint_is_not_executed(form: str, tmp_path: Path):
    checkpoint, touched = tmp_path / "evil.ckpt", tmp_path / "touched"
    if form == "zip":
        torch.save({"state_dict": Payload(touched)}, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps({"state_dict": Payload(touched)}, protocol=2))
    with pytest.raises(ValueError, match=r"more than tensors .*getattr was not an allowed global"):
        from_reference(checkpoint)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no state dict"),
        ({"state_dict": [torch.zeros(1)]}, "no state dict"),
        (b"PK\x03\x04 cut short", "not a PyTorch checkpoint"),
        (b"", "not a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1", "not a PyTorch checkpoint"),
    ],
)
def test_malformed_checkpoint_raises(content: object, message: str, tmp_path: Path):
    checkpoint = tmp_path / "v0.ckpt"
    if isinstance(content, bytes):
        checkpoint.write_bytes(content)
    else:
        torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=message):
        from_reference(checkpoint)


def test_convert_command_names_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "v0.ckpt"), str(tmp_path / "out")])
    assert stop.value.code == 1
    assert "v0.ckpt: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_of_untied_decoder_raises():
    config = MellowConfig.from_size("mellow-tiny")
    config.text_config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="llama with tie_word_embeddings: False"):
        to_reference(MellowForConditionalGeneration(config), TINY_FRONT_END)


def test_export_of_other_parts_raises(tiny: MellowForConditionalGeneration):
    other = MellowForConditionalGeneration(tiny.config)
    other.language_model.model.layers[0].self_attn.q_proj.register_buffer("lora_A", torch.zeros(1))
    with pytest.raises(ValueError, match=r"q_proj\.lora_A"):
        to_reference(other, TINY_FRONT_END)


def questions(count: int, config: MellowConfig) -> dict[str, torch.Tensor]:
    """Return `count` questions with prompts of several lengths, padded to one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, config.text_config.vocab_size, (count, 20), generator=generator)
    for row, length in enumerate(torch.randint(3, 20, (count,), generator=generator)):
        ids[row, length:] = config.pad_token_id
    frames = torch.randn(count, 2, 251, 64, generator=generator) * 20 - 40
    return {"input_ids": ids, "input_features": frames}


@torch.no_grad()
def test_batched_logits_equal_single_ones(tiny: MellowForConditionalGeneration):
    batch = questions(5, tiny.config)
    together = tiny(**batch).logits
    for row in range(5):
        alone = tiny(**{name: value[row : row + 1] for name, value in batch.items()}).logits
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_decoding_equals_uncached(tiny: MellowForConditionalGeneration):
    batch = questions(3, tiny.config)
    tokens = tiny.generate(**batch, max_new_tokens=10, eos_token_id=-1)
    logits = tiny(**batch, labels=tokens).logits
    cache = DynamicCache(config=tiny.config.text_config)
    read = tiny.language_model(inputs_embeds=tiny.prefix(**batch), past_key_values=cache, use_cache=True)
    for position in range(10):
        torch.testing.assert_close(read.logits[:, -1], logits[:, position], atol=1e-4, rtol=0)
        read = tiny.language_model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
    assert (logits.argmax(-1) == tokens).all()
    assert (tiny.generate(**batch, max_new_tokens=10, eos_token_id=-1, use_cache=False) == tokens).all()
