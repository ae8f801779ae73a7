"""One style for every picture: palette, fonts, axes, and PNG output."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#2a6fbb", "#d9822b", "#3f8f6b", "#bc4b51"
DARK, GREY, LIGHT_GREY = "#222222", "#8a8f98", "#c9cdd3"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "errorbar.capsize": 3,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 9.5,
    "grid.color": "0.9",
    "legend.frameon": False,
    "savefig.dpi": 110,
    "text.parse_math": False,  # category names may contain `$`; a log axis needs LogFormatter
}


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches; draw and save it inside the block, which sets the style."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height))


def png(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
