"""A Ray cluster of one node on this machine, which takes jobs as any other cluster does.

Its token, logs and jobs' output are in a folder of the caller's. Nothing outside that folder and the temporary
directory is written, and no process of the cluster outlives it.
"""

import collections
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
import yaml

from mellow_platform.authentication import authentication
from mellow_platform.cluster import REPOSITORY, Node, free_port, is_taken, wait
from mellow_platform.launch import programs, temporary_folder

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LOG = "ray.log"
START_SECONDS = 90.0  # until the dashboard answers, on a busy machine
STOP_SECONDS = 10.0
LOOK_SECONDS = 0.2  # between two looks at a job
MESSAGE_LINES = 20  # of a failed job that are shown at most; all are in its log
OBJECT_STORE_MEMORY = 1_000_000_000  # bytes


class JobError(RuntimeError):
    """A submitted job failed; the message is the job's own, with the place of its log."""


class LocalRay:
    """A cluster that runs inside `with ray.running():`.

    Attributes:
        folder: of logs (`ray.log`, `<job>.log`) and of whatever the caller keeps there.
        port: HTTP port for the endpoint; nothing listens on it before a model is deployed.
        environment: variables of the cluster, and of whoever submits jobs to it.
        metrics_port: where Ray's Prometheus metrics are.
        kept: set it inside the block, and the cluster outlives the block.
    """

    def __init__(self, folder: Path, cpus: int, port: int | None = None, dashboard_port: int | None = None):
        """
        Args:
            cpus: logical CPUs of the cluster.
            port: by default a free one, and so is `dashboard_port`.

        Raises:
            FileNotFoundError: RAY_AUTH_TOKEN_PATH names a file that does not exist.
        """
        self.folder, self.cpus = folder, cpus
        self.port, self.dashboard_port = port or free_port(), dashboard_port or free_port()
        self.metrics_port = free_port()
        self.kept = False
        # Another cluster's address is not this one's.
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
        self.environment = (
            inherited
            | authentication(folder)
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
                # Every core is busy while the endpoint starts; the default of 5 s is too short for that.
                "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                # Ray ends workers that are idle for a second; a job's next tasks would load every library again.
                "RAY_idle_worker_killing_time_threshold_ms": "600000",
                "PYTHONWARNINGS": "ignore",
            }
        )

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def pid(self) -> int:
        """Process id of `ray start`; SIGTERM to it ends the cluster."""
        return self._process.pid

    def uri(self, *parts: str) -> str:
        return str(self.folder.joinpath(*parts))

    @contextlib.contextmanager
    def running(self, lock: IO[str] | None = None) -> Iterator[None]:
        """Start the cluster, wait until it takes jobs, and end it after the block.

        Args:
            lock: an open file that stays open as long as the cluster runs.

        Raises:
            OSError: a port is in use.
            ChildProcessError: Ray does not start; the message has the end of its log.
        """
        for option, port in (("port", self.port), ("dashboard-port", self.dashboard_port)):
            if is_taken(port):
                raise OSError(f"port {port} is in use: stop what listens there, or choose another --{option}")
        # A folder of its own, so that `ray.init` elsewhere does not find the cluster.
        self._temporary = temporary_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / LOG
        scripts = programs(self._temporary)
        environment = self.environment | {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [
            str(scripts / "python"), str(scripts / "ray"), "start", "--head", "--block", "--disable-usage-stats",
            f"--port={free_port()}", f"--num-cpus={self.cpus}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}",
            f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={self.metrics_port}",
            f"--object-store-memory={OBJECT_STORE_MEMORY}", f"--temp-dir={self._temporary}",
        ]  # fmt: skip
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C ends the cluster through `_stop`, not in the middle of its work
                pass_fds=[lock.fileno()] if lock else [],
            )
        try:
            self._wait_for_dashboard(log)
            yield
        except BaseException:
            self.kept = False
            raise
        finally:
            if not self.kept:
                self._stop()

    def _stop(self) -> None:
        """End every process of the cluster, drivers of jobs included, and delete its temporary folder."""
        node = Node("head", "127.0.0.1", self.pid, _created(self.pid))
        processes = set(node.processes())
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        wait(processes, STOP_SECONDS)
        left = processes | set(node.processes())
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait(left, STOP_SECONDS)
        self._process.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def submit(
        self, job: str, *arguments: str, seen: Callable[[str], None] = lambda line: print(line, flush=True)
    ) -> dict[str, Any]:
        """Run `jobs/<job>.py` on the cluster to its end; return the JSON object that it printed last.

        Args:
            seen: gets every line that the job prints; all of them are also in `<job>.log`.

        Raises:
            JobError: the job failed.
        """
        # Loading Ray takes a second, and it reads the token's variables once.
        os.environ.update({name: self.environment[name] for name in authentication(self.folder)})
        # Ray warns that it leaves out .git, as infra/runtime_env.yaml does anyway.
        os.environ["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = ""
        from ray.job_submission import JobStatus, JobSubmissionClient

        runtime_env = yaml.safe_load((REPOSITORY / "infra/runtime_env.yaml").read_text())
        runtime_env["py_modules"] = [str(REPOSITORY / module) for module in runtime_env["py_modules"]]
        client = JobSubmissionClient(self.dashboard)
        entrypoint = shlex.join(["python", f"jobs/{job}.py", *arguments])
        submitted = _submit(client, entrypoint, runtime_env | {"working_dir": str(REPOSITORY)})
        log = self.folder / f"{job}.log"
        result: dict[str, Any] = {}
        last: collections.deque[str] = collections.deque(maxlen=MESSAGE_LINES)
        printed = self._temporary / f"session_latest/logs/job-driver-{submitted}.log"
        offset = 0
        with log.open("a") as file:
            ended = False
            while not ended:
                time.sleep(LOOK_SECONDS)
                status = client.get_job_status(submitted)
                ended = status.is_terminal()
                new = printed.read_bytes()[offset:] if printed.exists() else b""
                # A line that is not complete is read with its rest; bars of progress end in a carriage return.
                new = new if ended else new[: max(map(new.rfind, (b"\n", b"\r"))) + 1]
                offset += len(new)
                for line in new.decode(errors="replace").splitlines():
                    print(line, file=file)
                    seen(line)
                    last.append(line)
                    if line.startswith("{"):
                        with contextlib.suppress(json.JSONDecodeError):
                            result = json.loads(line)
        if status != JobStatus.SUCCEEDED:
            # A job that fails ends with its name and the message.
            begins = [number for number, line in enumerate(last) if line.startswith(f"{job}.py: ")]
            message = list(last)[begins[-1] if begins else 0 :]
            reason = "\n".join(message) or client.get_job_info(submitted).message
            raise JobError(f"{reason.strip()}\n  log of the job: {log}")
        return result

    def _wait_for_dashboard(self, log: Path) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise ChildProcessError(f"Ray did not start; {log} ends with:\n{log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=2).close()
                return
            except urllib.error.HTTPError:
                return  # it answers, and asks for the token
            except OSError:
                time.sleep(0.2)
        raise ChildProcessError(
            f"Ray's dashboard did not answer at {self.dashboard} in {START_SECONDS:.0f} s: see {log}"
        )


def _submit(client: "JobSubmissionClient", entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Submit a job, as soon as the agent that starts jobs has joined the cluster; return its id."""
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(LOOK_SECONDS)


def _created(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).create_time()
    return 0.0
