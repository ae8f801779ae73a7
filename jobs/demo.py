"""The main job end to end on one machine: corpus, shards, encoder, features, Mellow, scores, and answers over HTTP.

make demo                                  # on synthetic scenes
make demo CORPUS=folder                    # on recordings with labels.json
python jobs/demo.py --keep true            # leaves the cluster and the endpoint up

Starts a local Ray cluster and submits every job to it as one would to any other cluster.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from mellow_platform import storage
from mellow_platform.cluster import free_port, is_taken
from mellow_platform.config import DemoConfig
from mellow_platform.data.audio import decode, encode
from mellow_platform.data.records import Record, read_records
from mellow_platform.data.shards import Manifest
from mellow_platform.evaluation.report import main_scores, of_main
from mellow_platform.evaluation.scores import is_right
from mellow_platform.model.folder import load_model
from mellow_platform.settings import load

REPOSITORY = Path(__file__).resolve().parent.parent
INSTALL_SECONDS = REPOSITORY / ".venv" / "install-seconds"
CONFIGS = "jobs/configs/mellow-tiny"
QUESTIONS = 6
CLUSTER_LOG = "ray.log"


class Demo:
    """The stages of the main job, what they printed, and how long they took."""

    def __init__(self, config: DemoConfig):
        self.config = config
        self.seconds: dict[str, float] = {}
        self.metrics_port = free_port()
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # Both cores are busy while the endpoint starts; the default of 5 s is too short for that.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            # The token is the one that `ray start` keeps in ~/.ray/auth_token.
            "RAY_AUTH_MODE": "token",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONWARNINGS": "ignore",
        }

    def uri(self, *parts: str) -> str:
        return storage.join(self.config.output, *parts)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside and say so."""
        print(f"\n=== {name}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)
        print(f"=== {name}: {self.seconds[name]} s", flush=True)

    @contextlib.contextmanager
    def cluster(self) -> Iterator[None]:
        """A Ray cluster of this machine alone; it ends with the demo unless it is to be kept.

        In a folder of its own (with a short name: sockets stand in it), so that it is nobody's default cluster.
        """
        for option, port in (("port", self.config.port), ("dashboard-port", self.config.dashboard_port)):
            if is_taken(port):
                raise SystemExit(
                    f"port {port} is in use: stop what listens there, or run `python jobs/demo.py --{option} N`"
                )
        folder = tempfile.mkdtemp(prefix="ray-")
        command = [
            "ray", "start", "--head", "--block", "--disable-usage-stats",
            f"--port={free_port()}", f"--num-cpus={self.config.cpus}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.config.dashboard_port}",
            f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={self.metrics_port}",
            "--object-store-memory=1000000000", f"--temp-dir={folder}",
        ]  # fmt: skip
        log = Path(self.uri(CLUSTER_LOG))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        done = False
        try:
            self._wait_for_dashboard(process, log)
            yield
            done = True
        finally:
            if done and self.config.keep:
                print(f"\nthe cluster and the endpoint stay up; to stop them: kill {process.pid}")
            else:
                for end in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, end)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
            if done and not self.config.keep:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.config.dashboard_port}"

    def _wait_for_dashboard(self, process: subprocess.Popen, log: Path) -> None:
        for _ in range(120):
            if process.poll() is not None:
                raise SystemExit(f"ray start failed; {log} says:\n{log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=2).close()
                return
            except urllib.error.HTTPError:
                return  # it answers; Ray's command line has the token that it asks for
            except OSError:
                time.sleep(0.5)
        raise SystemExit(f"Ray's dashboard did not answer at {self.dashboard} within 60 s; see {log}")

    def submit(self, job: str, *arguments: str) -> dict[str, Any]:
        """Submit a job, pass its output through, and return the JSON of its last line that holds one."""
        command = [
            "ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".",
            "--runtime-env", "infra/runtime_env.yaml", "--", "python", f"jobs/{job}.py", *arguments,
        ]  # fmt: skip
        print("$", " ".join(command), flush=True)
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout
        result: dict[str, Any] = {}
        with Path(self.uri(f"{job}.log")).open("a") as log:
            for line in process.stdout:
                log.write(line)
                sys.stdout.write(line)
                sys.stdout.flush()
                if line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):
                        result = json.loads(line)
        if process.wait():
            raise SystemExit(f"job {job} failed; its output stands above and in {self.uri(f'{job}.log')}")
        return result


def run(config: DemoConfig) -> dict[str, Any]:
    """Run every stage and return the summary."""
    demo = Demo(config)
    clear(Path(config.output))
    corpus, recordings = demo.uri("corpus"), config.corpus
    audio_root = recordings or storage.join(corpus, "audio")
    source = ["--source", "recordings", "--recordings", recordings, "--rounds", "40"] if recordings else []
    passes = (["--epochs", "60", "--batch", "8", "--micro-batch", "4"], ["--epochs", "4"]) if recordings else ([], [])
    preprocess = ["--config", f"{CONFIGS}/preprocess.yaml", "--corpus", corpus, "--audio-root", audio_root]
    if recordings:
        preprocess += ["--clips-per-shard", "8"]
    training = ["--storage", demo.uri("runs"), "--run"]
    with demo.cluster():
        with demo.stage("corpus"):
            demo.submit("make_corpus", "--output", corpus, *source)
        with demo.stage("preprocess"):
            demo.submit("preprocess", *preprocess, "--output", demo.uri("log-mel"))
        with demo.stage("pretrain encoder"):
            demo.submit(
                "pretrain_encoder", "--config", f"{CONFIGS}/pretrain_encoder.yaml", "--shards", demo.uri("log-mel"),
                "--labels", storage.join(corpus, "labels.json"), "--output", demo.uri("encoder"),
                *training, "encoder", *passes[0],
            )  # fmt: skip
        with demo.stage("encode"):
            demo.submit(
                "preprocess", *preprocess, "--output", demo.uri("features"),
                "--features", "encoder", "--encoder", demo.uri("encoder"),
            )  # fmt: skip
        with demo.stage("train"):
            trained = demo.submit(
                "train", "--config", "jobs/configs/recipes/tiny.yaml", "--shards", demo.uri("features"),
                "--encoder", demo.uri("encoder"), "--output", demo.uri("model"), *training, "mellow", *passes[1],
            )  # fmt: skip
        with demo.stage("evaluate"):
            demo.submit(
                "evaluate", "--benchmark", "all", "--model", demo.uri("model"), "--shards", demo.uri("features"),
                "--mmau", storage.join(corpus, "mmau.json"), "--output", demo.uri("evaluation"),
            )  # fmt: skip
        with demo.stage("deploy"):
            demo.submit("deploy", "--model", demo.uri("model"), "--port", str(config.port))
        with demo.stage("ask"):
            served = ask(config, read_records(storage.join(corpus, "test.json")), audio_root)
    model, _ = load_model(demo.uri("model"))
    report = storage.read_json(demo.uri("evaluation", "report.json"))
    summary = {
        "seconds": demo.seconds,
        "install_seconds": float(INSTALL_SECONDS.read_text()) if INSTALL_SECONDS.exists() else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": Manifest.read(demo.uri("features")).counts["records"],
        "final_loss": round(trained["loss"], 4),
        "examples_per_second": round(trained["examples_per_second"], 1),
        "scores": {
            name: {"score": each["main"]} | {condition: own["value"] for condition, own in of_main(each).items()}
            for name, each in report["benchmarks"].items()
        },
        "served": served,
    }
    storage.write_json(demo.uri("summary.json"), summary)
    print_report(summary, report)
    print(f"scores by category, and questions to listen to: {demo.uri('evaluation', 'report.html')}")
    return summary


def clear(output: Path) -> None:
    """Delete what an earlier demo left in `output`, and nothing else.

    Raises:
        SystemExit: the folder holds something, and no demo wrote it.
    """
    if output.exists() and any(output.iterdir()) and not (output / CLUSTER_LOG).exists():
        raise SystemExit(f"{output} holds files that no demo wrote: choose another --output")
    shutil.rmtree(output, ignore_errors=True)


def ask(config: DemoConfig, records: list[Record], audio_root: str) -> list[dict[str, str | bool]]:
    """Ask the endpoint about clips of the test split with the official client; print answers beside the truth."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{config.port}/v1", api_key="not needed on loopback")
    model = client.models.list().data[0].id
    chosen: dict[str, Record] = {}
    heard: set[str] = set()
    for record in records:
        if record.family not in chosen and heard.isdisjoint(record.filepaths):
            chosen[record.family] = record
            heard.update(record.filepaths)
    served: list[dict[str, str | bool]] = []
    for record in list(chosen.values())[:QUESTIONS]:
        parts: list[Any] = [{"type": "text", "text": record.input}]
        for path in record.filepaths:
            data = storage.read_bytes(storage.join(audio_root, path))
            container = Path(path).suffix.removeprefix(".").lower()
            if container not in ("wav", "flac", "ogg", "mp3"):
                data, container = encode(decode(data, 32_000), 32_000, "WAV"), "wav"
            audio = {"data": base64.b64encode(data).decode(), "format": container}
            parts.append({"type": "input_audio", "input_audio": audio})
        completion = client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}])
        answer = completion.choices[0].message.content or ""
        right = is_right(record, answer)
        print(f"\n{', '.join(record.filepaths)}\n  question: {record.input}")
        print(f"  answer:   {answer}\n  truth:    {record.answer}")
        served.append({"question": record.input, "answer": answer, "truth": record.answer, "right": right})
    return served


def print_report(summary: dict[str, Any], report: dict[str, Any]) -> None:
    right = sum(bool(item["right"]) for item in summary["served"])
    print("\n=== report\n")
    print("\n".join(main_scores(report)))
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())
    install = f", installation {summary['install_seconds']:.0f} s" if summary["install_seconds"] else ""
    print(f"stages: {stages}{install}")
    print(f"parameters: {summary['parameters']:,}; final loss {summary['final_loss']}")
    print(f"served answers that match the truth: {right} of {len(summary['served'])}")


def main() -> None:
    config = load(DemoConfig)
    run(config)
    print("demo: ok")


if __name__ == "__main__":
    main()
