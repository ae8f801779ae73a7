"""Questions packed behind one prefix: the same loss and gradients as apart, every example once, nothing padded."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from mellow_platform.model import MellowConfig, MellowForConditionalGeneration
from mellow_platform.model.configuration_mellow import tiny_decoder_config

VOCABULARY = 128
PAIR_INDEX = [0, 0, 0, 1, 2, 2]  # unequal numbers of questions a pair
PROMPTS, ANSWERS = [5, 2, 7, 1, 4, 7], [3, 6, 1, 4, 2, 5]  # tokens


def build(decoder: str, lora: bool = False) -> MellowForConditionalGeneration:
    torch.manual_seed(0)
    text = tiny_decoder_config(VOCABULARY)
    text.num_key_value_heads = 2  # as in SmolLM2, a key has several queries
    if decoder == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 96, "vocab_size": VOCABULARY}
        text = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-tiny", text_config=text)).freeze_encoder()
    if lora:
        model.add_lora({"r": 4, "lora_alpha": 8})
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)  # adapters that begin as nothing would hide theirs
    return model.train()


def packed(model: MellowForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Six questions about three pairs of clips, with unseen padding behind prompts and answers."""
    audio, generator = model.config.audio_config, torch.Generator().manual_seed(1)
    longest = max(PROMPTS), max(ANSWERS)
    prompts = torch.randint(2, VOCABULARY, (6, longest[0]), generator=generator)
    answers = torch.randint(2, VOCABULARY, (6, longest[1]), generator=generator)
    return {
        "input_ids": prompts,
        "attention_mask": (torch.arange(longest[0]) < torch.tensor(PROMPTS)[:, None]).long(),
        "labels": answers.masked_fill(torch.arange(longest[1]) >= torch.tensor(ANSWERS)[:, None], -100),
        "audio_frames": torch.rand(3, 2, audio.num_frames, audio.frame_size, generator=generator),
        "audio_latent": torch.randn(3, 2, audio.hidden_size, generator=generator),
        "pair_index": torch.tensor(PAIR_INDEX),
    }


def alone(batch: dict[str, torch.Tensor], question: int) -> dict[str, torch.Tensor]:
    """One question of a packed batch, without any padding."""
    pair = PAIR_INDEX[question]
    return {
        "input_ids": batch["input_ids"][question, None, : PROMPTS[question]],
        "labels": batch["labels"][question, None, : ANSWERS[question]],
        "audio_frames": batch["audio_frames"][pair, None],
        "audio_latent": batch["audio_latent"][pair, None],
    }


def plain_loss(model: MellowForConditionalGeneration, question: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of an answer's cross-entropy by the decoder as transformers runs it: a plain causal sequence."""
    audio = {name: question[name] for name in ("audio_frames", "audio_latent")}
    prefix = model.prefix(question["input_ids"], **audio)
    sequence = torch.cat([prefix, model.get_input_embeddings()(question["labels"])], dim=1)
    logits = model.language_model(inputs_embeds=sequence, use_cache=False).logits[0, prefix.shape[1] - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, question["labels"][0], reduction="sum")


def gradients(model: MellowForConditionalGeneration, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("decoder", "lora"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_questions_learn_what_separate_sequences_learn(decoder: str, lora: bool, checkpointing: bool):
    model = build(decoder, lora)
    batch = packed(model)
    apart = torch.stack([plain_loss(model, alone(batch, question)) for question in range(6)]).sum() / sum(ANSWERS)
    expected = gradients(model, apart)
    if checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    together = model(**batch).loss
    found = gradients(model, together)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert found.keys() == expected.keys()
    assert all(value.abs().max() > 0 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_questions_have_the_logits_of_separate_sequences(decoder: str):
    model = build(decoder).eval()
    batch = packed(model)
    logits = model(**batch).logits
    asked = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    for question in range(6):
        expected = model(**alone(batch, question)).logits[0]
        torch.testing.assert_close(logits[question, : ANSWERS[question]], expected, atol=1e-5, rtol=0)
        assert not logits[question, ANSWERS[question] :].any()
        torch.testing.assert_close(asked[question, 0], expected[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_is_seen_only_where_no_mask_hides_it():
    model = build("llama").eval()
    batch = packed(model)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)}
    assert torch.equal(model(**batch).loss, model(**other).loss)
    del batch["attention_mask"], other["attention_mask"]
    assert not torch.equal(model(**batch).loss, model(**other).loss)


@torch.no_grad()
def test_a_hole_in_an_answer_is_read_as_padding_and_not_learned():
    model = build("llama").eval()
    batch = packed(model)
    batch["labels"][1, 2] = -100
    found = model(**batch, num_items_in_batch=1.0).loss
    whole = model(**batch | {"labels": batch["labels"].masked_fill(batch["labels"] < 0, 0)}).logits
    assert torch.isfinite(whole).all()
    filled = alone(batch, 1)
    filled["labels"] = filled["labels"].masked_fill(filled["labels"] < 0, model.config.pad_token_id)
    logits = model(**filled).logits[0]
    keep = batch["labels"][1, : ANSWERS[1]] >= 0
    hole = torch.nn.functional.cross_entropy(logits[keep], filled["labels"][0][keep], reduction="sum")
    rest = sum(plain_loss(model, alone(batch, question)) for question in (0, 2, 3, 4, 5))
    torch.testing.assert_close(found, rest + hole, atol=1e-4, rtol=0)


def test_no_position_of_the_packed_sequence_is_padding():
    model = build("llama")
    lengths = []
    model.language_model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: lengths.append(output.shape[:2])
    )
    model(**packed(model))
    prefix = 2 * model.config.num_audio_tokens + 2
    assert lengths == [(1, 3 * prefix + sum(PROMPTS) + sum(ANSWERS) - 6)]
