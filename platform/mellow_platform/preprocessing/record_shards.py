"""Questions to shards of token ids and clip ids."""

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

# Published prompt and answer lengths, in tokens; lengths of a tokenizer trained on the corpus are measured.
PUBLISHED_LENGTHS = (129, 250)


def build_processor(
    config: PreprocessConfig, extractor: MellowFeatureExtractor, records: dict[str, pa.Table]
) -> MellowProcessor:
    """Return front end and tokenizer: of `decoder`, of the Mellow model in `encoder`, or trained on the questions.

    Raises:
        ValueError: the size has no tokenizer, and `decoder` is not set.
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
        raise ValueError(f"{config.size} has no tokenizer; set `decoder` to a hub name, folder or GGUF file")
    processor = MellowProcessor(
        extractor,
        tokenizer,
        *lengths,
        prompt_end_marker=config.prompt_end_marker,
        partner=config.partner,
    )
    if config.decoder or model:
        return processor
    # Padded positions of a prompt are attended to and take time, so prompts are only as long as the corpus needs.
    processor.prompt_length = min(PUBLISHED_LENGTHS[0], max(len(processor.token_ids(text)) for text in prompts) + 4)
    processor.answer_length = min(PUBLISHED_LENGTHS[1], max(len(processor.token_ids(text)) for text in answers) + 4)
    return processor


def with_clips(records: pa.Table, clip_ids: dict[str, str], partners: list[str], config: PreprocessConfig) -> pa.Table:
    """Return questions with columns `clip1` and `clip2`, the ids of their clips.

    Args:
        clip_ids: id of every clip by path, and of silence if the partner rule needs it.
        partners: sorted clip ids of the split, from which random partners are drawn.
    """
    first = [clip_ids[path] for path in records["filepath1"].to_pylist()]
    second = [
        second_clip(
            [clip, clip_ids[path]] if path else [clip],
            config.partner,
            silence=clip_ids.get(SILENCE, ""),
            random_clip=draw_partner(clip, position, partners),
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

    Uses a bounded number of plain tasks, because Ray Data would put all questions into the object store first.
    """
    kind = f"{shards.RECORDS}/{split}"
    done = read_receipts(config.output, kind)
    yield from done.values()
    if not ray.is_initialized():
        ray.init()  # Ray Data was not used if an earlier run wrote all clips
    write = ray.remote(**RETRY_LOST_WORKERS)(write_record_shard)
    tasks: list[ray.ObjectRef] = []
    max_tasks = config.decode_workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    # A split without questions has one empty shard.
    for name, rows in (part_ranges(len(records), config.records_per_shard) or {part_name(0): range(0)}).items():
        if name not in done:
            # Copied, because a slice would send the memory of the whole table.
            part = pa.Table.from_pylist(records.slice(rows.start, len(rows)).to_pylist(), schema=records.schema)
            tasks.append(write.remote(part, kind, name, processor, config.output))
        while len(tasks) >= max_tasks:
            (first,), tasks = ray.wait(tasks)
            yield ray.get(first)
    for reference in tasks:
        yield ray.get(reference)


def write_record_shard(
    records: pa.Table, kind: str, name: str, processor: MellowProcessor, output: str
) -> dict[str, Any]:
    """Tokenise and write one shard of questions, and return its receipt."""
    questions = [processor.question_ids(text) for text in records["input"].to_pylist()]
    prompts = [ids[: processor.prompt_length] for ids in questions]
    answers = [processor.answer_ids(text) for text in records["answer"].to_pylist()]
    table = records.append_column("prompt_ids", pa.array(prompts, pa.list_(pa.int32())))
    table = table.append_column("answer_ids", pa.array(answers, pa.list_(pa.int32())))
    families = Counter(subtype.removesuffix(".json") for subtype in records["subtype"].to_pylist())
    receipt = {
        "name": name,
        "records": len(table),
        "families": dict(sorted(families.items())),
        "prompt_tokens": _lengths(questions),
        "answer_tokens": _lengths([processor.token_ids(text) for text in records["answer"].to_pylist()]),
    }
    return write_part(output, kind, name, table.cast(shards.RECORD_SCHEMA), receipt)


def _lengths(sequences: list[list[int]]) -> dict[str, int]:
    """Return the number of sequences per length, before cutting."""
    return {str(length): count for length, count in sorted(Counter(map(len, sequences)).items())}
