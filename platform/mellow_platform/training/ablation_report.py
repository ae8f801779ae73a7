"""The table and the picture of an ablation: means and standard deviations over seeds, a point a row."""

import csv
import io
import statistics
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mellow_platform import storage
from mellow_platform.training.ablation_config import AblationConfig
from mellow_platform.training.ablation_grid import grid_points

LESS_IS_BETTER = {"val_loss"}
PANELS = {
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "accuracy": "accuracy (mean over families)",
}
RUNS_BELOW = 0.2  # rows between a point's mean and the dots of its runs
COLORS = {"val_accuracy": "tab:blue", "val_loss": "tab:orange", "accuracy": "tab:green"}


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its scores by name, or the reason why there are none."""

    point: int
    seed: int
    run: str
    scores: dict[str, float]
    failed: str | None


def report(config: AblationConfig, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the points with their means and standard deviations (of a sample, None of a single run), best first."""
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
    """Return means and standard deviations of a point's scores, its runs with their scores, and those that failed."""
    runs: list[dict[str, Any]] = [
        {"seed": own.seed, "run": own.run, **own.scores} for own in outcomes if not own.failed
    ]
    columns = {name: [run[name] for run in runs] for name in runs[0] if name not in ("seed", "run")} if runs else {}
    return {
        "mean": {name: statistics.mean(column) for name, column in columns.items()},
        "std": {name: statistics.stdev(column) if len(column) > 1 else None for name, column in columns.items()},
        "runs": runs,
        "failed": [{"seed": own.seed, "run": own.run, "reason": own.failed} for own in outcomes if own.failed],
    }


def point_labels(config: AblationConfig) -> list[str]:
    """Return what a point is called: the axes that tell it from others, or from the first point alone."""
    points = grid_points(config)
    names = {axis: value_names(values) for axis, values in config.grid.items()}
    labels = []
    for point in points:
        told = [axis for axis, values in config.grid.items() if len(values) > 1]
        if config.combinations == "one_at_a_time":
            told = [axis for axis in told if point[axis] != points[0][axis]]
        parts = [f"{axis.replace('_', ' ')} {names[axis][repr(point[axis])]}" for axis in told]
        labels.append(", ".join(parts) or "reference")
    return labels


def value_names(values: list[Any]) -> dict[str, str]:
    """Return what the values of an axis are called, by their `repr`: of folders the last part, where that will do."""
    short = [_name(value).rstrip("/").rsplit("/", 1)[-1] for value in values]
    clear = len(set(short)) == len(set(map(repr, values)))
    return {repr(value): name if clear else _name(value) for value, name in zip(values, short, strict=True)}


def _name(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_name(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(_name, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def markdown(result: dict[str, Any]) -> str:
    """Return the table, and below it the runs that failed."""
    axes, points = result["axes"], result["points"]
    names = {axis: value_names([point["values"][axis] for point in points]) for axis in axes}
    scores = _score_names(points)
    lines = [
        "| " + " | ".join([*axes, "runs", *scores]) + " |",
        "|" + "---|" * len(axes) + "---:|" * (1 + len(scores)),
    ]
    for point in points:
        cells = [names[axis][repr(point["values"][axis])] for axis in axes]
        cells.append(f"{len(point['runs'])} of {len(point['runs']) + len(point['failed'])}")
        cells += [_cell(point, name) for name in scores]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, result["seeds"]))
    lines += ["", f"Mean ± standard deviation over the runs (seeds {seeds}), sorted by {result['metric']}."]
    failed = [f"- `{item['run']}`: {item['reason']}" for point in points for item in point["failed"]]
    if failed:
        lines += ["", "Failed:", "", *failed]
    return "\n".join(lines) + "\n"


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
    """Return the table for other programs: a row a point, mean and standard deviation in columns of their own."""
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
    """Return a PNG: a panel a score, a row a point; means with standard deviations, and every run as a dot."""
    points = result["points"]
    names = [name for name in PANELS if any(name in point["mean"] for point in points)]
    names.sort(key=lambda name: name != result["metric"])
    figure = Figure(figsize=(3.2 + 3.6 * max(1, len(names)), 1.4 + 0.42 * len(points)), layout="constrained")
    panels = figure.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=False):
        _draw_panel(panel, name, points)
    panels[0].set_yticks(range(len(points)), [_row_name(point) for point in points])
    panels[0].set_ylim(len(points) - 0.5, -0.5)
    figure.suptitle(f"Mean ± standard deviation of the runs (grey), sorted by {PANELS[result['metric']]}")
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def _row_name(point: dict[str, Any]) -> str:
    done, failed = len(point["runs"]), len(point["failed"])
    return point["label"] + (f"\n({done} of {done + failed} runs)" if done and failed else "")


def _draw_panel(panel: Axes, name: str, points: list[dict[str, Any]]) -> None:
    for row, point in enumerate(points):
        if name not in point["mean"]:
            panel.text(
                0.5, row, "failed", transform=panel.get_yaxis_transform(), color="tab:red", ha="center", va="center"
            )
            continue
        panel.errorbar(point["mean"][name], row, xerr=point["std"][name], fmt="o", capsize=4, color=COLORS[name])
        runs = [run[name] for run in point["runs"]]
        panel.plot(runs, [row + RUNS_BELOW] * len(runs), "o", color="0.6", markersize=3)
    panel.set_xlabel(PANELS[name] + (" (less is better)" if name in LESS_IS_BETTER else ""))
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def write_report(folder: str, result: dict[str, Any]) -> None:
    """Write `table.md`, `table.csv`, `table.json` and `table.png`."""
    storage.write_bytes(storage.join(folder, "table.md"), markdown(result).encode())
    storage.write_bytes(storage.join(folder, "table.csv"), table_csv(result).encode())
    storage.write_bytes(storage.join(folder, "table.png"), picture(result))
    storage.write_json(storage.join(folder, "table.json"), result)
