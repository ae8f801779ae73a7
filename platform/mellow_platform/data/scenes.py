"""Synthetic sound scenes: zero to three events in a quiet background."""

from dataclasses import dataclass

import numpy as np

PITCHED = ("tone", "horn", "tremolo")
KINDS = (*PITCHED, "rising sweep", "falling sweep", "noise burst", "clicks")
SILENCE = "silence"
PITCHES = {"low": (180.0, 280.0), "middle": (650.0, 950.0), "high": (2300.0, 3400.0)}  # Hz
LEVELS = {"loud": (0.35, 0.7), "soft": (0.02, 0.05)}  # peak amplitude, full scale 1
LENGTHS = {"short": (1.0, 1.3), "long": (2.2, 2.6)}  # seconds
SWEEP = (300.0, 4000.0)  # Hz
BACKGROUND = 0.0005  # standard deviation, full scale 1


@dataclass(frozen=True, slots=True)
class Event:
    """One sound: kind, pitch, level and length by name, and start and duration in seconds."""

    kind: str
    pitch: str  # empty if the kind has none
    level: str
    length: str
    start: float
    seconds: float
    frequency: float  # Hz
    amplitude: float  # peak, full scale 1

    @property
    def phrase(self) -> str:
        """The event in words: `loud low tone`."""
        return " ".join(word for word in (self.level, self.pitch, self.kind) if word)


@dataclass(frozen=True, slots=True)
class Scene:
    """Events of a clip in order of time; kinds do not repeat within a scene."""

    events: tuple[Event, ...]
    seconds: float

    @property
    def caption(self) -> str:
        return " followed by ".join(f"a {event.phrase}" for event in self.events) or SILENCE

    @property
    def labels(self) -> list[str]:
        """Tags of the whole clip: every event's kind, pitch and level."""
        tags = {tag for event in self.events for tag in (event.kind, event.pitch, event.level) if tag}
        return sorted(tags) or [SILENCE]


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of 8 to 10 seconds: silence, or one to three events that do not overlap."""
    seconds = float(rng.uniform(8.0, 10.0))
    count = int(rng.choice(4, p=[0.06, 0.54, 0.22, 0.18]))
    kinds = rng.permutation(KINDS)[:count]
    slot = seconds / max(count, 1)
    events = []
    for index, kind in enumerate(map(str, kinds)):
        pitch = str(rng.choice(list(PITCHES))) if kind in PITCHED else ""
        level, length = str(rng.choice(list(LEVELS))), str(rng.choice(list(LENGTHS)))
        duration = float(rng.uniform(*LENGTHS[length]))
        low, high = PITCHES[pitch] if pitch else SWEEP
        events.append(
            Event(
                kind=kind,
                pitch=pitch,
                level=level,
                length=length,
                start=index * slot + float(rng.uniform(0.0, slot - duration)),
                seconds=duration,
                frequency=float(np.exp(rng.uniform(np.log(low), np.log(high)))),
                amplitude=float(rng.uniform(*LEVELS[level])),
            )
        )
    return Scene(tuple(events), seconds)


def render(scene: Scene, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return the scene's waveform [samples], float32, at `sampling_rate` Hz."""
    waveform = rng.normal(0.0, BACKGROUND, round(scene.seconds * sampling_rate)).astype(np.float32)
    for event in scene.events:
        start = round(event.start * sampling_rate)
        sound = _sound(event, sampling_rate, rng)[: len(waveform) - start]
        waveform[start : start + len(sound)] += sound
    return np.clip(waveform, -1.0, 1.0)


def _sound(event: Event, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return one event's waveform [samples], with 20 ms of fade at both ends."""
    time = np.arange(round(event.seconds * sampling_rate)) / sampling_rate
    phase = 2 * np.pi * event.frequency * time
    match event.kind:
        case "tone":
            sound = np.sin(phase)
        case "horn":
            sound = np.sum([np.sin(n * phase) / n for n in range(1, 8)], axis=0) / 1.8
        case "tremolo":
            sound = np.sin(phase) * (0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(2.0, 2.6) * time))
        case "rising sweep" | "falling sweep":
            low, high = SWEEP
            position = time / event.seconds
            octaves = np.log(high / low)
            sound = np.sin(2 * np.pi * low * event.seconds / octaves * np.exp(octaves * position))
            if event.kind == "falling sweep":
                sound = sound[::-1]
        case "noise burst":
            sound = np.clip(rng.normal(0.0, 0.35, len(time)), -1.0, 1.0)
        case "clicks":
            period = round(sampling_rate / rng.uniform(6.0, 10.0))
            click = np.exp(-np.arange(round(0.01 * sampling_rate)) / (0.002 * sampling_rate))
            click *= rng.choice([-1.0, 1.0], len(click))
            sound = np.zeros(len(time))
            for start in range(0, len(time) - len(click), period):
                sound[start : start + len(click)] = click
        case _:
            raise ValueError(f"event kind {event.kind!r} does not exist; choose one of {', '.join(KINDS)}")
    fade = np.minimum(1.0, np.minimum(np.arange(len(time)), np.arange(len(time))[::-1]) / (0.02 * sampling_rate))
    return (event.amplitude * fade * sound).astype(np.float32)
