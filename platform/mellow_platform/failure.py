"""Cause of a job's failure: one message from inside Ray's nested errors, and a log file with the whole traceback."""

import re
import tempfile
import traceback
from pathlib import Path

CHAINED = re.compile(
    r"\n\n(?:The above exception was the direct cause of the following exception"
    r"|During handling of the above exception, another exception occurred):\n\n"
)
COLOR = re.compile(r"\x1b\[\d*m")
ERRNO = re.compile(r"\[Errno \d+\] (?P<reason>[^:]+): '(?P<path>[^']+)'")
FRAME = re.compile(r'File "([^"]+)", line (\d+)')
OWN_FILE = re.compile(r".*/(mellow_platform/.+\.py)|(?!.*/site-packages/).*/((?:jobs|serve)/.+\.py)")
# Errors whose messages are sentences; messages of other errors (KeyError: 'x') are shown with the class.
SENTENCES = {
    "ChildProcessError", "ConnectionError", "ConnectionRefusedError", "FileExistsError", "FileNotFoundError",
    "IsADirectoryError", "NotADirectoryError", "OSError", "PermissionError", "RuntimeError", "TimeoutError",
    "ValueError",
}  # fmt: skip
RAY_DATA = "UserCodeException"  # suffix of the classes in which Ray Data wraps errors of mapped functions
LONGEST = 1000  # characters of a message
JOB_LOG = "job-driver-"  # prefix of the file to which Ray writes the output of a submitted job


class Failure:
    """The cause of an error.

    Attributes:
        message: message of the cause, without Ray's text around it.
        place: `file:line` in this project that raised it; empty if unknown.
    """

    def __init__(self, error: BaseException):
        cause, wrapper = error, None
        while inner := _inside(cause):
            cause, wrapper = inner, cause
        text = COLOR.sub("", str(wrapper)) if wrapper else "".join(traceback.format_tb(error.__traceback__))
        # Ray Data sends the error of a mapped function only as text, in the traceback.
        is_text = type(cause).__name__.endswith(RAY_DATA)
        self.message = cause_in(text) if is_text else _phrase(type(cause).__name__, _text(cause))
        self.place = _place(text)


def write_log(error: BaseException, job: str) -> Path:
    """Write the traceback of an error to a new file and return its path.

    The file of a submitted job is beside the job's output, in the log folder of Ray's session, which the dashboard
    lists. Otherwise it is in the temporary directory.

    Raises:
        OSError: the file cannot be written.
    """
    lines = COLOR.sub("", "".join(traceback.format_exception(error)))
    output = Path("/proc/self/fd/1").resolve()
    if output.name.startswith(JOB_LOG):
        path = output.with_name(f"{output.stem}-traceback.log")
        path.write_text(lines)
        return path
    with tempfile.NamedTemporaryFile("w", prefix=f"mellow-{job}-", suffix=".log", delete=False) as file:
        file.write(lines)
    return Path(file.name)


def _inside(error: BaseException) -> BaseException | None:
    """Return the error that one of Ray's errors wraps, or None."""
    if not type(error).__module__.startswith("ray."):
        return None
    workers = getattr(error, "worker_failures", {})  # Ray Train: errors by rank
    first = error.args[0] if error.args else None  # error of an actor that failed to start
    candidates = (*workers.values(), getattr(error, "controller_failure", None), getattr(error, "cause", None), first)
    return next((each for each in candidates if isinstance(each, BaseException)), None)


def _text(error: BaseException) -> str:
    """Return an error's message, without the lines of details that follow Ray's own messages."""
    text = COLOR.sub("", str(error)).strip()
    if not type(error).__module__.startswith("ray."):
        return text
    lines = text.splitlines()
    return " ".join([line for line in lines if line.startswith("The ")] or lines[:1])


def cause_in(text: str) -> str:
    """Return the message of the last error in a remote traceback that is not one of Ray Data's wrappers.

    Text without a traceback is returned unchanged.
    """
    for block in reversed(CHAINED.split(COLOR.sub("", text).strip())):
        lines = block.splitlines()
        last = max((number for number, line in enumerate(lines) if line.startswith(" ")), default=-1)
        kind, _, message = "\n".join(lines[last + 1 :]).partition(": ")
        if last >= 0 and not kind.endswith(RAY_DATA):
            return _phrase(kind.rpartition(".")[2], message)
    return text


def _phrase(kind: str, message: str) -> str:
    if found := ERRNO.match(message):
        message = f"{found['path']}: {found['reason'].lower()}"
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]} ..."
    return message if message and kind in SENTENCES else f"{kind}: {message}" if message else kind


def _place(text: str) -> str:
    """Return `file:line` of the innermost frame of a traceback that is in this project; empty if there is none."""
    places = [(OWN_FILE.fullmatch(file), line) for file, line in FRAME.findall(text)]
    return next((f"{file[1] or file[2]}:{line}" for file, line in reversed(places) if file), "")
