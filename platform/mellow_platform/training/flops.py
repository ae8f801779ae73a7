"""Work of a training step: tokens, useful tokens, and floating-point operations."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mellow_platform.model import MellowForConditionalGeneration
from mellow_platform.model.encoders import build_encoder

PEAK_SIZES = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices that measure a device's peak


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of Mellow's forward and backward passes, counted as matrix products.

    Recomputed activations and masked positions do not count.

    Attributes:
        position: operations per decoder position, without attention.
        attention: operations per pair of a query and a key, in all layers.
        label: operations for the logits of one position that predicts a token.
        pair: operations of the projection of two clips.
        clip: operations of the frozen encoder's forward pass on one clip.
        prefix: positions of a pair of clips with their separators.
        pad_token: token of visible prompt padding.
    """

    position: float
    attention: float
    label: float
    pair: float
    clip: float
    prefix: int
    pad_token: int

    @classmethod
    def from_model(cls, model: MellowForConditionalGeneration) -> "ModelFlops":
        """Count the operations of `model`; frozen weights need no gradients."""
        audio, text = model.config.audio_config, model.config.text_config
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        projected = 2 * (1 + audio.num_frames)
        return cls(
            position=_matrices(model.language_model.base_model),
            # Scores, and weighted sum of values: one product each in the forward pass, two in the backward pass.
            attention=3 * 2 * 2 * heads * head_size * text.num_hidden_layers,
            label=_products(model.get_output_embeddings().get_parameter("weight")),
            pair=projected * (_matrices(model.projection) + _matrices(model.frame_embedding)),
            clip=_encoder_flops(model),
            prefix=2 * model.config.num_audio_tokens + 2,
            pad_token=model.config.pad_token_id,
        )

    def work(self, arrays: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the work of one forward and backward pass on the arguments of `forward`.

        Returns:
            `tokens` that the decoder reads, `useful_tokens` without prompt padding, and `model_flops`.
        """
        prompts, labelled = arrays["input_ids"], arrays["labels"] >= 0
        clips = arrays["input_features"] if "input_features" in arrays else arrays["audio_frames"]
        pairs = len(clips)
        # The last label is not an input.
        answers = (labelled.flip(1).cumsum(1) > 0).sum(1) - 1
        padding = torch.zeros_like(answers)
        prompt_lengths = torch.full_like(answers, prompts.shape[1])
        if "attention_mask" in arrays:
            prompt_lengths = arrays["attention_mask"].sum(1)
        else:
            padding = ((prompts != self.pad_token).flip(1).cumsum(1) == 0).sum(1)
        lengths = (prompt_lengths + answers.clamp(min=0)).double()
        attended = pairs * self.prefix * (self.prefix + 1) / 2
        attended += float((lengths * self.prefix + lengths * (lengths + 1) / 2).sum())
        tokens = pairs * self.prefix + float(lengths.sum())
        encoded = 0
        if "input_features" in arrays:
            encoded = 2 * pairs - int((clips[:, 0] == clips[:, 1]).flatten(1).all(1).sum())
        return {
            "tokens": tokens,
            "useful_tokens": tokens - float(padding.sum()),
            "model_flops": tokens * self.position
            + attended * self.attention
            + float(labelled.sum()) * self.label
            + pairs * self.pair
            + encoded * self.clip,
        }


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of four."""
    size = PEAK_SIZES[device.type]
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _products(weight: torch.Tensor) -> float:
    """Return a matrix's operations per position: output, input gradient, and weight gradient unless frozen."""
    return (6 if weight.requires_grad else 4) * weight.numel()


def _matrices(module: nn.Module) -> float:
    return sum(
        _products(parameter)
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
        if parameter.ndim == 2
    )


def _encoder_flops(model: MellowForConditionalGeneration) -> float:
    config = model.config.audio_config
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder = build_encoder(config).eval()
        encoder(torch.zeros(1, config.front_end.num_frames, config.front_end.feature_size))
    return counter.get_total_flops()
