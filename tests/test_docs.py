"""The documentation: every command runs, or says which test runs it; options, paths and links exist; the site builds.

A fenced block of shell or Python in README.md, CONTRIBUTING.md or docs/ runs here, unless a comment above it says

    <!-- extended -->                 it runs here in the extended tests
    <!-- tested by tests/test_x.py --> that test runs these commands
    <!-- not run in CI: reason -->     nothing runs it
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from docs.generated import GENERATORS, PLACEHOLDER, _figures, _parsers, job_options, jobs, openapi
from mellow_platform.cli import parser as mellow_parser
from mellow_platform.data import shards
from mellow_platform.data.audio import encode
from mellow_platform.evaluation.evaluate_job import PREDICTION_SCHEMA
from mellow_platform.inference.predict_job import ANSWER_SCHEMA
from mellow_platform.settings import dashed, flags, load
from serve.schema import ChatRequest
from tests.benchmarks import recorded
from tests.conftest import REPOSITORY
from tests.small_corpus import write_corpus
from tests.tiny_model import write_tiny_model

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!--(?P<mark>[^\n]*)-->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
MARK = re.compile(r" (extended|tested by (?P<test>tests/test_\w+\.py)|not run in CI: \S.*) ")
SHELL = ("sh", "bash", "console")
CLIP = "runs/demo/corpus/audio/test/000000.flac"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str
    mark: str  # comment above the block

    def __str__(self) -> str:
        first = self.text.partition("\n")[0]
        return f"{self.page.relative_to(REPOSITORY)}: {first[:50]}"

    def commands(self) -> list[list[str]]:
        """Return the words of each command, with the block's variables replaced and placeholders left in."""
        text = re.sub(r"\\\n\s*", " ", self.text)
        for name, value in re.findall(r"^(\w+)=(\S+)$", text, re.M):
            text = re.sub(rf"\${name}\b", value, text)
        found, line = [], ""
        for part in text.splitlines(keepends=True):
            line += part
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a quotation that ends on a later line
                continue
            line = ""
            found += [words[place + 1 :] for place, word in enumerate(words) if word in ("--", "&&")]
            found.append(words)
        return [words for words in found if words]


BLOCKS = [
    Block(page, match["language"], match["text"], match["mark"] or "")
    for page in PAGES
    for match in FENCE.finditer(page.read_text())
    if match["language"] in (*SHELL, "python")
]


def runs(block: Block, extended: bool) -> bool:
    return (block.mark == " extended ") if extended else not block.mark


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory like the checkout after `make demo`, with a random model and one clip."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in REPOSITORY.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "models"):
            (folder / path.name).symlink_to(path)
    for name, command in {"python": "", "mellow": "-m mellow_platform.cli"}.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {command} "$@"\n')
        program.chmod(0o755)
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    write_tiny_model(str(folder / "runs/demo/model"))
    for name, container in ((CLIP, "FLAC"), ("clip.wav", "WAV")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise, 32_000, container))
    return folder


def run(folder: Path, *command: str) -> None:
    env = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY / "platform"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs_or_names_its_test(block: Block):
    if block.mark:
        match = MARK.fullmatch(block.mark)
        assert match, (
            f"<!--{block.mark}--> is not a mark; valid: extended, tested by tests/test_x.py, not run in CI: why"
        )
        assert not match["test"] or (REPOSITORY / match["test"]).is_file()


SCRIPTS = {
    b.text: b for b in BLOCKS if b.language in SHELL and runs(b, False)
}  # a block that is on two pages runs once


@pytest.mark.parametrize("block", SCRIPTS.values(), ids=str)
def test_shell_block_runs(block: Block, folder: Path):
    run(folder, "bash", "-euo", "pipefail", "-c", block.text)


def programs() -> dict[str, str]:
    """Return the Python blocks of each page as one program, without programs that are a part of another one."""
    found: dict[str, str] = defaultdict(str)
    for block in BLOCKS:
        if block.language == "python" and runs(block, False):
            found[block.page.name] += block.text
    return {page: text for page, text in found.items() if not any(text in other != text for other in found.values())}


@pytest.mark.parametrize("page", programs())
def test_python_blocks_run_in_order(page: str, folder: Path):
    run(folder, "python", "-c", programs()[page])


@pytest.mark.extended
@pytest.mark.parametrize("block", [b for b in BLOCKS if runs(b, True)], ids=str)
def test_extended_block_runs(block: Block, folder: Path):
    write_corpus(str(folder / "runs/demo/corpus"), {"train": 2, "val": 1, "test": 2})
    run(folder, "bash", "-euo", "pipefail", "-c", block.text)


def test_example_request_is_valid(folder: Path):
    (block,) = [b for b in BLOCKS if "printf" in b.text and "> request.json" in b.text]
    run(folder, "bash", "-c", block.text)
    text, clips = ChatRequest(**json.loads((folder / "request.json").read_text())).question()
    assert (text, len(clips)) == ("caption the audio.", 1)


JOB_COMMANDS = {
    f"{block.page.name}: {' '.join(words)}": words[words.index(word) :]
    for block in BLOCKS
    if block.language in SHELL
    for words in block.commands()
    for word in words[:2]
    if re.fullmatch(r"jobs/\w+\.py", word)
}


@pytest.mark.parametrize("command", JOB_COMMANDS)
def test_job_command_has_valid_options(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    job, *options = JOB_COMMANDS[command]
    if options and "--help" not in options:
        load(job_options(Path(job).stem), options)


def test_commands_of_every_job_are_found():
    assert {Path(words[0]).stem for words in JOB_COMMANDS.values()} | {"demo"} == set(jobs())


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in SHELL], ids=str)
def test_command_exists_with_its_options(block: Block):
    for words in block.commands():
        if words[0].endswith("mellow"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "error", lambda _, message: pytest.fail(message))
                mellow_parser().parse_known_args(words[1:])
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        elif words[0].endswith("python") and words[1].startswith("tests/"):
            text = (REPOSITORY / words[1]).read_text()
            assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), words


def known_options() -> set[str]:
    """Return every option of every job, of `mellow`, and of the programs in tests/."""
    found = {"--config", "--help", "--debug", "--record"}
    for job in jobs():
        found |= {dashed(name) for name in flags(job_options(job))}
    for each in _parsers(mellow_parser()):
        found |= {option for action in each._actions for option in action.option_strings}
    for script in (REPOSITORY / "tests").glob("*/*.py"):
        found |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))
    return found


# Of docker, ray and tensorboard.
FOREIGN = {"--build-arg", "--runtime-env-json", "--head", "--logdir"}


def inline_code() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        yield from ((page, code) for code in re.findall(r"`([^`\n]+)`", text))


def test_options_in_text_exist():
    known = known_options() | FOREIGN
    wrong = defaultdict(list)
    for page, code in inline_code():
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", code):
            if option not in known and not any(name.startswith(f"{option}.") for name in known):
                wrong[page.name].append(option)
    assert not wrong


def test_paths_in_text_exist():
    missing = defaultdict(list)
    for page, code in inline_code():
        path = re.fullmatch(r"(?:(?:platform|jobs|serve|infra|tests|docs)/|\.ci/)[\w./*<>-]*", code)
        if path and not any(mark in code for mark in ("...", "<")) and not list(REPOSITORY.glob(code.rstrip("/"))):
            missing[page.name].append(code)
    # The architecture names modules by their folder in the library or in serve/.
    architecture = REPOSITORY / "docs/explanation/architecture.md"
    for page, code in inline_code():
        if page == architecture and code.endswith(".py"):
            library = REPOSITORY / "platform/mellow_platform" / code
            if not (library.is_file() or (REPOSITORY / code).is_file()):
                missing[page.name].append(code)
    assert not missing


def test_files_name_pages_that_exist():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    missing = defaultdict(list)
    for name in tracked.stdout.split():
        path = REPOSITORY / name
        if name == "CHANGELOG.md":  # names former places of pages
            continue
        if path.suffix in (".py", ".yaml", ".yml", ".toml", ".md") and path.is_file():
            for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|json|svg)\b", path.read_text()):
                if not (REPOSITORY / page).is_file():
                    missing[name].append(page)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert not missing


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_of_repository_pages_resolve(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    assert [link for link in links if "://" not in link and not (REPOSITORY / link.partition("#")[0]).exists()] == []


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


def test_every_module_and_job_is_in_the_reference():
    architecture = (REPOSITORY / "docs/explanation/architecture.md").read_text()
    folders = {path.parent for path in (REPOSITORY / "platform/mellow_platform").rglob("*.py")}
    shown = {match[2] for match in PLACEHOLDER.finditer(architecture)}
    assert {str(path.relative_to(REPOSITORY)) for path in folders} <= shown
    reference = (REPOSITORY / "docs/reference/jobs.md").read_text()
    assert {match[2] for match in PLACEHOLDER.finditer(reference)} == set(jobs())


def test_file_formats_name_every_column():
    text = (REPOSITORY / "docs/reference/formats.md").read_text()
    schemas = [shards.CLIP_FIELDS, shards.RECORD_SCHEMA, shards.QUARANTINE_SCHEMA, PREDICTION_SCHEMA, ANSWER_SCHEMA]
    assert [field.name for schema in schemas for field in schema if f"`{field.name}`" not in text] == []


def test_error_page_has_every_code_of_the_endpoint():
    text = (REPOSITORY / "docs/reference/errors.md").read_text()
    sources = "".join(path.read_text() for path in (REPOSITORY / "serve").glob("*.py"))
    codes = re.findall(
        r'"((?:\w+_)?(?:queue_full|not_ready|deadline|\w+_(?:lost|failed|refused|error|key|keys)))"', sources
    )
    assert codes
    others = {"invalid_request_error", "authentication_error", "rate_limit_error", "server_error"}  # types, not codes
    assert [code for code in codes if code not in others and f"`{code}`" not in text] == []
    reasons = re.findall(
        r'AudioError\(\s*"(\w+)"', "".join(p.read_text() for p in (REPOSITORY / "platform").rglob("*.py"))
    )
    assert reasons
    assert [reason for reason in reasons if f"`{reason}`" not in text] == []


def test_placeholders_are_filled():
    for page in PAGES:
        for match in PLACEHOLDER.finditer(page.read_text()):
            assert GENERATORS[match[1]](*filter(None, [match[2]])), f"{page.name}: {match[0]}"


def test_generated_options_have_flag_value_and_default():
    text = GENERATORS["options"]("train")
    assert "| `--learning-rate` | `FLOAT` | peak learning rate" in text
    assert "| `--scaling.workers` | `INT` | number of training workers (default: 2) |" in text
    assert "**required**: folder of shards" in text


def test_generated_http_page_has_every_route_and_no_false_status():
    text = GENERATORS["http"]()
    for path, methods in openapi()["paths"].items():
        assert all(f"## `{method.upper()} {path}`" in text for method in methods)
    assert "422" not in text


def test_figures_are_rendered_as_tables():
    table = _figures({"requests": 1343, "seconds": {"float32": {"first": 1.01}, "int8": {"first": 0.71, "again": 0.1}}})
    assert "| requests | 1,343 |" in table
    assert "| seconds | first | again |" in table
    assert "| float32 | 1.01 |  |" in table


def test_bars_in_code_are_not_escaped():
    assert "| `--decoder` | `NAME|URI` |" in GENERATORS["options"]("train")


def test_recorded_figures_replace_those_of_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    entry = {"title": "t", "command": "c", "machine": "m", "figures": {"a": 1}}
    file = tmp_path / "figures.json"
    file.write_text(json.dumps({"serving": entry, "training": entry}))
    monkeypatch.setattr(sys, "argv", ["serving.py", "--quick", "--record"])
    recorded.report("serving", {"a": 2}, record=False, file=file)
    assert json.loads(file.read_text())["serving"] == entry
    recorded.report("serving", {"a": 2}, record=True, file=file)
    written = json.loads(file.read_text())
    assert written["training"] == entry
    assert written["serving"]["figures"] == {"a": 2}
    assert written["serving"]["command"] == "python tests/benchmarks/serving.py --quick"
    assert "cores of" in written["serving"]["machine"]
    assert capsys.readouterr().out == '{"a": 2}\n{"a": 2}\n'


def test_every_benchmark_has_an_entry_for_its_figures():
    names = {path.stem for path in (REPOSITORY / "tests/benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert names <= json.loads(recorded.FIGURES.read_text()).keys()


def test_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY / "platform"), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert "{{ " not in text, page
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)"', text), page
        assert not re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(https?:[^"]*)"', text), page
