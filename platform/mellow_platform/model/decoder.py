"""Where the decoder's weights and tokenizer come from: a hub name, a local or s3:// folder, or a GGUF file."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mellow_platform import storage

# Mellow ends answers with token 0 and pads with `!`, whichever SmolLM2 the weights come from.
END_TOKEN, PADDING_TOKEN = "<|endoftext|>", "!"


def _source(decoder: str) -> tuple[str, dict[str, str]]:
    """Return the arguments of `from_pretrained` for `decoder`."""
    if decoder.endswith(".gguf"):
        path = Path(decoder)
        if not path.is_file():
            raise FileNotFoundError(f"{decoder}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if "://" in decoder or decoder.startswith(("/", ".")):
        return str(storage.local_copy(decoder)), {}
    return decoder, {}


def load_decoder(decoder: str) -> PreTrainedModel:
    """Return the causal language model `decoder` in float32, with Mellow's end and padding tokens."""
    name, options = _source(decoder)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", **options)
    tokenizer = load_tokenizer(decoder)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model


def load_tokenizer(decoder: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to `decoder`.

    Raises:
        ValueError: it lacks the end token that Mellow closes prompts and answers with.
    """
    name, options = _source(decoder)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.convert_tokens_to_ids(END_TOKEN) is None:
        raise ValueError(f"the tokenizer of {decoder} has no token {END_TOKEN}: Mellow needs a SmolLM2 tokenizer")
    tokenizer.eos_token = tokenizer.bos_token = END_TOKEN
    if "<|pad|>" not in tokenizer.get_vocab():
        tokenizer.pad_token = PADDING_TOKEN
    return tokenizer
