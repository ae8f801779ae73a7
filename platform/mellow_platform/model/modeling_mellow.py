"""The Mellow network: audio encoder, projection, and decoder, each of the type that the configuration names."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_mellow import MellowConfig
from .encoders import build_encoder
from .lora import add_adapters, freeze_all_but_adapters, merge_adapters
from .packing import ATTENTION, Packing
from .projections import projection_class


class MellowForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers a question about two clips.

    A clip enters as log-mel spectrogram (`input_features`) or as what the frozen encoder made of it
    (`audio_frames` with `audio_latent`), never as both.
    """

    config_class = MellowConfig
    base_model_prefix = "mellow"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: MellowConfig):
        super().__init__(config)
        audio, text = config.audio_config, config.text_config
        self.audio_encoder = build_encoder(audio)
        self.frame_embedding = nn.Linear(audio.frame_size, audio.hidden_size)
        projection = projection_class(config.projection)
        self.projection = projection(audio.hidden_size, text.hidden_size, config.projection_dropout)
        self.language_model = AutoModelForCausalLM.from_config(text, attn_implementation=ATTENTION)
        self.post_init()
        if config.lora:
            # After post_init, which would draw the adapters' zeros anew.
            add_adapters(self.language_model, config.lora)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def freeze_encoder(self) -> "MellowForConditionalGeneration":
        """Exclude the audio encoder from training; `train()` then leaves it in evaluation mode."""
        self.audio_encoder.requires_grad_(False)
        return self.train(self.training)

    def freeze_decoder(self) -> "MellowForConditionalGeneration":
        """Exclude the decoder's own weights from training; its adapters, where it has them, go on learning."""
        freeze_all_but_adapters(self.language_model)
        return self

    def add_lora(self, lora: dict[str, Any]) -> "MellowForConditionalGeneration":
        """Put fresh adapters on the plain decoder, which is frozen; `lora` is as in `MellowConfig`.

        Raises:
            ValueError: it has adapters already.
        """
        if self.config.lora:
            raise ValueError(f"the decoder has adapters already ({self.config.lora}): call merge_lora() first")
        add_adapters(self.language_model, lora)
        self.config.lora = dict(lora)
        return self.freeze_decoder()

    def merge_lora(self) -> "MellowForConditionalGeneration":
        """Add the adapters into the decoder's own weights, in place; a plain decoder is left as it is."""
        if self.config.lora:
            merge_adapters(self.language_model)
            self.config.lora = None
        return self

    def train(self, mode: bool = True) -> "MellowForConditionalGeneration":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.audio_encoder.parameters()):
            self.audio_encoder.eval()
        return self

    def audio_tokens(self, audio_frames: torch.Tensor, audio_latent: torch.Tensor) -> torch.Tensor:
        """Map frames [..., F, frame_size] and latent [..., H] to decoder embeddings [..., tokens, text].

        The reference projects every copy of a frame; equal copies have equal images, so here a frame is projected
        once. In training the projection's dropout is then one draw a frame, not one a copy.
        """
        frames = self.frame_embedding(audio_frames)
        projected = self.projection(torch.cat([audio_latent[..., None, :], frames], dim=-2))
        copies = self.config.frame_repeat // self.config.pool_size
        return torch.cat([projected[..., :1, :], projected[..., 1:, :].repeat_interleave(copies, dim=-2)], dim=-2)

    def audio_prefix(
        self,
        input_features: torch.Tensor | None = None,
        audio_frames: torch.Tensor | None = None,
        audio_latent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the embeddings [pairs, positions, text] of both clips, each with the separator behind it.

        Args:
            input_features: log-mel spectrograms [pairs, 2, frames, bands] in dB.
            audio_frames, audio_latent: encoder outputs [pairs, 2, F, frame_size] and [pairs, 2, H].

        Raises:
            ValueError: no audio, or both forms of it.
        """
        if (input_features is None) == (audio_frames is None):
            raise ValueError("give either input_features, or audio_frames and audio_latent")
        dtype = self.frame_embedding.weight.dtype
        if input_features is not None:
            # Both clips of a single-clip question are often the same one: encode what is distinct.
            distinct, index = torch.unique(input_features.flatten(0, 1), dim=0, return_inverse=True)
            encoded = self.audio_encoder(distinct.to(dtype))
            shape = input_features.shape[:2]
            audio_frames = encoded.frames[index].unflatten(0, shape)
            audio_latent = encoded.latent[index].unflatten(0, shape)
        if audio_frames is None or audio_latent is None:
            raise ValueError("audio_frames and audio_latent go together")
        audio = self.audio_tokens(audio_frames.to(dtype), audio_latent.to(dtype))
        token = torch.full(audio.shape[:2], self.config.separator_token_id, device=audio.device)
        separators = self.get_input_embeddings()(token)[:, :, None]
        return torch.cat([audio, separators], dim=2).flatten(1, 2)

    def prefix(self, input_ids: torch.Tensor, **audio: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings [batch, positions, text] of both clips and the prompt.

        Args:
            input_ids: prompts [batch, prompt].
            audio: arguments of `audio_prefix`.
        """
        return torch.cat([self.audio_prefix(**audio), self.get_input_embeddings()(input_ids)], dim=1)

    def forward(
        self,
        input_ids: torch.Tensor,
        input_features: torch.Tensor | None = None,
        audio_frames: torch.Tensor | None = None,
        audio_latent: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pair_index: torch.Tensor | None = None,
        num_items_in_batch: float | torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return the loss of the answers, and the logits after the prompt.

        Questions on the same clips share these: the result is that of separate sequences, and nothing is computed
        that the answers do not depend on.

        Args:
            input_ids: prompts [questions, prompt], each with a token at least.
            input_features, audio_frames, audio_latent: clip pairs as in `audio_prefix`.
            labels: answers [questions, answer], -100 where there is nothing to learn.
            attention_mask: [questions, prompt], 0 where a prompt's padding is not seen; by default all is, as the
                published weights expect.
            pair_index: clip pair [questions] that each question is about; by default each has its own.
            num_items_in_batch: what the sum over the answers' tokens is divided by; by default their number.

        Returns:
            `loss` with `labels`; `logits` [questions, 1, vocabulary] without, else [questions, answer, vocabulary],
            zeros where there is no label. While training they are left out: only those with a label exist, flat.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tokens, read = input_ids, attention_mask.bool()
        if labels is not None:
            # The last label is followed by nothing, so its token is not read.
            labelled = labels >= 0
            follows = labelled.flip(1).cumsum(1).flip(1)[:, 1:] > 0
            answers = labels[:, :-1].masked_fill(~labelled[:, :-1], self.config.pad_token_id)
            tokens, read = torch.cat([tokens, answers], dim=1), torch.cat([read, follows], dim=1)
        prefixes = self.audio_prefix(input_features, audio_frames, audio_latent)
        if pair_index is None:
            pair_index = torch.arange(len(input_ids), device=input_ids.device)
        packing = Packing.of(len(prefixes), prefixes.shape[1], pair_index, attention_mask.sum(1), read.sum(1))
        questions = self.get_input_embeddings()(tokens[read])
        hidden = self.language_model.base_model(
            inputs_embeds=torch.cat([prefixes.flatten(0, 1), questions])[None],
            position_ids=packing.position_ids,
            attention_mask=packing.mask,
            packing=packing,
            use_cache=False,
        ).last_hidden_state[0]
        head = self.get_output_embeddings()
        if labels is None:
            return CausalLMOutputWithPast(logits=head(hidden[packing.ends])[:, None])
        # The vocabulary is a fifth of the work of a position: only those that predict a label go through it.
        places = packing.ends[:, None] + torch.arange(labels.shape[1], device=labels.device)
        logits, known = head(hidden[places[labelled]]), labels[labelled]
        loss = nn.functional.cross_entropy(logits.float(), known, reduction="sum")
        loss = loss / (len(known) if num_items_in_batch is None else num_items_in_batch)
        if self.training:
            return CausalLMOutputWithPast(loss=loss)
        whole = logits.new_zeros(*labels.shape, logits.shape[-1])
        whole[labelled] = logits
        return CausalLMOutputWithPast(loss=loss, logits=whole)

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
        embeddings = self.prefix(
            input_ids, input_features=input_features, audio_frames=audio_frames, audio_latent=audio_latent
        )
        return self.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device),
            **{"max_new_tokens": 300, "do_sample": False, "pad_token_id": self.config.pad_token_id} | kwargs,
        )
