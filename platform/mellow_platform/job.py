"""Run a job from the command line.

A job module imports only this module and its options; whatever its work needs (torch, ray) is imported inside the
function that does the work:

    def train(config: TrainConfig) -> None:
        from mellow_platform.training.finetune import finetune
        ...

    if __name__ == "__main__":
        run(TrainConfig, train)

So `--help`, wrong options, missing inputs and an absent cluster are answered before anything heavy is imported.
"""

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from mellow_platform import storage
from mellow_platform.authentication import is_ray_running
from mellow_platform.failure import Failure, write_log
from mellow_platform.launch import prepare_process
from mellow_platform.settings import DEBUG, Options, Section, dashed, load

CONNECT_SECONDS = 1.5
FAILED, INTERRUPTED = 1, 130  # exit statuses; 2 is that of a wrong option


def run(schema: type[Options], work: Callable[[Options], None], cluster: bool = True) -> None:
    """Read the options of a job from the command line, check what they name, and do the work.

    A failure ends the program with one message as its last output and status 1; the traceback is in a log file, and on
    the terminal with --debug. A wrong option ends it with status 2, Ctrl-C with status 130.

    Args:
        cluster: whether the job runs on the Ray cluster at RAY_ADDRESS.
    """
    try:
        config = load(schema)
        if cluster:
            check_cluster(os.environ.get("RAY_ADDRESS", ""))
        check_locations(config)
        if cluster and not os.environ.get("RAY_ADDRESS") and not is_ray_running():
            prepare_process()
        work(config)
    except KeyboardInterrupt:
        end("interrupted", INTERRUPTED)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            end(stop.code, FAILED)
        raise
    except BaseException as error:
        end(explain(error), FAILED)


def check_locations(config: Section) -> None:
    """Check every file and folder in the options.

    Raises:
        SystemExit: one cannot be read or written; the message names the option.
    """
    for name, uri, exists in config.locations():
        try:
            storage.check(uri, exists)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{dashed(name)} {error}") from error


def check_cluster(address: str) -> None:
    """Check that a Ray cluster can be at an address; `auto` and `local` are left to Ray.

    Raises:
        SystemExit: nothing listens there, or it is the address of a dashboard.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not (host and port):
        return
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise SystemExit(
            f"no Ray cluster at RAY_ADDRESS={address}: {error.strerror or error}; start the cluster, correct "
            "RAY_ADDRESS, or unset it to run on this machine"
        ) from error
    if url.scheme in ("http", "https"):
        raise SystemExit(
            f"RAY_ADDRESS={address} is the address of a dashboard, which jobs are submitted to: run `ray job submit "
            f"--working-dir . --runtime-env infra/runtime_env.yaml -- python {sys.argv[0]} ...`"
        )


def explain(error: BaseException) -> str:
    """Return the message for a failed job, and write the traceback to a log file."""
    failure = Failure(error)
    place = f"raised at {failure.place}, " if failure.place else ""
    if DEBUG in sys.argv:
        traceback.print_exception(error)
    try:
        return f"{failure.message}\n({place}traceback in {write_log(error, _program().stem)}; {DEBUG} prints it here)"
    except OSError as fault:
        return f"{failure.message}\n({place}no log file for the traceback: {fault}; {DEBUG} prints it here)"


def end(message: str, status: int) -> NoReturn:
    """End the program with a message that is its last output.

    The job leaves the cluster first, because Ray prints the output of workers until then.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ray = sys.modules.get("ray")
    with contextlib.suppress(Exception):  # of a Ray that is half imported, or whose cluster is lost
        if ray and ray.is_initialized():
            ray.shutdown()
    sys.stdout.flush()
    print(f"{_program().name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _program() -> Path:
    return Path(sys.argv[0])
