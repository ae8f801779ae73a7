"""Check of a saved model against the trained one, before it is published."""

import torch

from mellow_platform.model import MellowForConditionalGeneration

Question = dict[str, torch.Tensor]  # arguments of `generate` for one question


@torch.no_grad()
def greedy_answers(
    model: MellowForConditionalGeneration, questions: list[Question], max_new_tokens: int = 32
) -> list[list[int]]:
    """Return the token ids of the model's greedy answers."""
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
    """Check that the model in `folder`, loaded with only transformers, equals the trained one.

    Args:
        trained: model with the weights that were saved.
        questions: questions to both models.
        answers: token ids of the answers from the training engine.
        like: parameter of the training engine; the saved model answers on its device and in its precision.

    Raises:
        RuntimeError: a name, shape, value or answer differs.
    """
    reloaded = MellowForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
    expected, found = trained.state_dict(), reloaded.state_dict()
    if names := expected.keys() ^ found.keys():
        raise RuntimeError(f"{folder} is not published: only one model has {', '.join(sorted(names)[:5])}")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise RuntimeError(
                f"{folder} is not published: {name} has shape {list(found[name].shape)}, trained {list(value.shape)}"
            )
        if not torch.equal(found[name], value):
            raise RuntimeError(f"{folder} is not published: {name} differs from the trained values")
    reloaded.to(like.device, like.dtype)
    for number, (answer, trained_answer) in enumerate(zip(greedy_answers(reloaded, questions), answers, strict=True)):
        if answer != trained_answer:
            raise RuntimeError(
                f"{folder} is not published: question {number} has the tokens {answer} as its answer, and "
                f"{trained_answer} from the training engine"
            )
