"""Main job end to end on one machine: corpus, shards, encoder, features, Mellow, answers over HTTP, scores.

make demo                                  # on synthetic scenes
make demo CORPUS=folder                    # on your recordings, see docs/guides/recordings.md
make demo RESUME=1                         # resume a stopped demo
make demo KEEP=1                           # leave the cluster and the endpoint running
python jobs/demo.py --port 8001 --dashboard-port 8266 --output runs/second

The demo starts a local Ray cluster and submits every job to it, as to any other cluster.
"""

import contextlib
import fcntl
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from mellow_platform import job, storage
from mellow_platform.cluster import REPOSITORY
from mellow_platform.local_ray import LOG, LocalRay
from mellow_platform.settings import Input, Output, Section

INSTALL_SECONDS = REPOSITORY / ".venv" / "install-seconds"
CONFIGS = "jobs/configs/mellow-tiny"
ENCODER_EXAMPLES, TRAINING_EXAMPLES = 1700, 18_000  # examples of recordings to train on, over all epochs
QUESTIONS, SHOWN = 6, 2  # questions sent over HTTP, and number of these to print
LOCK = "demo.lock"
# Stages with description and seconds on two cores, from which the time left is estimated.
STAGES = {
    "cluster": ("start Ray on this machine", 4.0),
    "corpus": ("write sound scenes and questions about them", 26.0),
    "preprocess": ("compute log-mel spectrograms of training clips", 23.0),
    "pretrain encoder": ("train the audio encoder to recognise sounds", 104.0),
    "encode": ("run the frozen encoder once per clip", 48.0),
    "train": ("train Mellow to answer questions", 118.0),
    "deploy": ("start the HTTP endpoint", 14.0),
    "ask": ("send questions about test clips to the endpoint", 2.0),
    "evaluate": ("score answers with audio, with noise, without audio", 54.0),
}
PERCENT = re.compile(r"(\d{1,3}) ?%")
HEARTBEAT = 30.0  # seconds between two progress lines if the output is not a terminal
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoConfig(Section):
    """Run the main job end to end on one machine."""

    output: Output = Field("runs/demo", description="folder to write everything to")
    corpus: Input | None = Field(
        None, description="folder of labelled recordings, see docs/guides/recordings.md (default: synthetic scenes)"
    )
    keep: bool = Field(False, description="leave the cluster and the endpoint running")
    resume: bool = Field(False, description="resume the stopped demo in --output")
    cpus: int = Field(4, ge=4, description="logical CPUs of the cluster, which may be more than the machine has")
    port: int = Field(8000, ge=1, le=65535, description="HTTP port of the endpoint")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="HTTP port of Ray's dashboard")


class Screen:
    """Output for a person: one line per stage, with progress and time left while the stage runs.

    Attributes:
        seconds: duration of every finished stage.
    """

    def __init__(self, stages: dict[str, tuple[str, float]]):
        self.stages, self.seconds = stages, dict[str, float]()
        self.stage = ""
        self._start = self._shown = time.monotonic()
        self._share = 0.0  # of the running stage
        self._live = sys.stdout.isatty()

    @contextlib.contextmanager
    def running(self, stage: str) -> Iterator[list[str]]:
        """Show a stage while it runs; texts that are appended to the yielded list become the stage's result."""
        self.stage, self._share, start = stage, 0.0, time.monotonic()
        result: list[str] = []
        self._progress()
        yield result
        self.seconds[stage] = round(time.monotonic() - start, 1)
        print(f"{self._clear}{self._title}  {self.seconds[stage]:5.0f} s  {' '.join(result)}".rstrip(), flush=True)

    def follow(self, line: str) -> None:
        """Read the progress from a line of a job's output, if the line contains a percentage."""
        if found := PERCENT.findall(line):
            self._share = min(int(found[-1]), 100) / 100
            self._progress()

    def close(self) -> None:
        """Delete the progress line."""
        print(self._clear, end="", flush=True)

    @property
    def left(self) -> float:
        """Seconds until all stages are done, at the pace so far."""
        expected = {name: seconds for name, (_, seconds) in self.stages.items()}
        done = sum(expected[name] for name in self.seconds) + self._share * expected.get(self.stage, 0.0)
        pace = max(time.monotonic() - self._start, 1.0) / done if done > expected["cluster"] else 1.0
        return pace * (sum(expected.values()) - done)

    @property
    def _clear(self) -> str:
        return "\r\x1b[2K" if self._live else ""

    @property
    def _title(self) -> str:
        number = list(self.stages).index(self.stage) + 1
        return f"[{number}/{len(self.stages)}] {self.stage:17}{self.stages[self.stage][0]:53}"

    def _progress(self) -> None:
        now = time.monotonic()
        if not self._live and now - self._shown < HEARTBEAT:
            return
        self._shown = now
        left = f"{self._share:4.0%}  {in_words(self.left)} left in all"
        print(f"{self._clear}{self._title} {left}", end="" if self._live else "\n", flush=True)


def in_words(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(10, round(seconds, -1)):.0f} s"


def run(config: DemoConfig) -> dict[str, Any]:
    """Run every stage; print and return the summary.

    Raises:
        OSError: a port or the output folder is in use.
        JobError: a job failed.
    """
    start = time.time() - install_seconds_of_this_run()
    output = Path(config.output)
    screen = Screen(STAGES)
    try:
        with locked(output, config.resume) as lock, contextlib.ExitStack() as stack:
            ray = LocalRay(output, config.cpus, config.port, config.dashboard_port)
            with screen.running("cluster") as result:
                stack.enter_context(ray.running(lock))
                result.append(ray.dashboard)
            summary = stages(config, ray, screen, start)
            ray.kept = config.keep
    except BaseException as error:
        screen.close()
        if screen.stage and not isinstance(error, SystemExit):
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            print(f"The demo stopped in stage {screen.stage!r}: {reason}")
            print(f"  logs: {config.output}/*.log\n  to resume: {resume_command(config)}")
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from error
        raise
    if config.keep:
        print(f"\nThe cluster and the endpoint are still running; to stop them: kill {ray.pid}")
    return summary


def stages(config: DemoConfig, ray: LocalRay, screen: Screen, start: float) -> dict[str, Any]:
    """Run the stages on a running cluster, write `summary.json`, and print the results."""

    def submit(stage: str, job: str, *arguments: str) -> dict[str, Any]:
        with screen.running(stage) as result:
            printed = ray.submit(job, *arguments, seen=screen.follow)
            result.append(RESULTS[stage](printed))
        return printed

    corpus, recordings = ray.uri("corpus"), config.corpus
    audio_root = recordings or storage.join(corpus, "audio")
    written = submit(
        "corpus", "make_corpus", "--output", corpus,
        *(["--source", "recordings", "--recordings", recordings] if recordings else []),
    )  # fmt: skip
    encoder_epochs: list[str] = []
    epochs: list[str] = []
    shards = ["--decode-workers", str(os.cpu_count() or 2)]
    if recordings:
        # More epochs for small corpora, so that the number of training steps depends little on the corpus.
        encoder_epochs = ["--epochs", f"{max(3, round(ENCODER_EXAMPLES / written['recordings']['train']))}"]
        epochs = ["--epochs", f"{min(4.0, max(1.0, TRAINING_EXAMPLES / written['questions']['train'])):.2f}"]
        shards += ["--clips-per-shard", "8"]
    preprocess = ["--config", f"{CONFIGS}/preprocess.yaml", "--audio-root", audio_root, *shards]
    labels = storage.join(corpus, "labels.json")
    training = ["--storage", ray.uri("runs"), "--run"]
    submit("preprocess", "preprocess", *preprocess, "--labels", labels, "--output", ray.uri("log-mel"))
    submit(
        "pretrain encoder", "pretrain_encoder", "--config", f"{CONFIGS}/pretrain_encoder.yaml",
        "--shards", ray.uri("log-mel"), "--labels", labels, "--output", ray.uri("encoder"),
        *training, "encoder", *encoder_epochs,
    )  # fmt: skip
    features = submit(
        "encode", "preprocess", *preprocess, "--corpus", corpus, "--output", ray.uri("features"),
        "--features", "encoder", "--encoder", ray.uri("encoder"),
    )  # fmt: skip
    trained = submit(
        "train", "train", "--config", "jobs/configs/recipes/tiny.yaml", "--shards", ray.uri("features"),
        "--encoder", ray.uri("encoder"), "--output", ray.uri("model"), *training, "mellow", *epochs,
    )  # fmt: skip
    submit("deploy", "deploy", "--model", ray.uri("model"), "--port", str(config.port))
    with screen.running("ask") as result:
        served, first_answer = ask(config, corpus, audio_root)
        right = sum(bool(each["right"]) for each in served)
        result.append(f"{right} of {len(served)} answers are right word for word")
    submit(
        "evaluate", "evaluate", "--benchmark", "all", "--model", ray.uri("model"), "--shards", ray.uri("features"),
        "--mmau", storage.join(corpus, "mmau.json"), "--output", ray.uri("evaluation"),
    )  # fmt: skip
    report = storage.read_json(ray.uri("evaluation", "report.json"))
    summary = {
        "seconds": screen.seconds,
        "install_seconds": float(INSTALL_SECONDS.read_text()) if INSTALL_SECONDS.exists() else None,
        "first_answer_seconds": round(first_answer - start, 1),
        "total_seconds": round(time.time() - start, 1),
        "parameters": storage.read_json(ray.uri("model", "training.json"))["parameters"],
        "examples": features["records"],
        "final_loss": round(trained["loss"], 4),
        "examples_per_second": round(trained["examples_per_second"], 1),
        "scores": {
            name: {"score": each["main"]}
            | {condition: scores[each["main"]]["value"] for condition, scores in each["scores"].items()}
            for name, each in report["benchmarks"].items()
        },
        "served": served,
    }
    storage.write_json(ray.uri("summary.json"), summary)
    print_report(config, summary, Path(ray.uri("evaluation", "report.md")).read_text())
    return summary


# Result of a stage in a few words, from the JSON that its job printed.
RESULTS = {
    "corpus": lambda printed: f"{sum(printed['questions'].values()):,} questions",
    "preprocess": lambda printed: f"{printed['clips']:,} clips, {printed['audio_seconds'] / 60:.0f} min of sound",
    "pretrain encoder": lambda printed: f"{printed['step']:,} steps, loss {printed['loss']:.2f}",
    "encode": lambda printed: f"{printed['clips']:,} clips",
    "train": lambda printed: f"{printed['step']:,} steps, loss {printed['loss']:.2f}",
    "deploy": lambda printed: f"http://{printed['http']['host']}:{printed['http']['port']}",
    "evaluate": lambda printed: f"{len(printed['scores'])} benchmarks",
}


@contextlib.contextmanager
def locked(output: Path, resume: bool) -> Iterator[IO[str]]:
    """Lock the output folder for one demo, and empty it unless an earlier demo is resumed.

    Raises:
        OSError: another demo uses the folder, or the folder contains files that no demo wrote.
    """
    if output.exists() and any(output.iterdir()) and not any((output / name).exists() for name in (LOCK, LOG)):
        raise OSError(f"{output} contains files that no demo wrote: choose another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{output} is in use by another demo, or by a cluster that a demo left running: stop it, or choose "
                "another folder with --output"
            ) from None
        if not resume:
            for entry in output.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != LOCK:
                    entry.unlink()
        yield lock


def install_seconds_of_this_run() -> float:
    """Return the duration of the installation by `make` just before this demo; 0 if everything was installed."""
    if not INSTALL_SECONDS.exists() or time.time() - INSTALL_SECONDS.stat().st_mtime > 10:
        return 0.0
    return float(INSTALL_SECONDS.read_text())


def ask(config: DemoConfig, corpus: str, audio_root: str) -> tuple[list[dict[str, Any]], float]:
    """Send questions about clips of the test split to the endpoint with OpenAI's client.

    Returns:
        Questions with clips, answers and reference answers; and the time of the first answer, in seconds since 1970.
    """
    import openai

    from mellow_platform.completion import input_audio
    from mellow_platform.data.records import Record, read_records
    from mellow_platform.evaluation.matching import is_right

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{config.port}/v1", api_key="not needed on loopback")
    model = client.models.list().data[0].id
    chosen: dict[str, Record] = {}  # one question per family, each about other clips
    used: set[str] = set()
    for record in read_records(storage.join(corpus, "test.json")):
        if record.family not in chosen and used.isdisjoint(record.filepaths):
            chosen[record.family] = record
            used.update(record.filepaths)
    served: list[dict[str, Any]] = []
    first_answer = 0.0
    for record in list(chosen.values())[:QUESTIONS]:
        parts: list[Any] = [{"type": "text", "text": record.input}]
        clips = [storage.join(audio_root, path) for path in record.filepaths]
        for clip in clips:
            parts.append(input_audio(storage.read_bytes(clip), Path(clip).suffix))
        completion = client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}])
        first_answer = first_answer or time.time()
        answer = completion.choices[0].message.content or ""
        right = is_right(record, answer)
        served.append(
            {"question": record.input, "answer": answer, "truth": record.answer, "right": right, "clips": clips}
        )
    return served, first_answer


def resume_command(config: DemoConfig) -> str:
    """Return the command that resumes the demo with the same options."""
    options = {name: getattr(config, name.lower()) for name in ("CORPUS", "OUTPUT", "PORT", "DASHBOARD_PORT")}
    defaults = DemoConfig()
    changed = [
        shlex.quote(f"{name}={value}") for name, value in options.items() if value != getattr(defaults, name.lower())
    ]
    return " ".join(["make demo RESUME=1", *changed])


def print_report(config: DemoConfig, summary: dict[str, Any], report: str) -> None:
    """Print scores, example answers, the paths of report and model, and commands to try next."""
    here = Path.cwd()

    def shown(path: str) -> str:
        short = path.removeprefix(f"{here}/")
        return f"'{short}'" if " " in short else short

    table = [line for line in report.split("\n\n")[1].splitlines() if line.startswith("|")]
    print(f"\nScores of the model ({summary['parameters']:,} parameters) on test clips, with noise, and without audio;")
    print("chance is a random choice among the given answers. Intervals are 95 %.\n")
    print("\n".join(table))
    if config.corpus:
        print_recordings(storage.read_json(storage.join(config.output, "corpus", "corpus.json")))
    for each in summary["served"][:SHOWN]:
        print(f"\n  {' and '.join(map(shown, each['clips']))}")
        print(f"  question   {each['question']}\n  answer     {each['answer']}\n  reference  {each['truth']}")
    folder = shown(config.output)
    clip, question = shown(summary["served"][0]["clips"][0]), summary["served"][0]["question"].replace('"', "'")
    print(f"\nReport, with scores by kind of question and clips to play:  {folder}/evaluation/report.html")
    print(f"Model:                                                      {folder}/model")
    total, first = in_words(summary["total_seconds"]), in_words(summary["first_answer_seconds"])
    print(f"Time: {total}, of which {first} until the first answer")
    print("\nNext:")
    if not config.keep:
        print(f'  .venv/bin/mellow ask {clip} "{question}" --model {folder}/model')
        print(f"  {resume_command(config)} KEEP=1      # start the endpoint again, for the next two lines")
    url = f"http://127.0.0.1:{config.port}"
    print(f'  curl {url}/v1/audio/questions -F file=@{clip} -F question="{question}"')
    print(f"  open {url} in a browser")
    print("  make demo CORPUS=folder OUTPUT=runs/mine      # train on your recordings in folder/label/*.wav")


def print_recordings(corpus: dict[str, Any]) -> None:
    """Print the number of recordings per split and per label, and the score of guessing."""
    counts = ", ".join(f"{count} {split}" for split, count in corpus["recordings"].items())
    per_label = [sum(each["recordings"].values()) for each in corpus["labels"]]
    tested = sum(each["questions"]["test"] > 0 for each in corpus["labels"])
    print(f"\nRecordings: {counts}; {min(per_label)} to {max(per_label)} per label or category.")
    chance = corpus["chance"]["test"]
    print(f"{tested} of {len(per_label)} labels and categories are tested; the score of guessing is {chance:.2f}.")
    for warning in corpus["warnings"]:
        print(f"warning: {warning}")


def interrupt(*_: object) -> None:
    """End the demo; later signals are ignored, so that the cluster ends in order even if Ctrl-C is pressed again."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def demo(config: DemoConfig) -> None:
    logging.disable(logging.INFO)  # Ray logs every file that it packs or excludes
    for number in ENDING:
        signal.signal(number, interrupt)
    run(config)
    print("demo: ok")


if __name__ == "__main__":
    job.run(DemoConfig, demo, cluster=False)
