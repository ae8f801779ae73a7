"""From questions to shards of token ids that name their clips by content."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray

from mellow_platform.data import shards
from mellow_platform.data.partners import SILENCE, draw_partner, second_clip
from mellow_platform.model import MellowFeatureExtractor, MellowProcessor, holds_model
from mellow_platform.model.decoder import load_tokenizer
from mellow_platform.model.folder import load_processor
from mellow_platform.model.tokenizer import train_tokenizer
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.resumable import RETRY_LOST_WORKERS, part_name, part_ranges, read_receipts, write_part

# Prompt and answer lengths in tokens, as published; a tokenizer of the corpus's own is measured on the corpus.
PUBLISHED_LENGTHS = (129, 250)


def build_processor(
    config: PreprocessConfig, extractor: MellowFeatureExtractor, records: dict[str, pa.Table]
) -> MellowProcessor:
    """Return front end and tokenizer: the decoder's, that of the Mellow in `encoder`, or one trained on the questions.

    Raises:
        ValueError: the size has no tokenizer of its own and none is given.
    """
    training = records["train"] if len(records.get("train", ())) else pa.concat_tables(records.values())
    prompts, answers = training["input"].to_pylist(), training["answer"].to_pylist()
    lengths, model = PUBLISHED_LENGTHS, None
    if config.decoder:
        tokenizer = load_tokenizer(config.decoder)
    elif config.encoder and holds_model(config.encoder):
        model = load_processor(config.encoder)
        tokenizer, lengths = model.tokenizer, (model.prompt_length, model.answer_length)
    elif config.size == "mellow-tiny":
        texts = [text for pair in zip(prompts, answers, strict=True) for text in pair]
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        raise ValueError(f"{config.size} has no tokenizer of its own: set `decoder` to a hub name, folder or GGUF file")
    processor = MellowProcessor(
        extractor,
        tokenizer,
        *lengths,
        prompt_end_marker=config.prompt_end_marker,
        partner=config.partner,
    )
    if config.decoder or model:
        return processor
    # Every padded position of a prompt is seen and paid for, so prompts are as long as the corpus needs.
    processor.prompt_length = min(PUBLISHED_LENGTHS[0], max(len(processor.token_ids(text)) for text in prompts) + 4)
    processor.answer_length = min(PUBLISHED_LENGTHS[1], max(len(processor.token_ids(text)) for text in answers) + 4)
    return processor


def with_clips(records: pa.Table, clip_ids: dict[str, str], own: list[str], config: PreprocessConfig) -> pa.Table:
    """Return questions with the clips `clip1` and `clip2` that they are asked about, by content.

    Args:
        clip_ids: of every clip by its path, and of silence where the partner rule asks for it.
        own: clip ids of the split, sorted, that a random partner is drawn from.
    """
    first = [clip_ids[path] for path in records["filepath1"].to_pylist()]
    second = [
        second_clip(
            [clip, clip_ids[path]] if path else [clip],
            config.partner,
            silence=clip_ids.get(SILENCE, ""),
            drawn=draw_partner(clip, position, own),
        )
        for position, (clip, path) in enumerate(zip(first, records["filepath2"].to_pylist(), strict=True))
    ]
    return records.append_column("clip1", pa.array(first, pa.string())).append_column(
        "clip2", pa.array(second, pa.string())
    )


def write_record_shards(
    records: pa.Table, split: str, processor: MellowProcessor, config: PreprocessConfig
) -> Iterator[dict[str, Any]]:
    """Tokenise and write the questions of a split (`with_clips`), and yield the receipts of all its shards.

    Plain tasks with a bounded number under way, where Ray Data would put all questions into the object store first.
    """
    kind = f"{shards.RECORDS}/{split}"
    done = read_receipts(config.output, kind)
    yield from done.values()
    if not ray.is_initialized():
        ray.init()  # as Ray Data does by itself; the clips may have been done by an earlier run
    write = ray.remote(**RETRY_LOST_WORKERS)(write_record_shard)
    under_way: list[ray.ObjectRef] = []
    most = config.decode_workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    # A split without questions has one empty shard.
    for name, rows in (part_ranges(len(records), config.records_per_shard) or {part_name(0): range(0)}).items():
        if name not in done:
            # A slice shares the memory of the whole table; only its copy is sent.
            part = pa.Table.from_pylist(records.slice(rows.start, len(rows)).to_pylist(), schema=records.schema)
            under_way.append(write.remote(part, kind, name, processor, config.output))
        while len(under_way) >= most:
            (first,), under_way = ray.wait(under_way)
            yield ray.get(first)
    for reference in under_way:
        yield ray.get(reference)


def write_record_shard(
    records: pa.Table, kind: str, name: str, processor: MellowProcessor, output: str
) -> dict[str, Any]:
    """Tokenise and write one shard of questions, and return its receipt."""
    asked = [processor.question_ids(text) for text in records["input"].to_pylist()]
    prompts = [ids[: processor.prompt_length] for ids in asked]
    answers = [processor.answer_ids(text) for text in records["answer"].to_pylist()]
    table = records.append_column("prompt_ids", pa.array(prompts, pa.list_(pa.int32())))
    table = table.append_column("answer_ids", pa.array(answers, pa.list_(pa.int32())))
    families = Counter(subtype.removesuffix(".json") for subtype in records["subtype"].to_pylist())
    receipt = {
        "name": name,
        "records": len(table),
        "families": dict(sorted(families.items())),
        "prompt_tokens": _lengths(asked),
        "answer_tokens": _lengths([processor.token_ids(text) for text in records["answer"].to_pylist()]),
    }
    return write_part(output, kind, name, table.cast(shards.RECORD_SCHEMA), receipt)


def _lengths(sequences: list[list[int]]) -> dict[str, int]:
    """Return how many sequences have each length, before any is cut."""
    return {str(length): count for length, count in sorted(Counter(map(len, sequences)).items())}
