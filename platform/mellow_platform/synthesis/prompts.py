"""Prompts of a language model: one template per kind of request, in `prompts/` or in a folder of the user."""

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
    """Prompt templates by kind.

    The variables of a Jinja template are `captions` (texts), `pairs` (number of questions to write or check), `choices`
    (number per question), `aspects` (names, shuffled per request: in a fixed order, models would write least about the
    last ones) and, in a check, `questions`.
    """

    def __init__(self, texts: dict[str, str]):
        self.texts = texts
        # Prompts are plain text, so nothing is escaped; the sandbox limits templates of users to their variables.
        environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        self.templates = {kind: environment.from_string(text) for kind, text in texts.items()}

    def __reduce__(self) -> tuple[type["Prompts"], tuple[dict[str, str]]]:
        """Pickle the texts for actors: compiled templates cannot be pickled."""
        return Prompts, (self.texts,)

    @classmethod
    def read(cls, kinds: Sequence[str], folder: str | None) -> "Prompts":
        """Read the prompts of `kinds` from a folder; missing ones are the built-in prompts.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: the folder contains none of the files, or a template is malformed; the message has its line.
        """
        texts = {kind: (FOLDER / f"{kind}.md").read_text() for kind in kinds}
        if folder:
            names = {f"{kind}.md" for kind in kinds} & {name for name, _ in storage.find(folder)}
            if not names:
                raise ValueError(f"{folder} contains none of {', '.join(f'{kind}.md' for kind in kinds)}")
            texts |= {name.removesuffix(".md"): storage.read_bytes(f"{folder}/{name}").decode() for name in names}
        try:
            return cls(texts)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"malformed template in {folder}: line {error.lineno}: {error.message}") from error

    def digest(self, kinds: Sequence[str]) -> str:
        """Return the SHA-256 of the prompts of `kinds`."""
        return hashlib.sha256(repr([(kind, self.texts[kind]) for kind in sorted(kinds)]).encode()).hexdigest()

    def render(self, request: WritingRequest) -> str:
        """Return the prompt of `request`.

        Raises:
            ValueError: the template uses an unknown variable or an unsafe attribute.
        """
        try:
            return self.templates[request.kind].render(
                pairs=request.pairs, choices=CHOICES, aspects=_aspects(request), **request.material
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"prompt {request.kind}.md: {error}") from error


def _aspects(request: WritingRequest) -> list[str]:
    return random.Random(request.id).sample(ASPECTS, len(ASPECTS))
