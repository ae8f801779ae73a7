"""Figures of benchmarks in docs/figures.json, which the documentation shows."""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures.json"


def add_record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", action="store_true", help="write the figures to docs/figures.json")


def report(name: str, figures: dict[str, Any], record: bool, file: Path = FIGURES) -> None:
    """Print the figures of a benchmark as one JSON line; with `record`, write them to `file` under its name."""
    if record:
        recorded = json.loads(file.read_text())
        words = [word for word in sys.argv[1:] if word != "--record"]
        recorded[name] |= {
            "command": shlex.join(["python", f"tests/benchmarks/{name}.py", *words]),
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "figures": figures,
        }
        file.write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(figures))


def machine() -> str:
    """Return processor, cores, memory and versions of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "ray"))
    return (
        f"{len(os.sched_getaffinity(0))} cores of {processor}, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, {packages}"
    )
