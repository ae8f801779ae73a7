"""Packing: loss and gradients of separate sequences, every example once per epoch, no padding."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

from mellow_platform.config import PartnerDraws, PreprocessConfig, ScalingSection, TrainConfig
from mellow_platform.data.audio import encode
from mellow_platform.data.shards import Manifest, read_records
from mellow_platform.model import HTSATEncoder, MellowConfig, MellowForConditionalGeneration, encoder_config
from mellow_platform.model.configuration_mellow import tiny_decoder_config
from mellow_platform.model.folder import load_processor, save_pretrained
from mellow_platform.preprocessing.preprocess_job import preprocess
from mellow_platform.training.batches import batches
from mellow_platform.training.checkpoints import CheckpointStore
from mellow_platform.training.examples import AnswerExamples, RecordNames, TokenTexts
from mellow_platform.training.finetune import finetune, load_examples
from mellow_platform.training.flops import ModelFlops
from mellow_platform.training.step_plan import StepPlan
from tests.conftest import write_corpus

VOCABULARY = 128
PAIR_INDEX = [0, 0, 0, 1, 2, 2]  # unequal numbers of questions per pair
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
                torch.nn.init.normal_(value, std=0.1)  # zero adapters would have zero gradients
    return model.train()


def load(shards: str, **options: Any) -> AnswerExamples:
    """Return the training examples of a run with these options."""
    return load_examples(
        TrainConfig(shards=shards, encoder="/none", storage="/none", output="/none", run="none", **options)
    )


def packed(model: MellowForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return six questions on three pairs of clips, with hidden padding after prompts and answers."""
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
    """Return one question of a packed batch, without padding."""
    pair = PAIR_INDEX[question]
    return {
        "input_ids": batch["input_ids"][question, None, : PROMPTS[question]],
        "labels": batch["labels"][question, None, : ANSWERS[question]],
        "audio_frames": batch["audio_frames"][pair, None],
        "audio_latent": batch["audio_latent"][pair, None],
    }


def plain_loss(model: MellowForConditionalGeneration, question: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed cross-entropy of an answer in a plain causal sequence, as transformers runs the decoder."""
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
def test_packed_gradients_equal_separate_sequences(decoder: str, lora: bool, checkpointing: bool):
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
def test_packed_logits_equal_separate_sequences(decoder: str):
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
def test_attention_mask_hides_prompt_padding():
    model = build("llama").eval()
    batch = packed(model)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)}
    assert torch.equal(model(**batch).loss, model(**other).loss)
    del batch["attention_mask"], other["attention_mask"]
    assert not torch.equal(model(**batch).loss, model(**other).loss)


@torch.no_grad()
def test_ignored_label_inside_answer_is_read_as_padding():
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


def test_packed_sequence_has_no_padding():
    model = build("llama")
    lengths = []
    model.language_model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: lengths.append(output.shape[:2])
    )
    model(**packed(model))
    prefix = 2 * model.config.num_audio_tokens + 2
    assert lengths == [(1, 3 * prefix + sum(PROMPTS) + sum(ANSWERS) - 6)]


@pytest.fixture(scope="module")
def shards(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of a small corpus with random partners."""
    root = tmp_path_factory.mktemp("packing")
    write_corpus(str(root / "corpus"), {"train": 6, "val": 2, "test": 1})
    preprocess(
        PreprocessConfig(
            corpus=str(root / "corpus"), output=str(root / "shards"), size="mellow-tiny", partner="random",
            clips_per_shard=4,
        )
    )  # fmt: skip
    return str(root / "shards")


def run_lengths(pairs: np.ndarray) -> list[int]:
    """Return the lengths of runs of equal rows."""
    edges = np.flatnonzero(np.append(True, (pairs[1:] != pairs[:-1]).any(axis=1)))
    return np.diff(np.append(edges, len(pairs))).tolist()


@pytest.mark.parametrize("questions_per_pack", [1, 4])
@pytest.mark.parametrize("partner_draws", ["stored", "clip", "question"])
def test_epoch_order_is_a_permutation(questions_per_pack: int, partner_draws: PartnerDraws, shards: str):
    examples = load(shards, questions_per_pack=questions_per_pack, partner_draws=partner_draws)
    orders = [examples.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert np.sort(order).tolist() == list(range(len(examples)))
    assert len({order.tobytes() for order in orders}) == 4
    again = load(shards, questions_per_pack=questions_per_pack, partner_draws=partner_draws)
    assert (again.order(1, 1) == orders[3]).all()


def test_epoch_order_does_not_depend_on_other_epochs(shards: str):
    examples = load(shards, questions_per_pack=4)
    first = examples.order(0, 0).tolist()
    for epoch in range(10):
        examples.order(0, epoch)
    assert examples.order(0, 0).tolist() == first


def test_questions_on_same_clips_are_packed(shards: str):
    examples = load(shards, questions_per_pack=4, partner_draws="clip")
    order = examples.order(0, 0)
    pairs = examples.pairs(0, 0, order)
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    # At most one prefix per pack of four; two packs of one pair may be adjacent.
    packs = sum(-(-count // 4) for count in counts)
    assert counts.max() > 4
    assert len(counts) < len(run_lengths(pairs)) <= packs
    numbers = order[:20]
    arrays = examples.collate(0, 0, numbers)
    lengths = run_lengths(pairs[:20])
    assert arrays["pair_index"].tolist() == np.repeat(range(len(lengths)), lengths).tolist()
    features = arrays["input_features"][arrays["pair_index"]]
    assert features.dtype == np.float16
    assert (features == examples.features["input_features"][pairs[:20]]).all()


def test_question_partners_differ_within_clip(shards: str):
    examples = load(shards, partner_draws="question")
    alone = np.flatnonzero(examples.single)
    pairs = examples.pairs(0, 0, alone)
    assert (pairs[:, 0] == examples.clips[alone, 0]).all() and (pairs[:, 0] != pairs[:, 1]).all()
    assert len(np.unique(pairs, axis=0)) > 2 * len(np.unique(pairs[:, 0]))
    assert (examples.pairs(0, 0, alone[5:9]) == pairs[5:9]).all()
    assert (examples.pairs(0, 1, alone) != pairs).any()


def test_clip_partner_is_fixed_per_epoch(shards: str):
    examples = load(shards, partner_draws="clip")
    everything = np.arange(len(examples))
    seen: dict[int, set[int]] = {}
    for epoch in range(8):
        pairs = examples.pairs(0, epoch, everything)
        assert (pairs[~examples.single] == examples.clips[~examples.single]).all()
        for clip in np.unique(pairs[examples.single, 0]):
            (partner,) = set(pairs[examples.single & (pairs[:, 0] == clip), 1])
            assert partner != clip
            seen.setdefault(clip, set()).add(partner)
    assert all(len(partners) > 1 for partners in seen.values())
    assert not examples.single.all()
    stored = load(shards)
    assert (stored.pairs(0, 5, everything) == stored.clips).all()


def test_partner_draws_need_shards_with_random_partners(shards: str, tmp_path: Path):
    manifest = Manifest.read(shards)
    manifest.configuration["partner"] = "same"
    manifest.write(str(tmp_path))
    shutil.copytree(f"{shards}/processor", tmp_path / "processor")
    with pytest.raises(ValueError, match=r"partner: same.*--partner random"):
        load(str(tmp_path), partner_draws="clip")


def test_prompts_are_padded_to_micro_batch(shards: str):
    processor = load_processor(f"{shards}/processor")
    records = read_records(shards, "train").to_pylist()
    wanted = [processor.question_ids(record["input"]) for record in records]
    numbers = load(shards).order(0, 0)[:6]
    longest = max(len(wanted[number]) for number in numbers)
    unseen = load(shards, pad_prompts=False).collate(0, 0, numbers)
    published = load(shards).collate(0, 0, numbers)
    assert unseen["input_ids"].shape == unseen["attention_mask"].shape == (6, longest)
    assert unseen["labels"].shape[1] == max(len(records[number]["answer_ids"]) for number in numbers)
    assert "attention_mask" not in published
    for row, number in enumerate(numbers):
        assert unseen["input_ids"][row][unseen["attention_mask"][row] == 1].tolist() == wanted[number]
        assert published["input_ids"][row].tolist() == processor.prompt_ids(records[number]["input"])
        labels = unseen["labels"][row]
        assert labels[labels >= 0].tolist() == records[number]["answer_ids"]


def test_ray_data_keeps_ragged_micro_batches(shards: str):
    examples = load(shards, questions_per_pack=4, pad_prompts=False, partner_draws="clip")
    plan = StepPlan(seed=3, count=len(examples), batch=16, micro_batch=8, workers=1)
    steps = list(batches(plan, ray.put(examples), 0, 0, plan.steps_per_epoch + 1))
    shapes = set()
    for step, turns in enumerate(steps):
        epoch, first, last = plan.stretch(step)
        order = examples.order(3, epoch)[first:last]
        assert sum(micro.counts for micro in turns) == -(-len(order) // 8)
        for turn, micro in enumerate(turns):
            if micro.counts:
                expected = examples.collate(3, epoch, order[turn * 8 : turn * 8 + 8])
                assert micro.arrays.keys() == expected.keys()
                for name, array in expected.items():
                    assert np.array_equal(micro.arrays[name].numpy(), array), name
            shapes.add(tuple(micro.arrays["input_features"].shape))
    assert len(shapes) > 1


def test_windows_of_long_recordings_change_per_epoch(cluster: None, tmp_path: Path):
    write_corpus(str(tmp_path / "corpus"), {"train": 3, "val": 1, "test": 1})
    longer = np.random.default_rng(0).uniform(-0.5, 0.5, 15 * 32_000).astype(np.float32)
    (tmp_path / "corpus/audio/train/000000.flac").write_bytes(encode(longer, 32_000))
    output = str(tmp_path / "shards")
    preprocess(
        PreprocessConfig(corpus=str(tmp_path / "corpus"), size="mellow-tiny", output=output, features="waveform")
    )
    examples = load(output)
    extractor = load_processor(f"{output}/processor").feature_extractor
    long = np.flatnonzero(
        [path.endswith("000000.flac") for path in read_records(output, "train")["filepath1"].to_pylist()]
    )

    def features(epoch: int, number: int) -> np.ndarray:
        return examples.collate(0, epoch, np.array([number]))["input_features"][0, 0]

    assert np.array_equal(features(0, long[0]), features(0, long[0]))
    assert not np.array_equal(features(0, long[0]), features(1, long[0]))
    assert not np.array_equal(features(0, long[0]), features(0, long[1]))
    whole = extractor.spectrogram(longer[None, :])[0].numpy()
    short = next(number for number in range(len(examples)) if number not in long)
    assert np.array_equal(features(0, short), features(1, short))
    assert features(0, short).shape == features(0, long[0]).shape < whole.shape


def test_order_of_million_questions_pickles_small():
    count, clips = 1_000_000, 50_000
    generator = np.random.default_rng(0)
    first = generator.integers(0, clips, count)
    texts = TokenTexts(np.zeros(count, np.int32), np.arange(count + 1))
    examples = AnswerExamples(
        name="million",
        ids=RecordNames("train", np.arange(count)),
        clips=np.stack([first, (first + 1) % clips], axis=1),
        single=generator.random(count) < 0.7,
        prompts=texts,
        answers=texts,
        features={"audio_latent": np.zeros((clips, 1), np.float16)},
        pad_token=0,
        questions_per_pack=8,
        partner_draws="clip",
    )
    order = examples.order(0, 0)
    assert (np.bincount(order, minlength=count) == 1).all()
    # A clip has about 14 single-clip questions and 6 with its neighbour, so packs of eight are mostly full.
    packs = run_lengths(examples.pairs(0, 0, order))
    assert count / len(packs) > 5
    assert len(pickle.dumps(examples, protocol=5, buffer_callback=lambda buffer: False)) < 10_000


@pytest.mark.parametrize(("decoder", "lora"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_model_flops_equal_flop_counter(decoder: str, lora: bool):
    model = build(decoder, lora)
    flops, batch = ModelFlops.from_model(model), packed(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    work = flops.work(batch)
    prefix = 2 * model.config.num_audio_tokens + 2
    assert work["tokens"] == work["useful_tokens"] == 3 * prefix + sum(PROMPTS) + sum(ANSWERS) - 6
    # torch counts no attention on a CPU; the first matrices need no gradient of their input.
    looks = 3 * prefix * (prefix + 1) / 2
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        length = prompt + answer - 1
        looks += length * prefix + length * (length + 1) / 2
    assert work["model_flops"] - looks * flops.attention == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_visible_padding_is_not_useful_work():
    model = build("llama")
    batch = packed(model)
    padding = model.config.pad_token_id
    batch["input_ids"] = batch["input_ids"].masked_fill(batch.pop("attention_mask") == 0, padding)
    work = ModelFlops.from_model(model).work(batch)
    assert work["tokens"] - work["useful_tokens"] == 6 * max(PROMPTS) - sum(PROMPTS)


@pytest.mark.extended
def test_packed_run_reports_throughput(shards: str, tmp_path: Path):
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")), str(tmp_path / "encoder"))
    config = TrainConfig(
        shards=shards, encoder=str(tmp_path / "encoder"), size="mellow-tiny", storage=str(tmp_path / "runs"),
        run="packs", output=str(tmp_path / "model"), epochs=1.0, batch=16, micro_batch=8, log_every=1,
        questions_per_pack=4, pad_prompts=False, partner_draws="clip", scaling=ScalingSection(workers=2),
    )  # fmt: skip
    result = finetune(config)
    assert result["step"] == result["total_steps"] > 2
    assert 0 < result["useful_tokens_per_second"] == pytest.approx(result["tokens_per_second"])
    assert 0 < result["model_flop_utilization"] < 1
    assert 0 <= result["data_wait_share"] < 1
    losses = CheckpointStore(result["run"]).read_log()["loss"].to_pylist()
    assert losses[-1] < losses[0]
    # The published processor treats prompts as in training.
    assert not load_processor(str(tmp_path / "model")).pad_prompt
