"""Report of an ablation: a table and a plot of means and standard deviations over seeds, one row per point."""

import csv
import io
import statistics
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from mellow_platform import storage
from mellow_platform.markdown import markdown_table
from mellow_platform.plot_style import BLUE, GREEN, GREY, ORANGE, RED, png, styled_figure
from mellow_platform.training.ablation_config import AblationConfig
from mellow_platform.training.ablation_grid import grid_points

LESS_IS_BETTER = {"val_loss"}
PANELS = {
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "accuracy": "accuracy (mean over families)",
}
RUN_OFFSET = 0.2  # rows between a point's mean and the dots of its runs
COLORS = {"val_accuracy": BLUE, "val_loss": ORANGE, "accuracy": GREEN}


@dataclass(frozen=True)
class Outcome:
    """Result of one run: its scores by name, or the reason of its failure."""

    point: int
    seed: int
    run: str
    scores: dict[str, float]
    failed: str | None


def report(config: AblationConfig, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the points, best first, with means and sample standard deviations (None for a single run)."""
    labels = point_labels(config)
    points = [
        {"label": labels[number], "values": values}
        | summarise([outcome for outcome in outcomes if outcome.point == number])
        for number, values in enumerate(grid_points(config))
    ]
    sign = 1 if config.metric in LESS_IS_BETTER else -1
    points.sort(key=lambda point: (not point["mean"], sign * point["mean"].get(config.metric, 0)))
    return {"metric": config.metric, "axes": list(config.grid), "seeds": config.seeds, "points": points}


def summarise(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return a point's means and standard deviations, its finished runs with their scores, and its failed runs."""
    runs: list[dict[str, Any]] = [
        {"seed": one.seed, "run": one.run, **one.scores} for one in outcomes if not one.failed
    ]
    columns = {name: [run[name] for run in runs] for name in runs[0] if name not in ("seed", "run")} if runs else {}
    return {
        "mean": {name: statistics.mean(column) for name, column in columns.items()},
        "std": {name: statistics.stdev(column) if len(column) > 1 else None for name, column in columns.items()},
        "runs": runs,
        "failed": [{"seed": one.seed, "run": one.run, "reason": one.failed} for one in outcomes if one.failed],
    }


def point_labels(config: AblationConfig) -> list[str]:
    """Return each point's label: its values on the axes that vary, or that differ from the first point."""
    points = grid_points(config)
    names = {axis: value_names(values) for axis, values in config.grid.items()}
    labels = []
    for point in points:
        axes = [axis for axis, values in config.grid.items() if len(values) > 1]
        if config.combinations == "one_at_a_time":
            axes = [axis for axis in axes if point[axis] != points[0][axis]]
        parts = [f"{axis.replace('_', ' ')} {names[axis][repr(point[axis])]}" for axis in axes]
        labels.append(", ".join(parts) or "reference")
    return labels


def value_names(values: list[Any]) -> dict[str, str]:
    """Return the names of an axis's values, keyed by `repr`; folders are named by their last part if that is unique."""
    short = [_name(value).rstrip("/").rsplit("/", 1)[-1] for value in values]
    unique = len(set(short)) == len(set(map(repr, values)))
    return {repr(value): name if unique else _name(value) for value, name in zip(values, short, strict=True)}


def _name(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_name(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(_name, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def markdown(result: dict[str, Any]) -> str:
    """Return the table as Markdown, followed by the failed runs with their reasons."""
    axes, points = result["axes"], result["points"]
    names = {axis: value_names([point["values"][axis] for point in points]) for axis in axes}
    scores = _score_names(points)
    rows = [
        [
            *(names[axis][repr(point["values"][axis])] for axis in axes),
            f"{len(point['runs'])} of {len(point['runs']) + len(point['failed'])}",
            *(_cell(point, name) for name in scores),
        ]
        for point in points
    ]
    seeds = ", ".join(map(str, result["seeds"]))
    parts = [
        markdown_table([*axes, "runs", *scores], rows, text_columns=len(axes)),
        f"Mean ± standard deviation over the runs (seeds {seeds}), sorted by {result['metric']}.",
    ]
    if failed := [f"- `{run['run']}`: {run['reason']}" for point in points for run in point["failed"]]:
        parts += ["Failed:", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _score_names(points: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for point in points for name in point["mean"])
    return [*(name for name in names if name != "steps"), *(name for name in names if name == "steps")]


def _cell(point: dict[str, Any], name: str) -> str:
    if not point["mean"]:
        return "failed"
    if name not in point["mean"]:
        return ""
    mean, std = point["mean"][name], point["std"][name]
    if name == "steps":
        return f"{mean:g}"
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def table_csv(result: dict[str, Any]) -> str:
    """Return the table as CSV: one row per point, with mean and standard deviation in separate columns."""
    scores = _score_names(result["points"])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        [*result["axes"], "runs", "failed", *(f"{name}_{kind}" for name in scores for kind in ("mean", "std"))]
    )
    for point in result["points"]:
        values = [point[kind].get(name) for name in scores for kind in ("mean", "std")]
        writer.writerow(
            [
                *(_name(point["values"][axis]) for axis in result["axes"]),
                len(point["runs"]),
                len(point["failed"]),
                *values,
            ]
        )
    return text.getvalue()


def picture(result: dict[str, Any]) -> bytes:
    """Return a PNG with one panel per score and one row per point: mean, standard deviation, and a dot per run."""
    points = result["points"]
    names = [name for name in PANELS if any(name in point["mean"] for point in points)]
    names.sort(key=lambda name: name != result["metric"])
    columns = max(1, len(names))
    with styled_figure(3.2 + 3.6 * columns, 1.4 + 0.42 * len(points)) as figure:
        panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, names, strict=False):
            _draw_panel(panel, name, points)
        panels[0].set_yticks(range(len(points)), [_row_name(point) for point in points])
        panels[0].set_ylim(len(points) - 0.5, -0.5)
        figure.suptitle(f"Mean ± standard deviation of the runs (grey), sorted by {PANELS[result['metric']]}")
        return png(figure)


def _row_name(point: dict[str, Any]) -> str:
    done, failed = len(point["runs"]), len(point["failed"])
    return point["label"] + (f"\n({done} of {done + failed} runs)" if done and failed else "")


def _draw_panel(panel: Axes, name: str, points: list[dict[str, Any]]) -> None:
    for row, point in enumerate(points):
        if name not in point["mean"]:
            panel.text(0.5, row, "failed", transform=panel.get_yaxis_transform(), color=RED, ha="center", va="center")
            continue
        panel.errorbar(point["mean"][name], row, xerr=point["std"][name], fmt="o", color=COLORS[name])
        runs = [run[name] for run in point["runs"]]
        panel.plot(runs, [row + RUN_OFFSET] * len(runs), "o", color=GREY, markersize=3)
    panel.set_xlabel(PANELS[name] + (" (less is better)" if name in LESS_IS_BETTER else ""))
    panel.grid(axis="x")


def write_report(folder: str, result: dict[str, Any]) -> None:
    """Write `table.md`, `table.csv`, `table.json` and `table.png`."""
    storage.write_bytes(storage.join(folder, "table.md"), markdown(result).encode())
    storage.write_bytes(storage.join(folder, "table.csv"), table_csv(result).encode())
    storage.write_bytes(storage.join(folder, "table.png"), picture(result))
    storage.write_json(storage.join(folder, "table.json"), result)
