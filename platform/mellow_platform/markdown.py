"""Markdown tables of reports and model cards."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int = 1) -> str:
    """Return a Markdown table whose columns are padded to one width, so that it also reads well in a terminal.

    Args:
        rows: cells of any type; None is an empty cell, and `|` is escaped.
        text_columns: number of left-aligned columns; the columns after them are numbers, right-aligned.
    """
    lines = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    left = [number < text_columns for number in range(len(widths))]
    rule = "|".join(
        "-" * (width + 2) if text else "-" * (width + 1) + ":" for width, text in zip(widths, left, strict=True)
    )
    cells = [
        " | ".join(c.ljust(w) if text else c.rjust(w) for c, w, text in zip(line, widths, left, strict=True))
        for line in lines
    ]
    head, *body = [f"| {line} |" for line in cells]
    return "\n".join([head, f"|{rule}|", *body])
