"""The gate that a trained model passes before it is published: what was saved is what was trained."""

import torch

from mellow_platform.model import MellowForConditionalGeneration

Question = dict[str, torch.Tensor]  # what `generate` reads of one question


@torch.no_grad()
def greedy_answers(
    model: MellowForConditionalGeneration, questions: list[Question], max_new_tokens: int = 32
) -> list[list[int]]:
    """Return the tokens of the model's greedy answers."""
    device = next(model.parameters()).device
    return [
        model.generate(**{name: value.to(device) for name, value in question.items()}, max_new_tokens=max_new_tokens)[
            0
        ].tolist()
        for question in questions
    ]


def check_published(
    folder: str,
    trained: MellowForConditionalGeneration,
    questions: list[Question],
    answers: list[list[int]],
    like: torch.Tensor,
) -> None:
    """Make sure that the model in `folder`, loaded by transformers alone, is the trained one.

    Args:
        trained: the weights that were saved.
        questions: that the trainer was asked, in its engine.
        answers: what it said.
        like: a parameter of the trainer's; the saved model answers on its device and in its precision.

    Raises:
        RuntimeError: a name, a shape or a byte differs, or an answer does.
    """
    reloaded = MellowForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
    expected, found = trained.state_dict(), reloaded.state_dict()
    if names := expected.keys() ^ found.keys():
        raise RuntimeError(f"{folder} is not published: {', '.join(sorted(names)[:5])} stand on one side only")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise RuntimeError(
                f"{folder} is not published: {name} has shape {list(found[name].shape)}, trained {list(value.shape)}"
            )
        if not torch.equal(found[name], value):
            raise RuntimeError(f"{folder} is not published: {name} differs from what was trained")
    reloaded.to(like.device, like.dtype)
    for number, (said, before) in enumerate(zip(greedy_answers(reloaded, questions), answers, strict=True)):
        if said != before:
            raise RuntimeError(
                f"{folder} is not published: to question {number} the trainer answered {before}, the saved model {said}"
            )
