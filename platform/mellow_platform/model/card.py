"""The model card (README.md) of a model folder, and the way of a folder to a model hub."""

from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError

from mellow_platform import storage
from mellow_platform.model.modeling_mellow import MellowForConditionalGeneration
from mellow_platform.model.processing_mellow import MellowProcessor

CARD = "README.md"

TEMPLATE = """\
---
{metadata}
---

# Mellow

An audio language model: it hears one or two clips, reads a question and writes the answer, after
[Mellow: a small audio language model for reasoning](https://arxiv.org/abs/2503.08540).

## How to ask it

In the folder of the model, with the library `mellow-platform` installed and a recording `clip.wav`:

```python
from pathlib import Path

from mellow_platform.data.audio import decode
from mellow_platform.model.folder import load_model

model, processor = load_model(".")
clip = decode(Path("clip.wav").read_bytes(), sampling_rate={sampling_rate})
inputs = processor(audio=[[clip]], text=["caption the audio."])
print(processor.decode_answers(model.generate(**inputs))[0])
```

For a question about two clips, give both: `audio=[[first, second]]`.

## Sizes

| | |
|---|---:|
| parameters | {parameters:,} |
| of these in the decoder ({decoder}) | {decoder_parameters:,} |
| in the audio encoder ({encoder}) | {encoder_parameters:,} |
| between the two | {projection_parameters:,} |
| audio tokens a clip | {audio_tokens} |
| prompt, in tokens | {prompt} |
| answer in training, in tokens | {answer_length} |

## Training data

{training_data}

## Scores

{scores}

## Limits

- It hears {seconds:g} s of mono sound at {sampling_rate:,} Hz a clip: of a longer clip the first {seconds:g} s, and a
  shorter one is filled by the rule `{short_clip}`.
- It reads at most {prompt_length} tokens of a question, end marker included; the rest is cut.
- It knows the sounds and kinds of question it was trained on. It answers any question, also where the right answer
  cannot be heard, and it does not say how sure it is: check answers before anything depends on them.

## Licence

{license}
"""


def model_card(
    model: MellowForConditionalGeneration,
    processor: MellowProcessor,
    *,
    license: str = "apache-2.0",
    training_data: str | None = None,
    report: dict[str, Any] | None = None,
) -> ModelCard:
    """Return the card of a model with its processor.

    Args:
        license: of the weights, by its identifier on the Hugging Face hub (`apache-2.0`, `unknown`, ...).
        training_data: what the model was trained on, in Markdown.
        report: what `jobs/evaluate.py` wrote to `report.json`.

    Raises:
        ValueError: `report` is no evaluation report.
    """
    metadata = ModelCardData(
        license=license,
        library_name="mellow-platform",
        pipeline_tag="audio-text-to-text",
        tags=["mellow", "audio", "audio-question-answering", "arxiv:2503.08540"],
    )
    total, decoder, encoder = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model, model.language_model, model.audio_encoder)
    )
    extractor = processor.feature_extractor
    padding = "always filled to this length" if processor.pad_prompt else "or fewer"
    return ModelCard(
        TEMPLATE.format(
            metadata=metadata.to_yaml(),
            parameters=total,
            decoder=model.config.text_config.model_type,
            decoder_parameters=decoder,
            encoder=model.config.audio_config.model_type,
            encoder_parameters=encoder,
            projection_parameters=total - decoder - encoder,
            audio_tokens=model.config.num_audio_tokens,
            prompt=f"{processor.prompt_length}, {padding}",
            prompt_length=processor.prompt_length,
            answer_length=processor.answer_length,
            training_data=training_data or "Not stated.",
            scores=score_table(report) if report else "Not measured yet.",
            sampling_rate=extractor.sampling_rate,
            seconds=extractor.clip_seconds,
            short_clip=extractor.short_clip,
            license=license,
        )
    )


def score_table(report: dict[str, Any]) -> str:
    """Return the main scores of an evaluation report, a row a benchmark and question family, as Markdown.

    Raises:
        ValueError: it has no `benchmarks`, `conditions`, `records` or `split`.
    """
    absent = [name for name in ("records", "split", "conditions", "benchmarks") if name not in report]
    if absent:
        raise ValueError(f"the report has no {', '.join(absent)}: give the report.json that jobs/evaluate.py wrote")
    conditions = report["conditions"]
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for name, summary in report["benchmarks"].items():
        if "scores" not in summary:
            continue  # right answers are not public
        main = summary["main"]
        rows.append((name, main, {condition: own[main] for condition, own in summary["scores"].items()}))
        rows += [(family, main, own["scores"]) for family, own in summary["groups"].get("family", {}).items()]
    lines = [
        f"On {report['records']:,} questions of the split {report['split']}:",
        "",
        f"| questions | score | {' | '.join(conditions)} |",
        f"|---|---|{'---:|' * len(conditions)}",
        *(
            f"| {name} | {score} | {' | '.join(format(values[each]['value'], '.3f') for each in conditions)} |"
            for name, score, values in rows
        ),
    ]
    return "\n".join(lines)


def push(folder: str, repository: str, private: bool = False) -> str:
    """Upload the model folder `folder` to the model hub and return the address of its commit.

    Endpoint and token are those of huggingface_hub (`HF_ENDPOINT`, `HF_TOKEN` or a stored login).

    Args:
        folder: path or s3:// URI.
        repository: `owner/name`; created where it does not exist.
        private: whether a repository that is created is private.

    Raises:
        FileNotFoundError: nothing is at `folder`.
        ValueError: `folder` holds no model.
        ConnectionError: the hub cannot be reached, or refuses.
    """
    local = storage.local_copy(folder)
    if not (local / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a model")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=local, commit_message="Upload the model"))
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no name of a repository, such as owner/name: {error}") from error
    except (HTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        raise ConnectionError(
            f"{folder} cannot be pushed to {repository} at {api.endpoint}: {error}; "
            "check the name, HF_ENDPOINT, and the token in HF_TOKEN"
        ) from error
