"""Conversion between checkpoints of the reference implementation (soham97/mellow) and model folders.

Both directions use `reference_name`, which maps our tensor names to the reference's. A reference checkpoint also
contains constants (windows, filters, masks, indices): on import they are compared with those of this front end and
network, on export they are recomputed.
"""

import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.clap.modeling_clap import ClapAudioLayer

from mellow_platform import storage
from mellow_platform.model.configuration_mellow import MellowConfig
from mellow_platform.model.decoder import load_tokenizer
from mellow_platform.model.feature_extraction_mellow import MellowFeatureExtractor
from mellow_platform.model.folder import load_model, save_model
from mellow_platform.model.modeling_mellow import MellowForConditionalGeneration
from mellow_platform.model.processing_mellow import MellowProcessor

# Our names -> the reference's: the first matching prefix, then, inside the encoder, every matching part.
PREFIXES = (
    ("language_model.", "caption_decoder.lm."),
    ("frame_embedding.", "audio_encoder.base.c2l."),
    ("projection.", "audio_encoder.projection."),
    ("audio_encoder.swin.audio_encoder.", "audio_encoder.base.htsat."),
    ("audio_encoder.", "audio_encoder.base.htsat."),
)
ENCODER = "audio_encoder.base.htsat."
PARTS = (
    ("batch_norm.", "bn0."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("intermediate.dense.", "mlp.fc1."),
    ("attention.output.dense.", "attn.proj."),
    ("output.dense.", "mlp.fc2."),
    ("attention.self.relative_position", "attn.relative_position"),
    # One matrix in the reference; ours are its thirds in this order.
    ("attention.self.query.", "attn.qkv."),
    ("attention.self.key.", "attn.qkv."),
    ("attention.self.value.", "attn.qkv."),
)

EMBEDDING = "caption_decoder.lm.model.embed_tokens.weight"
TIED = "caption_decoder.lm.lm_head.weight"
MEL_BANK = f"{ENCODER}logmel_extractor.melW"
# Saved by older versions of transformers, once or once per layer.
ROTARY = re.compile(r"caption_decoder\.lm\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def reference_name(name: str) -> str:
    """Return the reference's name of the entry `name` of our state dict."""
    for ours, theirs in PREFIXES:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    if name.startswith(ENCODER):
        for ours, theirs in PARTS:
            name = name.replace(ours, theirs)
    return name


def name_table(model: MellowForConditionalGeneration) -> dict[str, list[str]]:
    """Return, for every reference entry except constants, our entries that are its equal parts along axis 0."""
    table: dict[str, list[str]] = {}
    for name in model.state_dict():
        table.setdefault(reference_name(name), []).append(name)
    del table[TIED]
    return {name: parts for name, parts in table.items() if not name.endswith("relative_position_index")}


def constants(model: MellowForConditionalGeneration, extractor: MellowFeatureExtractor) -> dict[str, torch.Tensor]:
    """Return the constants of a reference checkpoint: front end, attention masks and indices."""
    bins, samples = np.arange(1 + extractor.n_fft // 2)[:, None], np.arange(extractor.n_fft)[None]
    window = torch.hann_window(extractor.n_fft, dtype=torch.float64).numpy()
    transform = np.exp(-2j * np.pi * (bins * samples % extractor.n_fft) / extractor.n_fft) * window
    values = {
        f"{ENCODER}spectrogram_extractor.stft.conv_real.weight": torch.from_numpy(transform.real)[:, None].float(),
        f"{ENCODER}spectrogram_extractor.stft.conv_imag.weight": torch.from_numpy(transform.imag)[:, None].float(),
        MEL_BANK: torch.from_numpy(extractor.spectrogram.filters).clone(),
    }
    for name, layer in model.named_modules():
        if isinstance(layer, ClapAudioLayer):
            index = f"{name}.attention.self.relative_position_index"
            values[reference_name(index)] = model.get_buffer(index)
            # As in its forward: a stage of one window has no shift.
            layer.set_shift_and_window_size(layer.input_resolution)
            mask = layer.get_attn_mask(*layer.input_resolution, torch.float32, "cpu")
            if mask is not None:
                values[reference_name(f"{name}.attn_mask")] = mask
    return values


def from_reference(
    checkpoint: str | Path,
    config: MellowConfig | None = None,
    extractor: MellowFeatureExtractor | None = None,
) -> MellowForConditionalGeneration:
    """Load a reference checkpoint as our model, in float32 and evaluation mode.

    Args:
        checkpoint: path or s3:// URI of a file by torch.save: a state dict, or one under `state_dict`. All its names
            may begin with `module.`; its constants may be missing.
        config: configuration of its network (default: the published one).
        extractor: front end of its training (default: the published one).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a checkpoint, contains more than tensors, or does not match this network; the message lists
            every missing, unexpected or wrong entry.
    """
    entries = read_state_dict(checkpoint)
    model = MellowForConditionalGeneration(config or MellowConfig.from_size("mellow-v0"))
    mismatches = differences(entries, model, extractor or MellowFeatureExtractor())
    if mismatches:
        raise ValueError("\n  ".join([f"{checkpoint} does not match this network:", *mismatches]))
    ours = model.state_dict()
    for name, parts in name_table(model).items():
        if name in entries:
            value = entries[name].to(ours[parts[0]].dtype)
            ours |= dict(zip(parts, value.chunk(len(parts)) if len(parts) > 1 else [value], strict=True))
    ours["language_model.lm_head.weight"] = ours["language_model.model.embed_tokens.weight"]
    model.load_state_dict(ours)
    return model.eval()


def to_reference(
    model: MellowForConditionalGeneration, extractor: MellowFeatureExtractor | None = None
) -> dict[str, torch.Tensor]:
    """Return the reference's state dict of `model`: weights, tied output layer, and all constants.

    Args:
        model: model of the published parts, in any size.
        extractor: front end of its training (default: the published one).

    Raises:
        ValueError: the reference implementation has no such network.
    """
    audio, text = model.config.audio_config, model.config.text_config
    if (audio.model_type, text.model_type, text.tie_word_embeddings) != ("mellow_htsat", "llama", True):
        raise ValueError(
            f"a reference checkpoint contains HTSAT and a Llama with tied embeddings; this model has "
            f"{audio.model_type} and {text.model_type} with tie_word_embeddings: {text.tie_word_embeddings}"
        )
    with torch.device("meta"):
        published = MellowForConditionalGeneration(MellowConfig(audio_config=audio, text_config=text))
    other = sorted(model.state_dict().keys() ^ published.state_dict().keys())
    if other:
        raise ValueError(
            f"a reference checkpoint contains the published parts; this model differs in {', '.join(other)}"
        )
    ours = model.state_dict()
    entries = {name: _whole(ours, parts) for name, parts in name_table(model).items()}
    entries[TIED] = entries[EMBEDDING]
    return entries | constants(model, extractor or MellowFeatureExtractor())


def differences(
    entries: dict[str, Any], model: MellowForConditionalGeneration, extractor: MellowFeatureExtractor
) -> list[str]:
    """Return the mismatches between the reference's `entries` and `model`, one line per entry."""
    ours, table = model.state_dict(), name_table(model)
    needed = {name: _whole(ours, parts) for name, parts in table.items()}
    known = constants(model, extractor) | {TIED: ours["language_model.lm_head.weight"]}
    known |= {name: model.language_model.model.rotary_emb.inv_freq for name in entries if ROTARY.fullmatch(name)}
    expected = needed | known
    # A checkpoint may lack the batch count of batch normalisation, which is unused.
    missing = [name for name, value in needed.items() if value.is_floating_point() and name not in entries]
    unexpected = [name for name in entries if name not in expected]
    lines = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
    for name in sorted(entries.keys() & expected.keys()):
        value, wanted = entries[name], expected[name]
        if not isinstance(value, torch.Tensor):
            lines.append(f"wrong type: {name} is a {type(value).__name__}; expected a tensor")
        elif value.shape != wanted.shape:
            lines.append(f"wrong shape: {name} is {list(value.shape)}; expected {list(wanted.shape)}")
        elif value.is_floating_point() != wanted.is_floating_point():
            lines.append(f"wrong type: {name} is {value.dtype}; expected {wanted.dtype}")
        elif name == TIED:
            if EMBEDDING not in missing and not torch.equal(value, entries[EMBEDDING]):
                lines.append(f"wrong value: {name} differs from {EMBEDDING}, but this network ties them")
        elif name in known and not _same(value, wanted):
            cause = "another mel bank" if name == MEL_BANK else "another network"
            lines.append(f"wrong value: {name} differs from this network's constant: trained with {cause}")
    return lines


def read_state_dict(checkpoint: str | Path) -> dict[str, Any]:
    """Read the entries of a file by torch.save, unwrapped from `state_dict` and without the prefix `module.`.

    No code in the file is executed; the tensors of a zip file are memory-mapped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is malformed, contains code, or contains no state dict.
    """
    file = storage.local_copy(str(checkpoint))
    if not file.is_file():
        raise ValueError(f"{checkpoint} is a folder; pass the checkpoint file in it")
    try:
        # Before version 1.6, torch.save wrote no zip file; only a zip file can be memory-mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # other formats fail in many ways: KeyError, IndexError, UnpicklingError, ...
        # PyTorch's message also explains how to execute the file's code; its cause only names the code.
        reason = str(error.__context__ or error).split(". ")[0]
        raise ValueError(
            f"{checkpoint} is not a PyTorch checkpoint, or contains more than tensors "
            f"({type(error).__name__}: {reason})"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{checkpoint} contains no state dict (a dictionary of tensors by name)")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return content


def convert(checkpoint: str, output: str, decoder: str, license: str) -> None:
    """Convert the reference `checkpoint` to the model folder `output`; both are paths or s3:// URIs.

    Args:
        decoder: hub name, folder or GGUF file with the SmolLM2 tokenizer, which checkpoints do not contain.
        license: license of the weights, for the model card.

    Raises:
        FileNotFoundError: the checkpoint or tokenizer does not exist.
        ValueError: the checkpoint or the tokenizer is not the published model's.
    """
    model = from_reference(checkpoint)
    tokenizer = load_tokenizer(decoder)
    text = model.config.text_config
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    if special != (text.eos_token_id, text.pad_token_id) or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer of {decoder} has {len(tokenizer)} tokens with end and padding {special}; the checkpoint "
            f"has {text.vocab_size} with {(text.eos_token_id, text.pad_token_id)}. Pass SmolLM2-135M's tokenizer"
        )
    processor = MellowProcessor(MellowFeatureExtractor(), tokenizer)
    save_model(model, processor, output, license=license)


def export(folder: str, checkpoint: str) -> None:
    """Export the model in `folder` to the reference checkpoint `checkpoint`; both are paths or s3:// URIs.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the reference implementation has no such network.
    """
    model, processor = load_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "checkpoint")
        torch.save(to_reference(model, processor.feature_extractor), file)
        storage.write_bytes(checkpoint, file.read_bytes())


def _whole(state: dict[str, torch.Tensor], parts: list[str]) -> torch.Tensor:
    return state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])


def _same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether a stored constant equals the expected one, up to rounding of its type."""
    if not value.is_floating_point():
        return torch.equal(value, expected.to(value.dtype))
    tolerance = max(1e-5, torch.finfo(value.dtype).eps) * float(expected.abs().max())
    return bool((value.float() - expected).abs().max() <= tolerance)
