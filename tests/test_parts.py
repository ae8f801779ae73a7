"""Parts by name: every encoder, projection, decoder and adapter builds, trains, saves, loads and answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.configuration_utils import PreTrainedConfig

from mellow_platform.data.shards import Manifest
from mellow_platform.evaluation.benchmarks import BENCHMARKS
from mellow_platform.evaluation.evaluate_config import Benchmark
from mellow_platform.model import (
    ENCODERS,
    PROJECTIONS,
    MellowConfig,
    MellowFeatureExtractor,
    MellowForConditionalGeneration,
    encoder_config,
    load_encoder,
)
from mellow_platform.model.configuration_mellow import tiny_decoder_config
from mellow_platform.model.decoder import load_decoder, load_tokenizer
from mellow_platform.model.encoders import (
    Cnn14Config,
    Cnn14Encoder,
    FrontEnd,
    HTSATConfig,
    WhisperAudioConfig,
    build_encoder,
)
from mellow_platform.model.folder import load_model, load_processor, save_model, save_pretrained
from mellow_platform.model.tokenizer import train_tokenizer
from mellow_platform.option_values import Encoder, Projection, Tagger
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from mellow_platform.training.checkpoints import CheckpointStore
from mellow_platform.training.finetune import build_model, finetune
from mellow_platform.training.tagger import build_encoder as build_tagger
from mellow_platform.training.tagger import pretrain
from mellow_platform.training.tagger_config import TaggerConfig
from mellow_platform.training.train_config import TrainConfig
from tests.small_corpus import write_corpus

VOCABULARY = 300
LORA = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}


def gpt2_config(vocab_size: int = VOCABULARY) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.1,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def decoder_config(name: str) -> PreTrainedConfig:
    return {"llama": tiny_decoder_config, "gpt2": gpt2_config}[name](VOCABULARY)


def build(encoder: str, decoder: str, projection: str) -> MellowForConditionalGeneration:
    torch.manual_seed(0)
    return MellowForConditionalGeneration(
        MellowConfig.from_size(
            "mellow-tiny", encoder=encoder, projection=projection, text_config=decoder_config(decoder)
        )
    )


def make_batch(model: MellowForConditionalGeneration) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    extractor = MellowFeatureExtractor.for_encoder(model.config.audio_config)
    waveforms = 0.1 * torch.randn(2, extractor.clip_samples, generator=generator)
    features = extractor(list(waveforms.numpy()))["input_features"]
    return {
        "input_ids": torch.randint(2, VOCABULARY, (2, 6), generator=generator),
        "input_features": features[:, None].expand(-1, 2, -1, -1),
        "labels": torch.randint(2, VOCABULARY, (2, 4), generator=generator),
    }


def learn(model: MellowForConditionalGeneration, batch: dict[str, torch.Tensor], steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def check_round_trip(model: MellowForConditionalGeneration, batch: dict, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder).eval()
    assert (loaded.config.projection, loaded.config.lora) == (model.config.projection, model.config.lora)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    question = {name: value for name, value in batch.items() if name != "labels"}
    tokens = loaded.generate(**question, max_new_tokens=3, eos_token_id=-1)
    assert (loaded(**question, labels=tokens).logits.argmax(-1) == tokens).all()


def test_choices_match_registries():
    assert get_args(Encoder) == tuple(ENCODERS)
    assert get_args(Tagger) == tuple(name for name, (kind, _) in ENCODERS.items() if "labels" in kind().to_dict())
    assert get_args(Projection) == tuple(PROJECTIONS)
    assert get_args(Benchmark) == (*BENCHMARKS, "all", "noise")


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_combination_of_parts(encoder: str, decoder: str, projection: str, tmp_path: Path):
    model = build(encoder, decoder, projection).freeze_encoder()
    frozen = {name: value.clone() for name, value in model.audio_encoder.state_dict().items()}
    batch = make_batch(model)
    losses = learn(model, batch)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in model.audio_encoder.state_dict().items())
    check_round_trip(model, batch, tmp_path)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", ["mellow-v0", "mellow-tiny"])
def test_encoder_shapes_match_the_configuration(size: str, encoder: str):
    config = encoder_config(size, encoder=encoder)
    with torch.device("meta"):
        clips = torch.zeros(2, config.front_end.num_frames, config.front_end.feature_size)
        output = build_encoder(config).eval()(clips)
    assert output.frames.shape == (2, config.num_frames, config.frame_size)
    assert output.latent.shape == (2, config.hidden_size)
    assert (output.logits is None) if not config.num_classes else output.logits.shape == (2, config.num_classes)


@pytest.mark.parametrize(("encoder", "tokens"), [("htsat", 129), ("cnn14", 125), ("whisper", 126)])
def test_tokens_per_clip(encoder: str, tokens: int):
    assert MellowConfig.from_size("mellow-v0", encoder=encoder).num_audio_tokens == tokens


@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_decoder_trains_only_adapters_and_saves_them(decoder: str, tmp_path: Path):
    model = build("htsat", decoder, "mellow").freeze_encoder()
    batch = make_batch(model)
    with torch.no_grad():
        plain = model.eval()(**batch).logits
        model.add_lora(LORA)
        assert torch.equal(model.eval()(**batch).logits, plain)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = learn(model, batch)
    assert losses[-1] < losses[0]
    learned = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == 2 * (6 if decoder == "llama" else 2)
    assert adapters < learned
    assert all(name.startswith(("projection.", "frame_embedding.")) for name in learned - adapters)
    check_round_trip(model, batch, tmp_path)
    resumed = AutoModel.from_pretrained(tmp_path).freeze_encoder().freeze_decoder()
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained == [name for name, value in resumed.named_parameters() if value.requires_grad]


@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_merged_adapters_equal_a_plain_decoder(decoder: str, tmp_path: Path):
    model = build("htsat", decoder, "mellow").freeze_encoder()
    names = list(model.state_dict())
    batch = make_batch(model)
    model.add_lora(LORA)
    learn(model, batch)
    with torch.no_grad():
        adapted = model(**batch).logits
        merged = model.merge_lora()(**batch).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    assert model.config.lora is None
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.language_model.parameters())
    check_round_trip(model, batch, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_tied_if_the_decoders_is(tied: bool, tmp_path: Path):
    text = tiny_decoder_config(VOCABULARY)
    text.tie_word_embeddings = tied
    model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-tiny", text_config=text)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    assert torch.equal(head, model.get_output_embeddings().weight)
    assert ("language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


def test_second_adapters_are_refused():
    model = build("htsat", "llama", "linear").add_lora(LORA)
    with pytest.raises(ValueError, match="merge_lora"):
        model.add_lora(LORA)


def test_unknown_part_lists_the_valid_names():
    with pytest.raises(ValueError, match=r"projection 'conv'.*mellow, linear, mlp"):
        MellowConfig.from_size("mellow-tiny", projection="conv")
    with pytest.raises(ValueError, match=r"encoder 'beats'.*htsat, cnn14, whisper"):
        encoder_config("mellow-tiny", encoder="beats")
    with pytest.raises(ValueError, match=r"whisper.*tags"):
        encoder_config("mellow-tiny", ["tone"], encoder="whisper")


def test_folder_of_another_model_is_not_an_encoder(tmp_path: Path):
    GPT2LMHeadModel(gpt2_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2"):
        load_encoder(str(tmp_path))


def test_default_parts_of_old_folders():
    saved = MellowConfig.from_size("mellow-tiny").to_dict()
    loaded = MellowConfig(**{name: value for name, value in saved.items() if name not in ("projection", "lora")})
    assert (loaded.projection, loaded.lora) == ("mellow", None)
    assert loaded.audio_config.model_type == "mellow_htsat"


def test_htsat_front_ends():
    assert HTSATConfig().front_end == FrontEnd()
    assert HTSATConfig.tiny().front_end == FrontEnd(n_fft=2048, hop_length=1280)


def test_cnn14_weight_names_and_shapes():
    with torch.device("meta"):
        weights = Cnn14Encoder(Cnn14Config()).state_dict()
    assert weights["conv_block1.conv1.weight"].shape == (64, 1, 3, 3)
    assert weights["conv_block6.bn2.running_var"].shape == (2048,)
    assert weights["fc1.weight"].shape == (2048, 2048)
    assert weights["fc_audioset.bias"].shape == (527,)
    assert weights["bn0.weight"].shape == (64,)


def test_whisper_front_end_matches_transformers():
    time = np.arange(160_000) / 16_000
    rng = np.random.default_rng(0)
    waveform = (0.3 * np.sin(2 * np.pi * 440 * time) + rng.normal(0, 0.01, 160_000)).astype(np.float32)
    waveform[100_000:] = 0.0
    config = WhisperAudioConfig()
    spectrogram = MellowFeatureExtractor.for_encoder(config)(waveform, sampling_rate=16_000)["input_features"]
    ours = build_encoder(config).normalise(spectrogram)[0].numpy()
    theirs = WhisperFeatureExtractor(chunk_length=10)(waveform, sampling_rate=16_000)["input_features"][0]
    assert ours.shape == theirs.shape == (80, 1000)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_whisper_folder_loads_with_ten_second_positions(tmp_path: Path):
    torch.manual_seed(0)
    whole = WhisperModel(
        WhisperConfig(
            d_model=32,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=64,
        )
    ).eval()
    whole.save_pretrained(tmp_path / "whisper")
    encoder = load_encoder(str(tmp_path / "whisper")).eval()
    weights = encoder.whisper.state_dict()
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(weights[name], value[:500] if name == "embed_positions.weight" else value), name
    encoder.save_pretrained(tmp_path / "encoder")
    spectrogram = torch.randn(1, 1001, 80)
    assert torch.equal(load_encoder(str(tmp_path / "encoder")).eval()(spectrogram).frames, encoder(spectrogram).frames)


def test_whisper_frames_must_divide_positions():
    with pytest.raises(ValueError, match=r"num_frames 32\b.*\b500\b"):
        WhisperAudioConfig(num_frames=32)


@pytest.mark.parametrize(
    ("special", "vocabulary", "end", "padding"),
    [
        ({"eos_token": "<|im_end|>"}, ["<|endoftext|>", "!", "<|im_end|>"], "<|endoftext|>", "!"),
        ({"eos_token": "</s>"}, ["</s>", "!"], "</s>", "!"),
        ({"eos_token": "</s>", "pad_token": "<pad>"}, ["</s>", "<pad>"], "</s>", "<pad>"),
        ({"eos_token": "</s>"}, ["</s>"], "</s>", "</s>"),
        ({"eos_token": "</s>", "pad_token": "<|pad|>"}, ["</s>", "!", "<|pad|>"], "</s>", "<|pad|>"),
    ],
)
def test_end_and_padding_tokens(special: dict, vocabulary: list[str], end: str, padding: str, tmp_path: Path):
    save_tokenizer(tmp_path, vocabulary, special)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_token, tokenizer.pad_token) == (end, padding)


def test_tokenizer_needs_an_end_token(tmp_path: Path):
    save_tokenizer(tmp_path, ["!"], {})
    with pytest.raises(ValueError, match=r"<\|endoftext\|>.*eos_token"):
        load_tokenizer(str(tmp_path))


def save_tokenizer(folder: Path, vocabulary: list[str], special: dict[str, str]) -> None:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*vocabulary, "tone"])}, "tone"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def outputs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Shards and a trained Mellow with a Cnn14 encoder and a GPT-2 decoder."""
    root = tmp_path_factory.mktemp("parts")
    outputs = SimpleNamespace(root=root, run=lambda name: str(root / name))
    write_corpus(outputs.run("corpus"), {"train": 8, "val": 1, "test": 1})
    tokenizer = train_tokenizer(["which of these is heard? a) tone b) noise burst"], VOCABULARY)
    tokenizer.save_pretrained(outputs.run("gpt2"))
    torch.manual_seed(0)
    GPT2LMHeadModel(gpt2_config(len(tokenizer))).save_pretrained(outputs.run("gpt2"))
    cnn14 = build_encoder(encoder_config("mellow-tiny", encoder="cnn14"))
    save_pretrained(cnn14, outputs.run("encoder"))
    outputs.common = {"corpus": outputs.run("corpus"), "size": "mellow-tiny", "decoder": outputs.run("gpt2")}
    preprocess(
        PreprocessConfig(
            **outputs.common, output=outputs.run("features"), features="encoder", encoder=outputs.run("encoder"),
            encoder_workers=1,
        )
    )  # fmt: skip
    outputs.shared = {
        "storage": outputs.run("runs"), "size": "mellow-tiny", "batch": 4, "micro_batch": 4, "checkpoint_every": 2,
        "scaling": {"workers": 1},
    }  # fmt: skip
    outputs.train = TrainConfig(
        **outputs.shared, shards=outputs.run("features"), encoder=outputs.run("encoder"), decoder=outputs.run("gpt2"),
        output=outputs.run("model"), run="mellow", projection="mlp", learning_rate=1e-2, epochs=0.5,
        lora={"rank": 4, "alpha": 8, "dropout": 0.0},
    )  # fmt: skip
    outputs.result = finetune(outputs.train)
    return outputs


def run_losses(outputs: SimpleNamespace) -> list[float]:
    """Return the loss of every step so far."""
    return CheckpointStore(outputs.run("runs/mellow")).read_log()["loss"].to_pylist()


@pytest.mark.extended
def test_named_parts_in_every_job(outputs: SimpleNamespace):
    assert Manifest.read(outputs.run("features")).features == {"frames": [7, 256], "latent": [256]}
    losses = run_losses(outputs)
    assert len(losses) == outputs.result["total_steps"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_other_tagger_trains_and_encodes(outputs: SimpleNamespace):
    preprocess(PreprocessConfig(**outputs.common, output=outputs.run("log-mel"), encoder_name="cnn14"))
    config = TaggerConfig(
        **outputs.shared, shards=outputs.run("log-mel"), labels=outputs.run("corpus/labels.json"),
        output=outputs.run("tagger"), run="tagger", encoder_name="cnn14",
    )  # fmt: skip
    result = pretrain(config)
    assert result["step"] == result["total_steps"]
    output = outputs.run("tagged")
    preprocess(PreprocessConfig(**outputs.common, output=output, features="encoder", encoder=outputs.run("tagger")))
    spectrograms = FeatureStore.load(outputs.run("log-mel")).arrays["log_mel"]
    with torch.no_grad():
        frames = load_encoder(outputs.run("tagger")).eval()(torch.from_numpy(spectrograms).float()).frames
    np.testing.assert_allclose(FeatureStore.load(output).arrays["frames"], frames.numpy(), atol=5e-3, rtol=5e-3)


def test_training_adapters_keeps_the_decoder(outputs: SimpleNamespace):
    saved = load_file(Path(outputs.run("model")) / "model.safetensors")
    decoder = load_decoder(outputs.run("gpt2")).state_dict()
    layer = "transformer.h.0.attn.c_attn"
    assert torch.equal(saved[f"language_model.{layer}.base_layer.weight"], decoder[f"{layer}.weight"])
    assert saved[f"language_model.{layer}.lora_B.default.weight"].abs().max() > 0
    model, processor = load_model(outputs.run("model"))
    assert model.config.lora is None
    assert processor.tokenizer.eos_token_id == model.config.eos_token_id == model.config.separator_token_id
    difference = model.language_model.get_parameter(f"{layer}.weight") - decoder[f"{layer}.weight"]
    assert torch.linalg.matrix_rank(difference) <= 4


@pytest.mark.extended
def test_resume_with_adapters(outputs: SimpleNamespace):
    first = outputs.result["total_steps"]
    config = outputs.train.model_copy(update={"epochs": 0.7})
    result = finetune(config)
    assert result["step"] == result["total_steps"] > first
    # The frozen weights are still the decoder's, and the loss continues below the first.
    assert run_losses(outputs)[first] < run_losses(outputs)[0]
    saved = load_file(Path(outputs.run("model")) / "model.safetensors")
    decoder = load_decoder(outputs.run("gpt2")).state_dict()
    assert torch.equal(saved["language_model.transformer.wte.weight"], decoder["transformer.wte.weight"])


def test_init_from_with_and_without_adapters(outputs: SimpleNamespace):
    processor = load_processor(outputs.run("features/processor"))
    settings = outputs.train.model_copy(update={"encoder": None, "decoder": None, "init_from": outputs.run("model")})
    model = build_model(settings, processor)
    assert model.config.lora == settings.lora.peft_fields()
    trained = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"frame_embedding", "projection", "language_model"}
    save_model(model.merge_lora(), processor, outputs.run("merged"))
    plain = build_model(settings.model_copy(update={"init_from": outputs.run("merged")}), processor)
    assert plain.config.lora == settings.lora.peft_fields()
    with pytest.raises(ValueError, match=r"projection.*\bmlp\b.*\blinear\b"):
        build_model(settings.model_copy(update={"projection": "linear"}), processor)


def test_shards_of_other_encoder_are_refused(outputs: SimpleNamespace):
    processor = load_processor(outputs.run("features/processor"))
    for name, message in (
        ("htsat", r"'frames': \[7, 256\].*'frames': \[16, 64\]"),
        ("whisper", r"\bfeature_size 80\b.*\b64\b.*\bsampling_rate\b"),
    ):
        save_pretrained(build_encoder(encoder_config("mellow-tiny", encoder=name)), outputs.run(name))
        with pytest.raises(ValueError, match=message):
            build_model(outputs.train.model_copy(update={"encoder": outputs.run(name)}), processor)


@pytest.mark.parametrize("encoder", ["htsat", "cnn14"])
def test_tagger_refuses_shards_of_another_front_end(encoder: str, tmp_path: Path):
    Manifest({}, {}, {"size": "mellow-tiny", "encoder_name": "htsat"}).write(str(tmp_path))
    folders = {"shards": str(tmp_path), "labels": "/l", "output": "/o", "storage": "/s", "run": "r"}
    config = TaggerConfig(**folders, encoder_name=encoder, size="mellow-tiny")
    assert build_tagger(config, ["tone"]).config.labels == ["tone"]
    with pytest.raises(ValueError, match=rf"encoder {encoder}\b.*\bn_fft 1024\b.*\b2048\b"):
        build_tagger(config.model_copy(update={"size": "mellow-v0"}), ["tone"])


def test_front_end_differences():
    assert FrontEnd().differences(FrontEnd()) == ""
    assert FrontEnd().differences(FrontEnd(n_fft=512)) == "n_fft 1024 against 512"
