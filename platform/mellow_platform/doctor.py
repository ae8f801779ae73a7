"""Checks of this machine and this installation: `mellow doctor`, and before installation

python3 platform/mellow_platform/doctor.py --before-install

`make` runs the latter with any Python. Therefore this file uses only the standard library and syntax of Python 3.6:
newer annotations are quoted, and `:=` is not used.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

OK, NOTE, PROBLEM = "ok", "note", "problem"
SKIP = "MELLOW_SKIP_CHECKS"
WIDTH = 110  # of the report, in characters

_ROOT = Path(__file__).resolve().parents[2]
FOLDER = _ROOT if (_ROOT / "pyproject.toml").exists() else Path.cwd()  # checkout that contains the package, if any

# Python versions for which Ray 2.60 and PyTorch 2.9 to 2.13 have wheels.
OLDEST, NEWEST = (3, 11), (3, 14)
GLIBC = (2, 28)  # oldest glibc of PyTorch's and pyarrow's wheels (manylinux_2_28)
GIB = 1 << 30
MEMORY = 7.5 * GIB  # the kernel reports less than the 8 GiB of a machine
FREE_MEMORY = 4.5 * GIB  # for `make demo`, whose processes use 4.2 GiB at most
INSTALL_DISK, RUN_DISK, PIP_DISK = 10 * GIB, 2 * GIB, 4 * GIB
FULL = 0.95  # share of used disk space above which Ray spills no objects
SHARED_MEMORY = GIB  # object store of `make demo`

MAIN = ("ray", "torch", "transformers", "numpy", "pyarrow", "soundfile", "openai", "fastapi")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ENDPOINT, DASHBOARD = "http://127.0.0.1:8000", "http://127.0.0.1:8265"
PORTS = {
    8000: ("the endpoint", "stop the program that listens there, or pass another --port"),
    8265: ("Ray's dashboard", "stop the program that listens there, or pass another --dashboard-port"),
    6379: ("`ray start --head`", "stop the program that listens there, or pass another --port to `ray start`"),
}


class Check(NamedTuple):
    """Result of one check.

    Attributes:
        state: `ok`, `note` (works, but something is missing or unusual) or `problem`.
        remedy: what to do; empty if nothing needs to be done.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


class Extra(NamedTuple):
    """Group of optional dependencies in pyproject.toml."""

    name: str
    packages: "tuple[str, ...]"
    purpose: str


EXTRAS = (
    Extra("metrics", ("pycocoevalcap",), "caption metrics (CIDEr; with Java also METEOR and SPICE)"),
    Extra("synthesis", ("py3langid", "datasketch"), "language and near-duplicate filters of jobs/synthesize.py"),
    Extra("train", ("deepspeed", "tensorboard"), "DeepSpeed, which jobs/train.py runs on, and its metrics"),
    Extra("gguf", ("gguf",), "decoder weights and tokenizers from GGUF files"),
    Extra("mlflow", ("mlflow-skinny",), "experiment tracking with MLflow"),
    Extra("otel", ("opentelemetry-exporter-otlp-proto-http",), "OpenTelemetry traces of the endpoint"),
    Extra("docs", ("mkdocs", "mkdocs-material"), "the documentation as a site: `make docs`"),
    Extra("dev", ("pytest", "ruff", "mypy", "playwright"), "tests, linters, browser tests"),
)


def check_python(version: "tuple[int, ...]" = sys.version_info[:3]) -> Check:
    found = "{}, {}".format(".".join(map(str, version)), sys.executable)
    if OLDEST <= version[:2] <= NEWEST:
        return Check("python", OK, found)
    others = [f"python{OLDEST[0]}.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
    # Each candidate is run, because it may be a shim of pyenv that refuses to run.
    usable = next((name for name in others if _run(name, "--version")), "")
    remedy = f"run `make PYTHON={usable} ...`" if usable else f"install one, then run `make PYTHON={others[0]} ...`"
    supported = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
    return Check("python", PROBLEM, f"{found}; Ray and PyTorch have packages for {supported}", remedy)


def check_system() -> Check:
    """Check that PyTorch and Ray publish wheels for this operating system and processor."""
    system, _, _, _, processor = os.uname()
    found = f"{system} {processor}"
    if system == "Darwin":
        if processor == "arm64":
            return Check("system", OK, f"macOS {processor}")
        found = f"macOS {processor}: PyTorch has no packages for it"
        return Check("system", PROBLEM, found, "use Linux, or a Mac with an Apple processor")
    try:
        name, number = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        found += f", {name} {number}"
        new_enough = tuple(map(int, number.split(".")[:2])) >= GLIBC
    except (ValueError, OSError):
        found, new_enough = found + ", no glibc", False
    if system == "Linux" and new_enough and processor in ("x86_64", "aarch64"):
        return Check("system", OK, found)
    found += "; PyTorch has packages for Linux with glibc {}.{} on x86_64 or aarch64".format(*GLIBC)
    return Check("system", PROBLEM, found, "use for example Debian 12 or Ubuntu 24.04 (not Alpine)")


def check_venv() -> Check:
    """Check that `python -m venv` works, which Debian and Ubuntu ship as a separate package."""
    missing = [name for name in ("venv", "ensurepip") if find_spec(name) is None]
    if not missing:
        return Check("venv", OK, "available")
    package = "python{}.{}-venv".format(*sys.version_info[:2])
    found = "Python's module {} is missing".format(" and ".join(missing))
    return Check("venv", PROBLEM, found, f"on Debian and Ubuntu: sudo apt install {package}")


def check_cores(limit: "float | None" = None) -> Check:
    """Report processor cores that this process may use; `limit` is the cgroup's limit."""
    machine = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine)
    if limit is not None:
        usable = min(usable, limit)
    found = f"{round(usable, 1):g}"
    if usable < machine:
        found += " of {} (limited by {})".format(machine, "cgroup" if limit == usable else "affinity")
    if usable < 2:
        return Check("processor cores", NOTE, found, "`make demo` takes twice as long as on two cores")
    return Check("processor cores", OK, found)


def check_memory(limit: "int | None" = None) -> Check:
    """Check physical memory, or the cgroup's `limit` in bytes if that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = _gib(total)
    if limit is not None and limit < total:
        found = f"{_gib(limit)} (cgroup limit; the machine has {found})"
        total = limit
    if total < MEMORY:
        remedy = "use a larger machine, or raise the container's memory limit"
        return Check("memory", PROBLEM, f"{found}; 8 GiB are needed", remedy)
    free = _available_memory()
    if free is not None:
        found += f", {_gib(free)} available"
        if free < FREE_MEMORY:
            return Check("memory", NOTE, found, f"`make demo` needs {_gib(FREE_MEMORY)}: close other programs first")
    return Check("memory", OK, found)


def check_disk(folder: Path = FOLDER, needed: int = RUN_DISK) -> Check:
    """Check free disk space for the virtual environment and for runs."""
    usage = shutil.disk_usage(str(folder))
    found = f"{_gib(usage.free)} free at {folder}"
    if usage.free < needed:
        remedy = "free space, or move the checkout to a larger disk"
        return Check("disk", PROBLEM, f"{found}; {_gib(needed)} are needed", remedy)
    if usage.used > FULL * usage.total:
        remedy = f"Ray spills no objects to a disk that is more than {FULL:.0%} full: free space"
        return Check("disk", NOTE, f"{found} ({usage.used / usage.total:.0%} full)", remedy)
    return Check("disk", OK, found)


def check_pip_space() -> Check:
    """Check free disk space in the temporary directory, in which pip unpacks wheels."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    found = f"{_gib(free)} free at {folder}"
    if free < PIP_DISK:
        remedy = f"if pip fails with `No space left on device`: set TMPDIR to a folder with {_gib(PIP_DISK)}"
        return Check("temporary files", NOTE, found, remedy)
    return Check("temporary files", OK, found)


def check_folder(folder: Path = FOLDER) -> Check:
    """Check that a virtual environment can be created in `folder`: path, write permission, symbolic links."""
    if os.pathsep in str(folder):
        found = f"{folder} contains {os.pathsep!r}: Python refuses to create a virtual environment there"
        return Check("folder", PROBLEM, found, "rename the folder")
    if not folder.is_dir():
        return Check("folder", PROBLEM, f"{folder} is not a folder", "run this from a checkout")
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=str(folder)) as probe:
            (Path(probe) / "link").symlink_to(probe)
    except OSError as error:
        found = f"{folder}: files or symbolic links cannot be created: {error.strerror}"
        return Check("folder", PROBLEM, found, "move the checkout to a local disk with write permission")
    if " " in str(folder):
        remedy = "the demo, jobs and `mellow cluster up` work; workers of your own `ray start` fail: move the checkout"
        return Check("folder", NOTE, f"{folder} contains a space", remedy)
    return Check("folder", OK, str(folder))


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Check the size of the memory file system of Ray's object store (Linux)."""
    if not folder.is_dir():
        return Check("shared memory", OK, f"no {folder}: Ray uses temporary files")
    usage = shutil.disk_usage(str(folder))
    found = f"{_gib(usage.free)} free of {_gib(usage.total)} at {folder}"
    if usage.free < SHARED_MEMORY:
        remedy = "Ray's object store falls back to the slower /tmp; in a container: docker run --shm-size=2g"
        return Check("shared memory", NOTE, found, remedy)
    return Check("shared memory", OK, found)


def check_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> "Check | None":
    """Report vector instructions that the engine uses; None if the system does not list them."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    if not flags:
        return None
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
    found = [name for flag, name in names.items() if flag in flags]
    if "avx2" not in flags:
        return Check("instructions", NOTE, "no AVX2", "PyTorch computes several times slower without AVX2")
    return Check("instructions", OK, ", ".join(found))


def check_gpu() -> Check:
    """Check that PyTorch can use the GPUs; torch is imported only if the machine has a GPU."""
    names = _run("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if not names and not list(Path("/dev").glob("nvidia[0-9]*")):
        return Check("GPU", OK, "none: models run on the CPU")
    found = "; ".join(names.splitlines()) or "/dev/nvidia*, but nvidia-smi reports none"
    try:
        import torch
    except ImportError as error:
        return Check("GPU", NOTE, f"{found}; torch is not importable ({error})", "install the project: make install")
    if torch.cuda.is_available():
        return Check("GPU", OK, f"{found}; torch {torch.__version__} uses it")
    remedy = f"install a driver for CUDA {torch.version.cuda}: https://www.nvidia.com/drivers"
    if torch.version.cuda is None:
        remedy = "this is PyTorch's CPU build: unset PIP_EXTRA_INDEX_URL and run `pip install --force-reinstall torch`"
    return Check("GPU", NOTE, f"{found}; torch {torch.__version__} does not see it", remedy)


def check_java() -> Check:
    """Check that `java` runs: the one of macOS may only ask the user to install Java."""
    version = _run("java", "-version")
    if version:
        lines = version.splitlines()
        return Check("java", OK, next((line for line in lines if "version" in line), lines[0]))
    remedy = "caption metrics omit METEOR and SPICE; on Debian and Ubuntu: sudo apt install default-jre-headless"
    return Check("java", NOTE, "missing", remedy)


def check_browser() -> Check:
    named = os.environ.get("CHROMIUM")
    if named and not shutil.which(named):
        return Check("browser", NOTE, f"CHROMIUM is {named}, which is not a program", "correct or unset CHROMIUM")
    paths = [path for path in map(shutil.which, [named] if named else BROWSERS) if path]
    if paths:
        return Check("browser", OK, paths[0])
    remedy = "tests of the web page are skipped; install one, or set CHROMIUM to its path"
    return Check("browser", NOTE, "missing ({})".format(", ".join(BROWSERS)), remedy)


def check_kubectl() -> Check:
    path = shutil.which("kubectl")
    if path:
        return Check("kubectl", OK, path)
    remedy = "`mellow cluster up` and infra/ require it: https://kubernetes.io/docs/tasks/tools"
    return Check("kubectl", NOTE, "missing", remedy)


def check_project() -> "list[Check]":
    """Compare installed packages with the project's requirements (pyproject.toml, or the installed metadata)."""
    version, requirements = _project()
    checks = [Check("mellow-platform", OK, f"{version} at {Path(__file__).resolve().parent}")]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [*checks, Check("packaging", PROBLEM, "missing", "run `make install`")]
    faults, versions, remedy = [], {}, "run `make install`"
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None:
            faults.append(Check(requirement.name, PROBLEM, f"missing; required: {requirement}", remedy))
        elif not requirement.specifier.contains(installed, prereleases=True):
            faults.append(Check(requirement.name, PROBLEM, f"{installed}; required: {requirement}", remedy))
        else:
            versions[requirement.name] = installed
    checks += [Check(name, OK, versions.pop(name)) for name in MAIN if name in versions]
    others = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    return [*checks, *([Check("others", OK, others)] if others else []), *faults]


def check_extras() -> "list[Check]":
    """List optional dependencies: versions, or the command that installs missing ones."""
    checks = []
    for extra in EXTRAS:
        versions = {package: _version(package) for package in extra.packages}
        missing = [package for package, number in versions.items() if number is None]
        if missing:
            found = "{}; missing: {}".format(extra.purpose, ", ".join(missing))
            checks.append(Check(extra.name, NOTE, found, f"pip install -e '.[{extra.name}]'"))
        else:
            installed = ", ".join("{} {}".format(*item) for item in versions.items())
            checks.append(Check(extra.name, OK, f"{extra.purpose} ({installed})"))
    return checks


def check_port(port: int, used_by: str, remedy: str) -> Check:
    name = f"port {port}"
    with socket.socket() as probe:
        probe.settimeout(1.0)
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if not taken:
        return Check(name, OK, f"free (default of {used_by})")
    return Check(name, NOTE, f"in use (default of {used_by}); `lsof -i :{port}` shows the program", remedy)


def check_cluster() -> Check:
    """Request the version from Ray's dashboard, with Ray's token if there is one."""
    address = os.environ.get("RAY_ADDRESS", "")
    url = address or DASHBOARD
    if not url.startswith(("http://", "https://")):
        remedy = f"to submit jobs, set RAY_ADDRESS to the dashboard's URL, as in {DASHBOARD}"
        return Check("Ray cluster", NOTE, f"RAY_ADDRESS is {url}, not a dashboard's URL: not checked", remedy)
    host, token = _host(url), _ray_token()
    status, body = _get(url.rstrip("/") + "/api/version", token)
    if status in (401, 403):
        found = "{} responds {}: {}".format(host, status, "the token is wrong" if token else "a token is required")
        remedy = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token, or copy it to ~/.ray/auth_token"
        return Check("Ray cluster", NOTE, found, remedy)
    if status is None:
        start = "`mellow cluster up --local` or `make demo KEEP=1` starts one"
        remedy = "correct or unset RAY_ADDRESS" if address else start
        return Check("Ray cluster", NOTE, f"{host} does not respond ({body})", remedy)
    try:
        version = json.loads(body)["ray_version"]
    except (ValueError, KeyError, TypeError):
        found = f"{host} responds {status}, but is not Ray's dashboard"
        return Check("Ray cluster", NOTE, found, "correct RAY_ADDRESS")
    return Check("Ray cluster", OK, f"Ray {version} at {host}")


def check_endpoint(url: str = ENDPOINT) -> Check:
    status, body = _get(url + "/healthz")
    if status == 200:
        return Check("endpoint", OK, f"healthy at {_host(url)}")
    if status is None:
        return Check("endpoint", NOTE, f"{_host(url)} does not respond ({body})", "`make demo KEEP=1` starts one")
    remedy = "another program uses the port: stop it, or serve on another port"
    return Check("endpoint", NOTE, f"{_host(url)} responds {status} to /healthz", remedy)


def check_s3() -> Check:
    """Report the S3 host and the source of the keys, never the keys."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    host = _host(endpoint) if endpoint else "AWS"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    if not missing:
        return Check("S3", OK, f"{host}, keys from the environment")
    if len(missing) == 1:
        return Check("S3", NOTE, f"{host}, {missing[0]} is not set", "set both {}".format(" and ".join(names)))
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    others = ("AWS_PROFILE", "AWS_ROLE_ARN", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    sources = [name for name in others if os.environ.get(name)]
    if sources or file.exists():
        return Check("S3", OK, f"{host}, keys from {sources[0] if sources else file}")
    remedy = "s3:// URIs need {} (and AWS_ENDPOINT_URL if it is not AWS)".format(" and ".join(names))
    return Check("S3", NOTE, f"{host}, no keys", remedy)


def check_hub() -> Check:
    """Check that the model hub responds within a second."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("model hub", OK, "not checked: HF_HUB_OFFLINE is set")
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    status, body = _get(url + "/api/models?limit=1", timeout=1.0)
    if status is None or status >= 400:
        found = f"{_host(url)} is not reachable ({body if status is None else status})"
        remedy = "only `mellow push` and models from the hub need it; HF_HUB_OFFLINE=1 avoids timeouts"
        return Check("model hub", NOTE, found, remedy)
    return Check("model hub", OK, f"{_host(url)} is reachable")


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> "int | None":
    """Return the lowest memory limit, in bytes, of this process's cgroup (version 1 or 2) and its parents, or None."""
    files = _cgroup_files("memory", "memory.max", "memory.limit_in_bytes", root, membership)
    limits = [int(file.read_text()) for file in files if file.read_text().strip().isdigit()]
    return min(limits) if limits else None


def cgroup_cores(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> "float | None":
    """Return the lowest limit of processor cores of this process's cgroup and its parents, or None."""
    limits = []
    for file in _cgroup_files("cpu", "cpu.max", "cpu.cfs_quota_us", root, membership):
        values = file.read_text().split()
        if file.name == "cpu.cfs_quota_us":
            values += (file.parent / "cpu.cfs_period_us").read_text().split()
        if values[0].isdigit():  # not `max` or -1
            limits.append(int(values[0]) / int(values[1]))
    return min(limits) if limits else None


def _cgroup_files(controller: str, name: str, name_v1: str, root: Path, membership: Path) -> "list[Path]":
    """Return the existing files of a setting, from this process's cgroup up to the root.

    Inside a container the cgroup's path may be the host's, which is not mounted; the container's cgroup is the root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        base, setting = (root, name) if number == "0" else (root / controller, name_v1)
        group = base / path.lstrip("/")
        files += [folder / setting for folder in (group, *group.parents) if folder == base or base in folder.parents]
    return [file for file in files if file.is_file()]


def _available_memory() -> "int | None":
    """Return available memory in bytes (Linux); None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _run(program: str, *arguments: str) -> str:
    """Return a program's output; empty if the program is missing or fails."""
    path = shutil.which(program)
    if not path:
        return ""
    try:
        result = subprocess.run([path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.decode(errors="replace").strip() if result.returncode == 0 else ""


def _version(package: str) -> "str | None":
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _project() -> "tuple[str, list[str]]":
    """Return version and requirements of the checkout, or of the installed package if there is no checkout."""
    from importlib import metadata

    file = FOLDER / "pyproject.toml"
    if file.exists():
        import tomllib

        project = tomllib.loads(file.read_text())["project"]
        return project["version"], project["dependencies"]
    try:
        return metadata.version("mellow-platform"), metadata.requires("mellow-platform") or []
    except metadata.PackageNotFoundError:
        return "not installed", []


def _ray_token() -> str:
    """Return the token that Ray's commands send; empty if there is none."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return os.environ.get("RAY_AUTH_TOKEN") or file.read_text().strip()
    except OSError:
        return ""


def _host(url: str) -> str:
    """Return scheme, host and port of a URL: user information and path may be secret."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return "{}://{}".format(parts.scheme, parts.netloc.rpartition("@")[2])


def _get(url: str, token: str = "", timeout: float = 2.0) -> "tuple[int | None, str]":
    """Return status and body of a GET request; None and the reason without an HTTP response within `timeout` seconds.

    Requests to loopback addresses bypass proxies.
    """
    import http.client
    import threading
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    local = _host(url).split("://")[1].split(":")[0] in ("127.0.0.1", "localhost")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    results: list[tuple[int | None, str]] = []

    def fetch() -> None:
        try:
            with opener.open(request, timeout=timeout) as response:
                results.append((response.status, response.read(1 << 16).decode(errors="replace")))
        except urllib.error.HTTPError as error:
            results.append((error.code, ""))
        except (OSError, ValueError, http.client.HTTPException) as error:
            results.append((None, str(getattr(error, "reason", None) or error)))

    # The timeout of a socket does not cover the lookup of its host name.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(timeout)
    return results[0] if results else (None, f"no response within {timeout:g} s")


def before_install() -> "list[Check]":
    """Run the checks that predict failures late in the installation."""
    machine = [check_python(), check_system(), check_venv(), check_memory(cgroup_memory())]
    return [*machine, check_folder(), check_disk(needed=INSTALL_DISK), check_pip_space()]


def run() -> "dict[str, list[Check]]":
    """Run all checks and return their results by section."""
    instructions = check_instructions()
    return {
        "Python and packages": [check_python(), *check_project()],
        "Extras (optional)": check_extras(),
        "Machine": [
            check_system(),
            check_cores(cgroup_cores()),
            *([instructions] if instructions else []),
            check_memory(cgroup_memory()),
            check_shared_memory(),
            check_disk(),
            check_gpu(),
            check_java(),
            check_browser(),
            check_kubectl(),
        ],
        "Services": [
            *(check_port(port, *texts) for port, texts in PORTS.items()),
            check_cluster(),
            check_endpoint(),
            check_s3(),
            check_hub(),
        ],
    }


def problems(sections: "dict[str, list[Check]]") -> int:
    return sum(check.state == PROBLEM for checks in sections.values() for check in checks)


def as_text(sections: "dict[str, list[Check]]") -> str:
    """Return the report: one line per check, with its remedy, if any, on the next."""
    lines = []
    for title, checks in sections.items():
        lines.append(title)
        for check in checks:
            head, indent = f"  {check.state:8} {check.name:16} ", " " * 28
            for text, first, rest in ((check.found, head, indent), (check.remedy, f"{indent}-> ", f"{indent}   ")):
                lines += textwrap.wrap(
                    text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
                )
        lines.append("")
    notes = sum(check.state == NOTE for checks in sections.values() for check in checks)
    return "\n".join([*lines, f"problems: {problems(sections)}, notes: {notes}"])


def as_json(sections: "dict[str, list[Check]]") -> str:
    checks = [dict(check._asdict(), section=title) for title, checks in sections.items() for check in checks]
    return json.dumps({"problems": problems(sections), "checks": checks}, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check this machine before installation.")
    help = "required; print only problems of the installation"
    parser.add_argument("--before-install", action="store_true", required=True, help=help)
    parser.parse_args()
    found = [check for check in before_install() if check.state != OK]
    for check in found:
        print(f"{check.state}: {check.name}: {check.found}\n  -> {check.remedy}", file=sys.stderr)
    if not any(check.state == PROBLEM for check in found):
        return 0
    skipped = os.environ.get(SKIP, "") not in ("", "0")
    if skipped:
        print(f"{SKIP} is set: installing nevertheless", file=sys.stderr)
    else:
        print(f"not installed; {SKIP}=1 installs nevertheless", file=sys.stderr)
    return 0 if skipped else 1


if __name__ == "__main__":
    sys.exit(main())
