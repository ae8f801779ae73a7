"""Entry point of jobs on the command line.

A job module imports only this module and its options; heavy packages (torch, ray) are imported inside the function that
does the work:

    def train(config: TrainConfig) -> None:
        from mellow_platform.training.finetune import finetune
        ...

    if __name__ == "__main__":
        run(TrainConfig, train)

So `--help`, wrong options, missing inputs and a missing cluster are reported before any heavy import.
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
FAILED, INTERRUPTED = 1, 130  # exit statuses; a wrong option has status 2


def run(schema: type[Options], work: Callable[[Options], None], cluster: bool = True) -> None:
    """Read the options of a job from the command line, check the cluster, files and folders in them, and call `work`.

    A failure ends the program with status 1 and one message as its last output; the traceback is in a log file, and
    with --debug also on the terminal. A wrong option ends the program with status 2, Ctrl-C with status 130.

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
    """Check that every file and folder in the options can be read or written.

    Raises:
        SystemExit: a check failed; the message names the option.
    """
    for name, uri, exists in config.locations():
        try:
            storage.check(uri, exists)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{dashed(name)} {error}") from error


def check_cluster(address: str) -> None:
    """Check that a program listens at the address of a Ray cluster; addresses without a port (`auto`) are not checked.

    Raises:
        SystemExit: no program listens there, or the address is that of a dashboard.
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
            f"RAY_ADDRESS={address} is the address of a dashboard; submit the job to it: `ray job submit "
            f"--working-dir . --runtime-env infra/runtime_env.yaml -- python {sys.argv[0]} ...`"
        )


def explain(error: BaseException) -> str:
    """Write the traceback of a failed job to a log file, and return the job's message with the path of that file."""
    failure = Failure(error)
    place = f"raised at {failure.place}, " if failure.place else ""
    if DEBUG in sys.argv:
        traceback.print_exception(error)
    try:
        return f"{failure.message}\n({place}traceback in {write_log(error, _program().stem)}; {DEBUG} prints it here)"
    except OSError as fault:
        return f"{failure.message}\n({place}traceback not written: {fault}; {DEBUG} prints it here)"


def end(message: str, status: int) -> NoReturn:
    """End the program with a status and a message, which is its last output.

    The job disconnects from the cluster first, because Ray prints output of workers until then.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ray = sys.modules.get("ray")
    with contextlib.suppress(Exception):  # Ray may be half imported, or its cluster lost
        if ray and ray.is_initialized():
            ray.shutdown()
    sys.stdout.flush()
    print(f"{_program().name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _program() -> Path:
    return Path(sys.argv[0])
