"""Loading of the decoder's weights and tokenizer from a hub name, a local or s3:// folder, or a GGUF file."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mellow_platform import storage
from mellow_platform.extras import require

# Mellow ends answers with `<|endoftext|>` and pads with `!` for every SmolLM2 (the Instruct version has another end
# token). Tokenizers without these tokens keep their own.
END_TOKEN, PADDING_TOKEN = "<|endoftext|>", "!"


def _source(decoder: str) -> tuple[str, dict[str, str]]:
    """Return the arguments of `from_pretrained` for `decoder`."""
    if decoder.endswith(".gguf"):
        require("gguf", extra="gguf")
        path = Path(decoder)
        if not path.is_file():
            raise FileNotFoundError(f"{decoder}: GGUF file not found")
        return str(path.parent), {"gguf_file": path.name}
    if "://" in decoder or decoder.startswith(("/", ".")):
        return str(storage.local_copy(decoder)), {}
    return decoder, {}


def load_decoder(decoder: str) -> PreTrainedModel:
    """Load the causal language model `decoder` in float32, with Mellow's end and padding tokens."""
    name, options = _source(decoder)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", **options)
    for config in (model.config, model.generation_config):
        _set_tokens(config, decoder)
    return model


def load_decoder_config(decoder: str) -> PreTrainedConfig:
    """Load only the configuration of a decoder, as `load_decoder` would set it."""
    name, options = _source(decoder)
    config = AutoConfig.from_pretrained(name, **options)
    _set_tokens(config, decoder)
    return config


def _set_tokens(config: PreTrainedConfig | GenerationConfig, decoder: str) -> None:
    tokenizer = load_tokenizer(decoder)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def load_tokenizer(decoder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `decoder`.

    Raises:
        ValueError: the tokenizer has no end token for prompts and answers.
    """
    name, options = _source(decoder)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    tokens = tokenizer.get_vocab()
    if END_TOKEN in tokens:
        tokenizer.eos_token = tokenizer.bos_token = END_TOKEN
    elif tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {decoder} has neither an end token nor {END_TOKEN}; "
            "set eos_token in its tokenizer_config.json"
        )
    if PADDING_TOKEN in tokens and "<|pad|>" not in tokens:
        tokenizer.pad_token = PADDING_TOKEN
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
