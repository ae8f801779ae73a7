"""The Mellow network: HTSAT audio encoder, projection, and Llama decoder."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, ClapAudioModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_mellow import HTSATConfig, MellowConfig


@dataclass
class HTSATOutput(ModelOutput):
    """What the audio encoder says of a clip.

    frames [clips, frames, classes]: probability of each tag in each distinct frame.
    latent [clips, hidden]: mean of the final feature map.
    logits [clips, classes]: of each tag in the whole clip.
    """

    frames: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class SpecAugmentedNorm(nn.BatchNorm2d):
    """`bn0` of HTSAT: normalises each mel band and, in training, blanks stripes (SpecAugment, arXiv 1904.08779).

    As published, a stripe covers at most 64 of 1001 frames, or at most 8 of 64 bands; the width in frames scales
    with the spectrogram.
    """

    time_share = 64 / 1001
    max_bands = 8

    def __init__(self, bands: int, stripes: int):
        super().__init__(bands)
        self.stripes = stripes

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """Map [clips, bands, frames, 1] to the same shape."""
        normal = super().forward(spectrogram)
        if not self.training or not self.stripes:
            return normal
        clips, bands, frames, _ = normal.shape
        keep = torch.ones(clips, bands, frames, dtype=torch.bool, device=normal.device)
        keep &= self._stripes(clips, frames, round(frames * self.time_share), normal.device)[:, None, :]
        keep &= self._stripes(clips, bands, self.max_bands, normal.device)[:, :, None]
        return normal * keep[..., None]

    def _stripes(self, clips: int, length: int, max_width: int, device: torch.device) -> torch.Tensor:
        """Return a mask [clips, length] that is false inside the stripes drawn for each clip."""
        width = torch.randint(0, max(1, max_width), (clips, self.stripes, 1), device=device)
        start = (torch.rand(clips, self.stripes, 1, device=device) * (length - width)).long()
        position = torch.arange(length, device=device)
        return ~((position >= start) & (position < start + width)).any(dim=1)


class HTSATEncoder(PreTrainedModel):
    """HTSAT: a Swin transformer over the folded log-mel spectrogram, with a tag for every frame.

    The Swin network is transformers' `ClapAudioModel`; the tag head is HTSAT's own.
    """

    config_class = HTSATConfig
    base_model_prefix = "htsat"
    main_input_name = "input_features"

    def __init__(self, config: HTSATConfig):
        super().__init__(config)
        self.swin = ClapAudioModel(config)
        self.swin.audio_encoder.batch_norm = SpecAugmentedNorm(config.num_mel_bins, config.spec_augment_stripes)
        bins = config.final_grid // config.fold
        self.tscam_conv = nn.Conv2d(config.hidden_size, config.num_classes, (bins, 3), padding=(0, 1))
        # Published checkpoints hold this layer; no output depends on it.
        self.head = nn.Linear(config.num_classes, config.num_classes).requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(self, input_features: torch.Tensor, **kwargs) -> HTSATOutput:
        """Encode log-mel spectrograms [clips, frames, bands] in dB."""
        features = self.swin(input_features=input_features[:, None])
        logits = self.tscam_conv(features.last_hidden_state).squeeze(2)
        return HTSATOutput(
            frames=logits.sigmoid().transpose(1, 2), latent=features.pooler_output, logits=logits.mean(dim=2)
        )


class MellowProjection(nn.Module):
    """Maps encoder frames to decoder embeddings, with one residual step."""

    def __init__(self, audio_size: int, text_size: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(audio_size, text_size, bias=False)
        self.linear2 = nn.Linear(text_size, text_size, bias=False)
        self.layer_norm = nn.LayerNorm(text_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map [..., audio_size] to [..., text_size]."""
        embedding = self.linear1(frames)
        residual = self.dropout(self.linear2(nn.functional.gelu(embedding)))
        return self.layer_norm(embedding + residual)


class MellowForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers a question about two clips.

    A clip enters as log-mel spectrogram (`input_features`) or as what the frozen encoder made of it
    (`audio_frames` with `audio_latent`), never as both.
    """

    config_class = MellowConfig
    base_model_prefix = "mellow"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {  # noqa: RUF012 (the form transformers reads)
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }

    def __init__(self, config: MellowConfig):
        super().__init__(config)
        audio, text = config.audio_config, config.text_config
        self.audio_encoder = HTSATEncoder(audio)
        self.frame_embedding = nn.Linear(audio.num_classes, audio.hidden_size)
        self.projection = MellowProjection(audio.hidden_size, text.hidden_size, config.projection_dropout)
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def freeze_encoder(self) -> "MellowForConditionalGeneration":
        """Exclude the audio encoder from training; `train()` then leaves it in evaluation mode."""
        self.audio_encoder.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "MellowForConditionalGeneration":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.audio_encoder.parameters()):
            self.audio_encoder.eval()
        return self

    def audio_tokens(self, audio_frames: torch.Tensor, audio_latent: torch.Tensor) -> torch.Tensor:
        """Map frames [..., F, classes] and latent [..., H] to decoder embeddings [..., tokens, text].

        The reference projects every copy of a frame; equal copies have equal images, so here a frame is projected
        once. In training the projection's dropout is then one draw a frame, not one a copy.
        """
        frames = self.frame_embedding(audio_frames)
        projected = self.projection(torch.cat([audio_latent[..., None, :], frames], dim=-2))
        copies = self.config.frame_repeat // self.config.pool_size
        return torch.cat([projected[..., :1, :], projected[..., 1:, :].repeat_interleave(copies, dim=-2)], dim=-2)

    def prefix(
        self,
        input_ids: torch.Tensor,
        input_features: torch.Tensor | None = None,
        audio_frames: torch.Tensor | None = None,
        audio_latent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the embeddings [batch, positions, text] of both clips and the prompt.

        Args:
            input_ids: prompts [batch, prompt].
            input_features: log-mel spectrograms [batch, 2, frames, bands] in dB.
            audio_frames, audio_latent: encoder outputs [batch, 2, F, classes] and [batch, 2, H].

        Raises:
            ValueError: no audio, or both forms of it.
        """
        if (input_features is None) == (audio_frames is None):
            raise ValueError("give either input_features, or audio_frames and audio_latent")
        if input_features is not None:
            # Both clips of a single-clip question are often the same one: encode what is distinct.
            distinct, index = torch.unique(input_features.flatten(0, 1), dim=0, return_inverse=True)
            encoded = self.audio_encoder(distinct)
            shape = input_features.shape[:2]
            audio_frames = encoded.frames[index].unflatten(0, shape)
            audio_latent = encoded.latent[index].unflatten(0, shape)
        if audio_frames is None or audio_latent is None:
            raise ValueError("audio_frames and audio_latent go together")
        dtype = self.frame_embedding.weight.dtype
        audio = self.audio_tokens(audio_frames.to(dtype), audio_latent.to(dtype))
        embed = self.get_input_embeddings()
        separator = embed(torch.full_like(input_ids[:, :1], self.config.separator_token_id))
        return torch.cat([audio[:, 0], separator, audio[:, 1], separator, embed(input_ids)], dim=1)

    def forward(
        self,
        input_ids: torch.Tensor,
        input_features: torch.Tensor | None = None,
        audio_frames: torch.Tensor | None = None,
        audio_latent: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits after the prompt: one position without `labels`, else one for each label.

        Args:
            input_ids: prompts [batch, prompt], padded to one length; the padding is seen, as published.
            labels: answers [batch, answer], -100 where there is none; the loss is their mean cross-entropy.
        """
        embeddings = self.prefix(input_ids, input_features, audio_frames, audio_latent)
        first = embeddings.shape[1] - 1
        if labels is not None:
            known = labels[:, :-1].masked_fill(labels[:, :-1] < 0, self.config.pad_token_id)
            embeddings = torch.cat([embeddings, self.get_input_embeddings()(known)], dim=1)
        # No attention mask: the published weights expect the prompt's padding to be seen.
        hidden = self.language_model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = self.language_model.lm_head(hidden[:, first:])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        input_features: torch.Tensor | None = None,
        audio_frames: torch.Tensor | None = None,
        audio_latent: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return the tokens [batch, new] of the answers; greedy, as published, unless `kwargs` say otherwise.

        `kwargs` are those of transformers' `generate` (`max_new_tokens`, `do_sample`, ...).
        """
        kwargs.pop("attention_mask", None)
        embeddings = self.prefix(input_ids, input_features, audio_frames, audio_latent)
        return self.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device),
            **{"max_new_tokens": 300, "do_sample": False, "pad_token_id": self.config.pad_token_id} | kwargs,
        )
