"""The network, its processor and its tokenizers: sizes, shapes, saving, and errors."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from mellow_platform.model import (
    MellowConfig,
    MellowFeatureExtractor,
    MellowForConditionalGeneration,
    MellowProcessor,
    pad_labels,
)
from mellow_platform.model.decoder import load_decoder, load_tokenizer
from mellow_platform.model.tokenizer import train_tokenizer

TEXTS = ["which of these is heard? a) tone b) noise burst", "b) noise burst", "caption the audio.", "a loud tone"]


@pytest.fixture(scope="module")
def processor() -> MellowProcessor:
    extractor = MellowFeatureExtractor.from_size("mellow-tiny")
    return MellowProcessor(extractor, train_tokenizer(TEXTS), prompt_length=24, answer_length=12)


@pytest.fixture(scope="module")
def model(processor: MellowProcessor) -> MellowForConditionalGeneration:
    torch.manual_seed(0)
    config = MellowConfig.from_size("mellow-tiny", vocab_size=len(processor.tokenizer))
    return MellowForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def batch(processor: MellowProcessor) -> dict:
    rng = np.random.default_rng(0)
    short, long = rng.normal(0, 0.1, 50_000), rng.normal(0, 0.1, 400_000)
    return dict(processor(audio=[[short], [short, long]], text=TEXTS[:2], answers=["b) tone", "a loud tone"]))


def without_labels(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def test_published_size_has_published_parameters():
    with torch.device("meta"):
        model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-v0"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 165_937_495
    assert model.config.num_audio_tokens == 129
    assert model.config.audio_config.num_frames == 32


def test_tiny_size_uses_same_class(model: MellowForConditionalGeneration):
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000
    assert type(model) is MellowForConditionalGeneration


def test_unknown_size_raises():
    with pytest.raises(ValueError, match=r"'mellow-huge' .*mellow-v0, mellow-tiny"):
        MellowConfig.from_size("mellow-huge")


def test_output_shapes(model: MellowForConditionalGeneration, batch: dict):
    tokens = model.config.num_audio_tokens
    prefix = model.prefix(**without_labels(batch))
    assert prefix.shape == (2, 2 * tokens + 2 + 24, model.config.text_config.hidden_size)
    output = model(**batch)
    assert output.logits.shape == (*batch["labels"].shape, model.config.text_config.vocab_size)
    assert model(**without_labels(batch)).logits.shape[1] == 1


def test_stored_features_give_same_logits_as_spectrograms(model: MellowForConditionalGeneration, batch: dict):
    encoded = model.audio_encoder(batch["input_features"].flatten(0, 1))
    stored = model(
        batch["input_ids"],
        audio_frames=encoded.frames.unflatten(0, (2, 2)),
        audio_latent=encoded.latent.unflatten(0, (2, 2)),
        labels=batch["labels"],
    )
    torch.testing.assert_close(stored.logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_missing_audio_raises(model: MellowForConditionalGeneration, batch: dict):
    with pytest.raises(ValueError, match=r"input_features.*audio_frames"):
        model(batch["input_ids"])


def test_generate_is_greedy(model: MellowForConditionalGeneration, batch: dict):
    inputs = without_labels(batch)
    tokens = model.generate(**inputs, max_new_tokens=4, eos_token_id=-1)
    # The same tokens fed back as labels must each be the arg max at their position: cache and positions agree.
    assert (model(**inputs, labels=tokens).logits.argmax(-1) == tokens).all()


def test_loss_ignores_padding_and_decreases(model: MellowForConditionalGeneration, batch: dict):
    longer = torch.nn.functional.pad(batch["labels"], (0, 5), value=-100)
    torch.testing.assert_close(model(**batch | {"labels": longer}).loss, model(**batch).loss)
    learner = MellowForConditionalGeneration(model.config).freeze_encoder()
    encoder = {name: value.clone() for name, value in learner.audio_encoder.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], 3e-3)
    learner.train()
    assert not learner.audio_encoder.training
    losses = []
    for _ in range(30):
        loss = learner(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(value, encoder[name]) for name, value in learner.audio_encoder.state_dict().items())


def test_auto_classes_load_saved_model(model, processor, batch: dict, tmp_path: Path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, loaded_processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=0, rtol=0)
    assert loaded_processor.prompt_ids(TEXTS[0]) == processor.prompt_ids(TEXTS[0])
    assert loaded_processor.feature_extractor.hop_length == 1280
    weight = loaded.language_model.lm_head.weight
    assert weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("rule", ["pad", "repeat"])
def test_short_clip_padding(rule: str):
    extractor = MellowFeatureExtractor(short_clip=rule)
    fitted = extractor.spectrogram.fit(np.ones(100_000, np.float32))
    assert len(fitted) == 320_000
    assert fitted[200_000] == (1.0 if rule == "repeat" else 0.0)
    assert extractor.spectrogram(fitted[None]).shape == (1, 1001, 64)


def test_front_end_matches_librosa_on_tone():
    extractor = MellowFeatureExtractor()
    time = np.arange(320_000) / 32_000
    spectrogram = extractor(np.sin(2 * np.pi * 1000 * time).astype(np.float32))["input_features"][0]
    # A full-scale sine has power (N/4)^2 at its bin with a Hann window of N; Slaney's norm scales its band.
    band = int(spectrogram[500].argmax())
    peak = 10 * np.log10(256.0**2 * extractor.spectrogram.filters[32, band])
    assert float(spectrogram[500, band]) == pytest.approx(peak, abs=2.0)


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros((2, 100)), None, "average the channels"),
        (np.zeros(0), None, "0 samples"),
        (np.zeros(100), 16_000, "16000 Hz.*32000 Hz"),
    ],
)
def test_invalid_waveform_raises(waveform: np.ndarray, rate: int | None, message: str):
    with pytest.raises(ValueError, match=message):
        MellowFeatureExtractor()([waveform], sampling_rate=rate)


def test_three_clips_raise(processor: MellowProcessor):
    clip = np.zeros(1000, np.float32)
    with pytest.raises(ValueError, match="question 0 has 3 clips"):
        processor(audio=[[clip] * 3], text=["what?"])


def test_prompts_are_lower_cased_terminated_and_padded(processor: MellowProcessor):
    ids = processor.prompt_ids("A LOUD tone")
    tokenizer = processor.tokenizer
    assert len(ids) == 24
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a loud tone"
    assert tokenizer.eos_token_id in ids
    assert ids[-1] == tokenizer.pad_token_id
    assert len(processor.prompt_ids("tone " * 100)) == 24


def with_rules(processor: MellowProcessor, **rules) -> MellowProcessor:
    """Return the processor with other options, saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        MellowProcessor(processor.feature_extractor, processor.tokenizer, prompt_length=24, **rules).save_pretrained(
            folder
        )
        return AutoProcessor.from_pretrained(folder)


def test_unpadded_prompts_keep_length(processor: MellowProcessor):
    unpadded = with_rules(processor, pad_prompt=False)
    ids = unpadded.prompt_ids("a loud tone")
    assert ids == processor.token_ids("a loud tone")
    assert len(unpadded.prompt_ids("tone " * 100)) == 24
    clip = np.zeros(1000, np.float32)
    assert unpadded([[clip]] * 2, ["a loud tone", "A loud tone"])["input_ids"].shape == (2, len(ids))
    with pytest.raises(ValueError, match=rf"prompts of {len(ids)}, \d+ tokens"):
        unpadded([[clip]] * 2, ["a loud tone", "which of these is heard?"])


def test_prompt_end_marker_is_optional(processor: MellowProcessor):
    unmarked = with_rules(processor, prompt_end_marker=False)
    ids = unmarked.prompt_ids("A loud tone ")
    assert unmarked.tokenizer.eos_token_id not in ids
    length = ids.index(unmarked.tokenizer.pad_token_id)
    assert ids[:length] == unmarked.tokenizer("a loud tone")["input_ids"]
    assert len(ids) == 24
    # Answers end all the same.
    assert unmarked.answer_ids("a tone")[-1] == unmarked.tokenizer.eos_token_id


@pytest.mark.parametrize("partner", ["same", "silence", "random"])
def test_single_clip_gets_partner(partner: str, processor: MellowProcessor):
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 0.1, (2, 50_000)).astype(np.float32)
    features = with_rules(processor, partner=partner)([[first], [first, second]], TEXTS[:2])["input_features"]
    silence = processor.feature_extractor(np.zeros(1, np.float32))["input_features"][0]
    # There is no corpus to draw from: a random partner is the clip itself, and the answer deterministic.
    assert torch.equal(features[0, 1], silence if partner == "silence" else features[0, 0])
    assert torch.equal(features[1, 1], processor.feature_extractor(second)["input_features"][0])


def test_unknown_partner_raises(processor: MellowProcessor):
    with pytest.raises(ValueError, match="partner 'any' is not one of random, same, silence"):
        MellowProcessor(processor.feature_extractor, processor.tokenizer, partner="any")  # type: ignore[arg-type]


def test_padding_token_inside_answer_is_a_label(processor: MellowProcessor):
    padding = processor.tokenizer.pad_token_id
    assert pad_labels([[5, padding, 0], [5]]).tolist() == [[5, padding, 0], [5, -100, -100]]


def test_tiny_tokenizer_encodes_any_text(processor: MellowProcessor):
    text = "naïve 音 ¿?"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_gguf_file_gives_published_decoder_and_tokenizer(smollm2_gguf: str):
    decoder, tokenizer = load_decoder(smollm2_gguf), load_tokenizer(smollm2_gguf)
    config = MellowConfig.from_size("mellow-v0", text_config=decoder.config)
    model = MellowForConditionalGeneration(config)
    model.language_model.load_state_dict(decoder.state_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) == 165_937_495
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 17)
    assert (config.eos_token_id, config.pad_token_id) == (0, 17)
    # A language model, not noise: it continues a sentence as English does.
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(decoder(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_missing_gguf_file_raises():
    with pytest.raises(FileNotFoundError, match=r"/nowhere/model\.gguf"):
        load_decoder("/nowhere/model.gguf")
