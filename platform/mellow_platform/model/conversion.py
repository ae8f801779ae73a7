"""Checkpoints of the reference implementation (soham97/mellow) to model folders, and back.

One table, `NAMES`, gives the reference's name of every tensor of ours; both directions read it. A reference
checkpoint also carries constants (windows, filters, masks, indices): they are compared with what this front end
and network compute, and computed anew on the way back.
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

# Ours -> the reference's: the first prefix that fits, then every part of a module's path inside the encoder.
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
    # One matrix in the reference; ours are its thirds, in this order.
    ("attention.self.query.", "attn.qkv."),
    ("attention.self.key.", "attn.qkv."),
    ("attention.self.value.", "attn.qkv."),
)

EMBEDDING = "caption_decoder.lm.model.embed_tokens.weight"
TIED = "caption_decoder.lm.lm_head.weight"
MEL_BANK = f"{ENCODER}logmel_extractor.melW"
# Written by older versions of transformers, once or once a layer.
ROTARY = re.compile(r"caption_decoder\.lm\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def reference_name(name: str) -> str:
    """Return the reference's name for the entry `name` of our state dict."""
    for ours, theirs in PREFIXES:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    if name.startswith(ENCODER):
        for ours, theirs in PARTS:
            name = name.replace(ours, theirs)
    return name


def name_table(model: MellowForConditionalGeneration) -> dict[str, list[str]]:
    """Return, for every reference entry that is not a constant, our entries that are its equal parts along axis 0."""
    table: dict[str, list[str]] = {}
    for name in model.state_dict():
        table.setdefault(reference_name(name), []).append(name)
    del table[TIED]
    return {name: parts for name, parts in table.items() if not name.endswith("relative_position_index")}


def constants(model: MellowForConditionalGeneration, extractor: MellowFeatureExtractor) -> dict[str, torch.Tensor]:
    """Return what a reference checkpoint carries beside its weights: front end, attention masks and indices."""
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
            # As its forward does: a stage of one window does not shift it.
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
        checkpoint: file or s3:// URI that torch.save wrote: a state dict, or one under `state_dict`; its names may
            all begin with `module.`; its constants may be absent.
        config: of the network in it, the published one by default.
        extractor: the front end it was trained with, the published one by default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no checkpoint, holds more than tensors, or does not hold exactly this network; the message
            lists every entry that is missing, unexpected, or not as it should be.
    """
    entries = read_state_dict(checkpoint)
    model = MellowForConditionalGeneration(config or MellowConfig.from_size("mellow-v0"))
    faults = differences(entries, model, extractor or MellowFeatureExtractor())
    if faults:
        raise ValueError("\n  ".join([f"{checkpoint} does not hold this network:", *faults]))
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
        model: of the published parts, in any size.
        extractor: the front end it was trained with, the published one by default.

    Raises:
        ValueError: the reference has no place for this model's weights.
    """
    audio, text = model.config.audio_config, model.config.text_config
    if (audio.model_type, text.model_type, text.tie_word_embeddings) != ("mellow_htsat", "llama", True):
        raise ValueError(
            f"a reference checkpoint holds HTSAT and a Llama with tied embeddings; this model has "
            f"{audio.model_type} and {text.model_type} with tie_word_embeddings: {text.tie_word_embeddings}"
        )
    with torch.device("meta"):
        published = MellowForConditionalGeneration(MellowConfig(audio_config=audio, text_config=text))
    other = sorted(model.state_dict().keys() ^ published.state_dict().keys())
    if other:
        raise ValueError(f"a reference checkpoint holds the published parts; this model differs in {', '.join(other)}")
    ours = model.state_dict()
    entries = {name: _whole(ours, parts) for name, parts in name_table(model).items()}
    entries[TIED] = entries[EMBEDDING]
    return entries | constants(model, extractor or MellowFeatureExtractor())


def differences(
    entries: dict[str, Any], model: MellowForConditionalGeneration, extractor: MellowFeatureExtractor
) -> list[str]:
    """Return what keeps the reference's `entries` from being `model`'s, a line an entry; none where they fit."""
    ours, table = model.state_dict(), name_table(model)
    needed = {name: _whole(ours, parts) for name, parts in table.items()}
    known = constants(model, extractor) | {TIED: ours["language_model.lm_head.weight"]}
    known |= {name: model.language_model.model.rotary_emb.inv_freq for name in entries if ROTARY.fullmatch(name)}
    expected = needed | known
    # Batch normalisation's count of batches is the one entry of ours that a checkpoint may lack: nothing reads it.
    missing = [name for name, value in needed.items() if value.is_floating_point() and name not in entries]
    unexpected = [name for name in entries if name not in expected]
    faults = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
    for name in sorted(entries.keys() & expected.keys()):
        value, wanted = entries[name], expected[name]
        if not isinstance(value, torch.Tensor):
            faults.append(f"wrong type: {name} is a {type(value).__name__}, a tensor is needed")
        elif value.shape != wanted.shape:
            faults.append(f"wrong shape: {name} is {list(value.shape)}, {list(wanted.shape)} is needed")
        elif value.is_floating_point() != wanted.is_floating_point():
            faults.append(f"wrong type: {name} is {value.dtype}, {wanted.dtype} is needed")
        elif name == TIED:
            if EMBEDDING not in missing and not torch.equal(value, entries[EMBEDDING]):
                faults.append(f"wrong value: {name} is not {EMBEDDING}, and this network ties the two")
        elif name in known and not _same(value, wanted):
            what = "it was trained with another mel bank" if name == MEL_BANK else "it was trained as another network"
            faults.append(f"wrong value: {name} is not what is computed here: {what}")
    return faults


def read_state_dict(checkpoint: str | Path) -> dict[str, Any]:
    """Read the entries of a file that torch.save wrote, out of `state_dict` and without `module.` where it has them.

    Nothing in it is executed, and a zip file's tensors are mapped, not read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds anything that reading would execute, or holds no state dict.
    """
    file = storage.local_copy(str(checkpoint))
    if not file.is_file():
        raise ValueError(f"{checkpoint} is a folder; give the checkpoint file in it")
    try:
        # torch.save wrote no zip file before version 1.6, and only a zip file can be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # bytes of another kind fail in many ways: KeyError, IndexError, UnpicklingError, ...
        # PyTorch's own message goes on to say how to run what is in the file; its cause names it.
        reason = str(error.__context__ or error).split(". ")[0]
        raise ValueError(
            f"{checkpoint} is not read: it is no checkpoint of PyTorch, or holds more than tensors "
            f"({type(error).__name__}: {reason})"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{checkpoint} holds no state dict, a dictionary of tensors by name")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return content


def convert(checkpoint: str, output: str, decoder: str, license: str) -> None:
    """Write the model folder `output` of the reference `checkpoint`; paths or s3:// URIs.

    Args:
        decoder: hub name, folder or GGUF file with the SmolLM2 tokenizer, which a checkpoint lacks.
        license: of the checkpoint's weights, for the model card.

    Raises:
        FileNotFoundError: no such checkpoint or tokenizer.
        ValueError: the checkpoint or the tokenizer is not the published model's.
    """
    model = from_reference(checkpoint)
    tokenizer = load_tokenizer(decoder)
    text = model.config.text_config
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    if special != (text.eos_token_id, text.pad_token_id) or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer of {decoder} has {len(tokenizer)} tokens with {special} to end and pad; the checkpoint "
            f"has {text.vocab_size} with {(text.eos_token_id, text.pad_token_id)}: give SmolLM2-135M's"
        )
    processor = MellowProcessor(MellowFeatureExtractor(), tokenizer)
    save_model(model, processor, output, license=license)


def export(folder: str, checkpoint: str) -> None:
    """Write the model in `folder` as the reference checkpoint `checkpoint`; paths or s3:// URIs.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the reference has no place for this model's weights.
    """
    model, processor = load_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "checkpoint")
        torch.save(to_reference(model, processor.feature_extractor), file)
        storage.write_bytes(checkpoint, file.read_bytes())


def _whole(state: dict[str, torch.Tensor], parts: list[str]) -> torch.Tensor:
    return state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])


def _same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether a stored constant is the expected one, up to the rounding of its type."""
    if not value.is_floating_point():
        return torch.equal(value, expected.to(value.dtype))
    tolerance = max(1e-5, torch.finfo(value.dtype).eps) * float(expected.abs().max())
    return bool((value.float() - expected).abs().max() <= tolerance)
