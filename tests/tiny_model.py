"""A Mellow model of the tiny size with random weights."""

import torch

from mellow_platform.model import MellowConfig, MellowFeatureExtractor, MellowForConditionalGeneration, MellowProcessor
from mellow_platform.model.folder import save_pretrained
from mellow_platform.model.tokenizer import train_tokenizer


def write_tiny_model(folder: str, seed: int = 0) -> None:
    """Write a tiny model with random weights to `folder`, with a tokenizer that knows a few words."""
    tokenizer = train_tokenizer(["which of these is heard? a) tone b) noise burst", "a loud tone"])
    processor = MellowProcessor(MellowFeatureExtractor.from_size("mellow-tiny"), tokenizer, prompt_length=24)
    torch.manual_seed(seed)
    model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-tiny", vocab_size=len(tokenizer)))
    for part in (model, processor):
        save_pretrained(part, folder)
