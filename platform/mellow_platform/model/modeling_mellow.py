"""The Mellow network: audio encoder, projection and decoder of the configured types."""

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
from .loss import answer_loss, loss_mask
from .packing import ATTENTION, Packing
from .projections import projection_class


class MellowForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers a question about two clips.

    A clip is either a log-mel spectrogram (`input_features`) or outputs of the frozen encoder (`audio_frames` and
    `audio_latent`).
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
            # After post_init, which would overwrite the adapters' zeros.
            add_adapters(self.language_model, config.lora)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def freeze_encoder(self) -> "MellowForConditionalGeneration":
        """Freeze the audio encoder; `train()` then keeps it in evaluation mode."""
        self.audio_encoder.requires_grad_(False)
        return self.train(self.training)

    def freeze_decoder(self) -> "MellowForConditionalGeneration":
        """Freeze the decoder's weights except its adapters."""
        freeze_all_but_adapters(self.language_model)
        return self

    def add_lora(self, lora: dict[str, Any]) -> "MellowForConditionalGeneration":
        """Add new adapters to a plain decoder and freeze its weights; `lora` is as in `MellowConfig`.

        Raises:
            ValueError: the decoder already has adapters.
        """
        if self.config.lora:
            raise ValueError(f"the decoder already has adapters ({self.config.lora}); call merge_lora() first")
        add_adapters(self.language_model, lora)
        self.config.lora = dict(lora)
        return self.freeze_decoder()

    def merge_lora(self) -> "MellowForConditionalGeneration":
        """Merge the adapters into the decoder's weights in place; a plain decoder is unchanged."""
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

        The reference projects every copy of a frame; here each frame is projected once and the result is copied. In
        training, dropout in the projection is therefore drawn per frame, not per copy.
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
        """Return the embeddings [pairs, positions, text] of both clips, each followed by the separator.

        Args:
            input_features: log-mel spectrograms [pairs, 2, frames, bands] in dB.
            audio_frames, audio_latent: encoder outputs [pairs, 2, F, frame_size] and [pairs, 2, H].

        Raises:
            ValueError: neither or both forms of audio.
        """
        if (input_features is None) == (audio_frames is None):
            raise ValueError("pass either input_features, or audio_frames and audio_latent")
        dtype = self.frame_embedding.weight.dtype
        if input_features is not None:
            # Both clips of a single-clip question are often equal: encode each distinct clip once.
            distinct, index = torch.unique(input_features.flatten(0, 1), dim=0, return_inverse=True)
            encoded = self.audio_encoder(distinct.to(dtype))
            shape = input_features.shape[:2]
            audio_frames = encoded.frames[index].unflatten(0, shape)
            audio_latent = encoded.latent[index].unflatten(0, shape)
        if audio_frames is None or audio_latent is None:
            raise ValueError("pass both audio_frames and audio_latent")
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

        Questions on the same clips share one prefix; the result equals that of separate sequences without padding.

        Args:
            input_ids: prompts [questions, prompt], each with at least one token.
            input_features, audio_frames, audio_latent: clip pairs as in `audio_prefix`.
            labels: answers [questions, answer], padded with `loss.IGNORED_LABEL`.
            attention_mask: [questions, prompt], 0 to hide padding of prompts. By default padding is visible, as the
                published weights expect.
            pair_index: clip pair of each question [questions]; by default question i has pair i.
            num_items_in_batch: divisor of the summed loss; by default the number of labels.

        Returns:
            `loss` if `labels` are passed. `logits` [questions, 1, vocabulary] without labels; with labels [questions,
            answer, vocabulary], zeros for ignored labels, and None in training mode.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tokens, read = input_ids, attention_mask.bool()
        if labels is not None:
            # No label follows the last one, so its token is not an input.
            labelled = loss_mask(labels)
            follows = labelled.flip(1).cumsum(1).flip(1)[:, 1:] > 0
            answers = labels[:, :-1].masked_fill(~labelled[:, :-1], self.config.pad_token_id)
            tokens, read = torch.cat([tokens, answers], dim=1), torch.cat([read, follows], dim=1)
        prefixes = self.audio_prefix(input_features, audio_frames, audio_latent)
        if pair_index is None:
            pair_index = torch.arange(len(input_ids), device=input_ids.device)
        packing = Packing.from_lengths(len(prefixes), prefixes.shape[1], pair_index, attention_mask.sum(1), read.sum(1))
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
        # The output layer is a fifth of a position's cost: compute it only for positions that predict a label.
        places = packing.ends[:, None] + torch.arange(labels.shape[1], device=labels.device)
        logits, known = head(hidden[places[labelled]]), labels[labelled]
        loss = answer_loss(logits, known, num_items_in_batch)
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
        """Generate the tokens [batch, new] of the answers; greedy by default, as published.

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
