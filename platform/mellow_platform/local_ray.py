"""Ray cluster of one node on this machine, to which jobs are submitted as to any other cluster.

Token, logs and output of jobs are in a folder that the caller chooses. The cluster writes nothing outside this folder
and the temporary directory. Its end ends all its processes.
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
START_SECONDS = 90.0  # timeout until the dashboard responds, on a busy machine
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2  # between two requests for a job's status
MESSAGE_LINES = 20  # most lines of a failed job in an error; all are in its log
OBJECT_STORE_MEMORY = 1_000_000_000  # bytes


class JobError(RuntimeError):
    """Failure of a submitted job; the message is the job's own, with the path of its log."""


class LocalRay:
    """Cluster that runs inside `with ray.running():`.

    Attributes:
        folder: folder of the token, of logs (`ray.log`, `<job>.log`) and of the caller's files.
        port: HTTP port for the endpoint, unused until a model is deployed.
        environment: environment variables of the cluster and of its clients.
        metrics_port: HTTP port of Ray's Prometheus metrics.
        kept: set it to True inside the block to leave the cluster running after the block.
    """

    def __init__(self, folder: Path, cpus: int, port: int | None = None, dashboard_port: int | None = None):
        """
        Args:
            cpus: logical CPUs of the cluster.
            port: HTTP port for the endpoint; by default a free one, like `dashboard_port`.

        Raises:
            FileNotFoundError: RAY_AUTH_TOKEN_PATH names a file that does not exist.
        """
        self.folder, self.cpus = folder, cpus
        self.port, self.dashboard_port = port or free_port(), dashboard_port or free_port()
        self.metrics_port = free_port()
        self.kept = False
        # The address of another cluster, if any, is not inherited.
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
        self.environment = (
            inherited
            | authentication(folder)
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
                # Every core is busy while the endpoint starts, so the default of 5 s is too short.
                "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                # By default Ray ends workers after an idle second, and a job's next tasks load every library again.
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
        """Start the cluster, wait until its dashboard responds, and end the cluster after the block.

        Args:
            lock: open file that `ray start` inherits, so that a lock on it lasts as long as the cluster.

        Raises:
            OSError: a port is in use.
            ChildProcessError: Ray does not start; the message contains the end of its log.
        """
        for option, port in (("port", self.port), ("dashboard-port", self.dashboard_port)):
            if is_taken(port):
                raise OSError(f"port {port} is in use: stop its program, or choose another --{option}")
        # Not Ray's default folder, so that `ray.init` in other processes does not find the cluster.
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
                start_new_session=True,  # Ctrl-C must not reach the cluster, which `_stop` ends
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
        """Run `jobs/<job>.py` on the cluster and return the last JSON object that it printed.

        Args:
            seen: called with every line that the job prints; the lines are also in `<job>.log`.

        Raises:
            JobError: the job failed.
        """
        # Ray reads the token's variables once, when it is imported below; the import takes a second.
        os.environ.update({name: self.environment[name] for name in authentication(self.folder)})
        # Without default excludes, Ray does not warn that it excludes .git, which infra/runtime_env.yaml excludes too.
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
                time.sleep(POLL_SECONDS)
                status = client.get_job_status(submitted)
                ended = status.is_terminal()
                new = printed.read_bytes()[offset:] if printed.exists() else b""
                # An incomplete line is read later, with its rest; progress bars end in a carriage return.
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
            # The last output of a failed job is its name with a message.
            starts = [number for number, line in enumerate(last) if line.startswith(f"{job}.py: ")]
            message = list(last)[starts[-1] if starts else 0 :]
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
                return  # the dashboard responds, and requires the token
            except OSError:
                time.sleep(0.2)
        raise ChildProcessError(
            f"Ray's dashboard at {self.dashboard} did not respond within {START_SECONDS:.0f} s: see {log}"
        )


def _submit(client: "JobSubmissionClient", entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Submit a job as soon as the agent that starts jobs has joined the cluster; return the job's id."""
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(POLL_SECONDS)


def _created(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).create_time()
    return 0.0
