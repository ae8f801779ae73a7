"""Questions about synthetic scenes, generated from their events: eleven families over the types of ReasonAQA."""

import numpy as np

from mellow_platform.data.records import Record, lettered
from mellow_platform.data.scenes import KINDS, PITCHES, SILENCE, Scene

TASK = "scenes"
COUNTS = ("none", "one", "two", "three")
VERDICTS = ("definitely true", "plausible", "definitely false")
# Claims that no clip proves or refutes: plausible if the sound is in the clip.
UNKNOWABLE = ("comes from a machine", "was made outdoors", "is part of a test", "is a signal to someone")
HEARD_MCQ_DRAWS = 3  # the hardest family, with four choices, is drawn more often


def _choose(rng: np.random.Generator, right: str, wrong: list[str], count: int) -> tuple[list[str], str]:
    """Return `count` lettered choices in random order and the lettered right one."""
    others = [str(item) for item in rng.permutation(wrong)[: count - 1]]
    order = [str(item) for item in rng.permutation([right, *others])]
    choices = lettered(order)
    return choices, choices[order.index(right)]


def caption_question(scene: Scene, path: str) -> Record:
    """Return the caption question of a clip, which has no random part."""
    return Record(TASK, path, "", scene.caption, "", "caption the audio.", scene.caption, "Scenes-Caption")


def single_clip_questions(scene: Scene, path: str, rng: np.random.Generator) -> list[Record]:
    """Draw questions of every family that applies to the clip."""
    records: list[Record] = []

    def add(family: str, question: str, answer: str, choices: list[str] | None = None) -> None:
        text = " ".join([question, *(choices or [])])
        records.append(Record(TASK, path, "", scene.caption, "", text, answer, f"Scenes-{family}"))

    kinds = [event.kind for event in scene.events]
    absent = [kind for kind in KINDS if kind not in kinds]

    wrong = [*absent, SILENCE] if kinds else absent
    for _ in range(HEARD_MCQ_DRAWS):
        target = str(rng.choice(kinds)) if kinds else SILENCE
        choices, answer = _choose(rng, target, wrong, 4)
        add("Heard-MCQ", "which of these is heard?", answer, choices)

    add("Count-MCQ", "how many sounds are heard?", lettered(COUNTS)[len(kinds)], lettered(COUNTS))

    present = bool(kinds) and rng.random() < 0.5
    kind = str(rng.choice(kinds if present else absent))
    add("Presence", f"is there a {kind} in the audio?", "yes" if present else "no")

    verdict = str(rng.choice(VERDICTS)) if kinds else VERDICTS[2]
    kind = str(rng.choice(absent if verdict == VERDICTS[2] else kinds))
    claim = str(rng.choice(UNKNOWABLE))
    certain = verdict == VERDICTS[0] or (verdict == VERDICTS[2] and rng.random() < 0.5)
    hypothesis = f"a {kind} is heard" if certain else f"a {kind} {claim}"
    add(
        "Entailment",
        f"is the hypothesis true? {hypothesis}.",
        lettered(VERDICTS)[VERDICTS.index(verdict)],
        lettered(VERDICTS),
    )

    if pitched := [event for event in scene.events if event.pitch]:
        event = pitched[rng.integers(len(pitched))]
        choices, answer = _choose(rng, event.pitch, [name for name in PITCHES if name != event.pitch], 3)
        add("Pitch-MCQ", f"what is the pitch of the {event.kind}?", answer, choices)
    if scene.events:
        event = scene.events[rng.integers(len(scene.events))]
        choices, answer = _choose(rng, event.level, ["soft" if event.level == "loud" else "loud"], 2)
        add("Level-MCQ", f"how loud is the {event.kind}?", answer, choices)
        event = scene.events[rng.integers(len(scene.events))]
        add(
            "Detail",
            f"describe the {event.kind}.",
            f"it is {event.level}, {event.pitch or 'without pitch'} and {event.length}",
        )
    if len(kinds) > 1:
        index, name = (0, "first") if rng.random() < 0.5 else (-1, "last")
        right = kinds[index]
        others = [kind for kind in kinds if kind != right]
        others += [str(kind) for kind in rng.permutation(absent)[: 3 - len(others)]]
        choices, answer = _choose(rng, right, others, 4)
        add("Order-MCQ", f"which sound comes {name}?", answer, choices)
    return records


def comparison_questions(first: tuple[Scene, str], second: tuple[Scene, str], rng: np.random.Generator) -> list[Record]:
    """Return questions about two clips of one event each; only comparisons with a definite answer."""
    (scene1, path1), (scene2, path2) = first, second
    one, two = scene1.events[0], scene2.events[0]
    pitches, levels = list(PITCHES), ["soft", "loud"]
    comparisons = []
    if one.pitch and two.pitch and one.pitch != two.pitch:
        comparisons.append(("higher", pitches.index(one.pitch) > pitches.index(two.pitch)))
    if one.level != two.level:
        comparisons.append(("louder", levels.index(one.level) > levels.index(two.level)))
    if one.length != two.length:
        comparisons.append(("longer", one.length == "long"))

    def record(family: str, question: str, answer: str) -> Record:
        captions = scene1.caption, scene2.caption
        return Record(TASK, path1, path2, *captions, question, answer, f"Scenes-{family}")

    records = []
    if comparisons:
        word, is_first = comparisons[rng.integers(len(comparisons))]
        choices = lettered(["the first", "the second"])
        question = " ".join([f"in which audio is the sound {word}?", *choices])
        records.append(record("Compare-MCQ", question, choices[0] if is_first else choices[1]))
    if one.phrase != two.phrase:
        records.append(
            record(
                "Difference",
                "explain the difference between the two audios in a few words.",
                f"the first is a {one.phrase}, the second is a {two.phrase}",
            )
        )
    return records
