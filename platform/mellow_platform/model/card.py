"""Model cards (README.md) of model folders, and upload of a folder to a model hub."""

from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError

from mellow_platform import storage
from mellow_platform.markdown import markdown_table
from mellow_platform.model.modeling_mellow import MellowForConditionalGeneration
from mellow_platform.model.processing_mellow import MellowProcessor

CARD = "README.md"

TEMPLATE = """\
---
{metadata}
---

# Mellow

An audio language model: its input is one or two audio clips and a question, its output the answer in text, after
[Mellow: a small audio language model for reasoning](https://arxiv.org/abs/2503.08540).

## Usage

In the model folder, with the library `mellow-platform` installed and a recording `clip.wav`:

```python
from pathlib import Path

from mellow_platform.data.audio import decode
from mellow_platform.model.folder import load_model

model, processor = load_model(".")
clip = decode(Path("clip.wav").read_bytes(), sampling_rate={sampling_rate})
inputs = processor(audio=[[clip]], text=["caption the audio."])
print(processor.decode_answers(model.generate(**inputs))[0])
```

For a question about two clips, pass both: `audio=[[first, second]]`.

## Sizes

| | |
|---|---:|
| parameters | {parameters:,} |
| decoder ({decoder}) | {decoder_parameters:,} |
| audio encoder ({encoder}) | {encoder_parameters:,} |
| projection | {projection_parameters:,} |
| audio tokens per clip | {audio_tokens} |
| prompt, in tokens | {prompt} |
| answer in training, in tokens | {answer_length} |

## Training data

{training_data}

## Scores

{scores}

## Limits

- The input is {seconds:g} s of mono audio at {sampling_rate:,} Hz per clip. A longer clip is cut to its first
  {seconds:g} s; a shorter one is filled by the rule `{short_clip}`.
- A question is cut after {prompt_length} tokens, end marker included.
- The model knows the sounds and question types of its training data. It answers every question, even if the clip does
  not contain the answer, and gives no confidence: check answers before anything depends on them.

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
    """Return the model card of a model and its processor.

    Args:
        license: license of the weights, as identified on the Hugging Face hub (`apache-2.0`, `unknown`, ...).
        training_data: description of the training data, in Markdown.
        report: content of the `report.json` of `jobs/evaluate.py`.

    Raises:
        ValueError: `report` is not an evaluation report.
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
    padding = "always padded to this length" if processor.pad_prompt else "or fewer"
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
    """Return the main scores of an evaluation report as Markdown, one row per benchmark and question family.

    Raises:
        ValueError: `benchmarks`, `conditions`, `records` or `split` is missing.
    """
    missing = [name for name in ("records", "split", "conditions", "benchmarks") if name not in report]
    if missing:
        raise ValueError(f"the report has no {', '.join(missing)}; pass the report.json of jobs/evaluate.py")
    rows = []
    for name, summary in report["benchmarks"].items():
        if "scores" not in summary:
            continue  # reference answers are not public
        main = summary["main"]
        scores = [(name, {condition: values[main] for condition, values in summary["scores"].items()})]
        scores += [(family, group["scores"]) for family, group in summary["groups"].get("family", {}).items()]
        rows += [
            [label, main, *(f"{values[condition]['value']:.3f}" for condition in report["conditions"])]
            for label, values in scores
        ]
    table = markdown_table(["questions", "score", *report["conditions"]], rows, text_columns=2)
    return f"On {report['records']:,} questions of the split {report['split']}:\n\n{table}"


def push(folder: str, repository: str, private: bool = False) -> str:
    """Upload a model folder to the Hugging Face hub and return the URL of the commit.

    Endpoint and token are huggingface_hub's (`HF_ENDPOINT`, `HF_TOKEN` or a stored login).

    Args:
        folder: path or s3:// URI.
        repository: `owner/name`; created if it does not exist.
        private: create a private repository.

    Raises:
        FileNotFoundError: `folder` does not exist.
        ValueError: `folder` contains no model, or `repository` is not a valid name.
        ConnectionError: the hub is unreachable or rejects the upload.
    """
    local = storage.local_copy(folder)
    if not (local / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; pass a model folder")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=local, commit_message="Upload the model"))
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is not a repository name of the form owner/name: {error}") from error
    except (HTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        raise ConnectionError(
            f"{folder} cannot be pushed to {repository} at {api.endpoint}: {error}; "
            "check the name, HF_ENDPOINT, and the token in HF_TOKEN"
        ) from error
