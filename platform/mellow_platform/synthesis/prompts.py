"""What a language model is told: a file for each kind of request, in `prompts/` or a folder of the user's."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import jinja2
import jinja2.sandbox

from mellow_platform import storage
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.schemas import ASPECTS, CHOICES

FOLDER = Path(__file__).with_name("prompts")


class Prompts:
    """The texts of prompts by kind, and what they become for a request.

    A text is a Jinja template that sees `captions` (texts), `pairs` (how many questions are wanted, or judged),
    `choices` (of a question), `aspects` (names, in an order that each request has of its own: the last ones of a fixed
    order would be asked about least) and, in a check, `questions`.
    """

    def __init__(self, texts: dict[str, str]):
        self.texts = texts
        # A prompt is text for a model: nothing in it is escaped, and it can reach nothing but what it is given.
        environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        self.templates = {kind: environment.from_string(text) for kind, text in texts.items()}

    def __reduce__(self) -> tuple[type["Prompts"], tuple[dict[str, str]]]:
        """Actors are sent the texts: compiled templates cannot be."""
        return Prompts, (self.texts,)

    @classmethod
    def read(cls, kinds: Sequence[str], folder: str | None) -> "Prompts":
        """Read the prompts of `kinds` from a folder; those that it lacks are the default ones.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder holds none of these files, or one is no template; the message names it.
        """
        texts = {kind: (FOLDER / f"{kind}.md").read_text() for kind in kinds}
        if folder:
            own = {f"{kind}.md" for kind in kinds} & {name for name, _ in storage.find(folder)}
            if not own:
                raise ValueError(f"{folder} holds none of {', '.join(f'{kind}.md' for kind in kinds)}")
            texts |= {name.removesuffix(".md"): storage.read_bytes(f"{folder}/{name}").decode() for name in own}
        try:
            return cls(texts)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"a prompt in {folder} is no template: line {error.lineno}: {error.message}") from error

    def digest(self, kinds: Sequence[str]) -> str:
        """Return the SHA-256 over the texts of some kinds: an edited prompt gets other answers."""
        return hashlib.sha256(repr([(kind, self.texts[kind]) for kind in sorted(kinds)]).encode()).hexdigest()

    def render(self, request: WritingRequest) -> str:
        """Return the prompt of `request`.

        Raises:
            ValueError: the template asks for what there is not.
        """
        try:
            return self.templates[request.kind].render(
                pairs=request.pairs, choices=CHOICES, aspects=_aspects(request), **request.material
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"prompt {request.kind}.md: {error}") from error


def _aspects(request: WritingRequest) -> list[str]:
    return random.Random(request.id).sample(ASPECTS, len(ASPECTS))
