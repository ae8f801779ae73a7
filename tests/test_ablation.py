"""Ablations: their points, the data and weights that these are about, and a grid from end to end."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mellow_platform.config import PreprocessConfig, TrainConfig
from mellow_platform.data.shards import read_records
from mellow_platform.features.preprocess import preprocess
from mellow_platform.model import HTSATEncoder, encoder_config
from mellow_platform.model.configuration_mellow import tiny_decoder_config
from mellow_platform.model.folder import load_processor, save_pretrained
from mellow_platform.training.finetune import build_model, load_examples
from tests.conftest import write_corpus


@pytest.fixture(scope="module")
def made(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A corpus of a few scenes, an encoder, a decoder with the corpus's tokenizer, and the shards of all three."""
    root = tmp_path_factory.mktemp("ablation")
    write_corpus(str(root / "corpus"), {"train": 6, "val": 2, "test": 1})
    torch.manual_seed(0)
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")).eval(), str(root / "encoder"))
    data = {"corpus": str(root / "corpus"), "size": "mellow-tiny", "encoder": str(root / "encoder")}
    preprocess(PreprocessConfig(**data, output=str(root / "features"), features="encoder"))
    tokenizer = load_processor(str(root / "features/processor")).tokenizer
    decoder = transformers.LlamaForCausalLM(tiny_decoder_config(len(tokenizer)))
    decoder.save_pretrained(root / "decoder")
    tokenizer.save_pretrained(root / "decoder")
    return SimpleNamespace(root=root, decoder=decoder)


def configured(made: SimpleNamespace, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "shards": str(made.root / "features"), "encoder": str(made.root / "encoder"), "size": "mellow-tiny",
        "storage": str(made.root / "runs"), "output": str(made.root / "model"), "run": "run",
    }  # fmt: skip
    return TrainConfig(**values | changes)


SYNTHETIC = ["Scenes-Detail", "Scenes-Heard-MCQ.json"]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_share_of_synthetic_questions_keeps_as_many_as_it_can(made, share):
    every = load_examples(configured(made))
    subtypes = np.array(read_records(str(made.root / "features"), "train")["subtype"].to_pylist())
    counts = Counter(subtype in ("Scenes-Detail", "Scenes-Heard-MCQ") for subtype in subtypes)
    chosen = load_examples(configured(made, synthetic_share=share, synthetic_subtypes=SYNTHETIC))
    places = np.array([int(name.removeprefix("train/")) for name in chosen.ids])
    synthetic = sum(subtype in ("Scenes-Detail", "Scenes-Heard-MCQ") for subtype in subtypes[places])
    assert len(set(places)) == len(chosen)
    assert abs(synthetic - share * len(chosen)) <= 0.5
    assert synthetic == counts[True] or len(chosen) - synthetic == counts[False]
    # What is left of the questions is what it was.
    numbers = np.arange(len(chosen))
    for name, array in every.collate(0, 0, places).items():
        assert np.array_equal(array, chosen.collate(0, 0, numbers)[name]), name


def test_the_seed_draws_the_synthetic_questions_and_validation_keeps_all(made):
    def names(**changes: Any) -> list[str]:
        return list(load_examples(configured(made, synthetic_share=0.2, synthetic_subtypes=SYNTHETIC, **changes)).ids)

    assert names() == names()
    assert names() != names(seed=1)
    config = configured(made, synthetic_share=0.2, synthetic_subtypes=SYNTHETIC)
    assert len(load_examples(config, "val")) == len(read_records(config.shards, "val"))


def test_a_share_that_cannot_be_reached_is_refused_with_what_there_is(made):
    with pytest.raises(
        ValueError, match=r"synthetic_share 0\.3 cannot be reached: 0 of .* Scenes-Detail, .*: set synth"
    ):
        load_examples(configured(made, synthetic_share=0.3))


def test_a_decoder_that_is_not_pretrained_has_the_shape_and_fresh_weights(made):
    processor = load_processor(str(made.root / "features/processor"))
    loaded, fresh, other = (
        build_model(configured(made, decoder=str(made.root / "decoder"), **changes), processor).language_model
        for changes in ({}, {"pretrained": False}, {"pretrained": False, "seed": 1})
    )
    assert loaded.config.to_dict() == fresh.config.to_dict()
    weights = made.decoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = fresh.state_dict()[name], other.state_dict()[name]
    assert not torch.equal(first, weights[name])
    assert not torch.equal(first, second)


def test_a_decoder_with_another_tokenizer_than_the_shards_is_refused(made, tmp_path):
    made.decoder.save_pretrained(tmp_path)
    tokenizer = load_processor(str(made.root / "features/processor")).tokenizer
    tokenizer.add_tokens(["mellow"])
    tokenizer.save_pretrained(tmp_path)
    processor = load_processor(str(made.root / "features/processor"))
    with pytest.raises(
        ValueError, match=r"was written with another tokenizer than that of .*: run jobs/preprocess.py wit"
    ):
        build_model(configured(made, decoder=str(tmp_path)), processor)


def test_fresh_weights_without_a_shape_are_refused(made):
    with pytest.raises(ValueError, match="pretrained: false goes with `decoder`"):
        configured(made, pretrained=False)
