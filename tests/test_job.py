"""Jobs as programs: exit status and message of each kind of failure."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_platform.cluster import free_port
from tests.conftest import REPOSITORY
from tests.object_storage import ObjectStore, object_store
from tests.small_corpus import write_corpus

DEAD = f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server with an empty bucket."""
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


def command(job: str, *arguments: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *arguments]


def run(job: str, *arguments: str, status: int = 1, env: dict[str, str] | None = None) -> str:
    """Run a job that fails with a status, and return its last message: the text after its name on stderr."""
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | (env or {})
    process = subprocess.run(command(job, *arguments), capture_output=True, text=True, env=variables)
    assert process.returncode == status, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr.rpartition(f"{job}.py: ")[2].strip()


def preprocess(corpus: str, output: str, **env: str) -> str:
    return run("preprocess", "--corpus", corpus, "--output", output, "--size", "mellow-tiny", env=env)


def test_wrong_option_exits_with_status_2():
    assert "--zero-stage 4" in run("train", "--zero-stage", "4", status=2)
    assert run("train", "--config", "/absent.yaml", status=2).startswith("error: --config /absent.yaml")


def test_missing_input_names_its_option(tmp_path: Path):
    (tmp_path / "file").touch()
    for missing in (tmp_path / "absent", tmp_path / "file" / "below"):
        assert preprocess(str(missing), str(tmp_path / "o")).startswith(f"--corpus {missing}: ")
    audio = ["--audio-root", f"{{audiocaps: {tmp_path}, clothov21: /absent}}"]
    message = run("preprocess", "--corpus", str(tmp_path), "--output", str(tmp_path / "o"), *audio)
    assert message.startswith("--audio-root /absent: ")


def test_unknown_scheme_is_refused(tmp_path: Path):
    assert preprocess("foo://x", "/o").startswith("--corpus foo://x: scheme 'foo'")
    assert preprocess(str(tmp_path), "gs://x").startswith("--output gs://x: scheme 'gs'")
    assert preprocess(str(tmp_path), "http://h/x").startswith("--output http://h/x")


def test_unwritable_output_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "folder"
    message = preprocess(str(tmp_path), str(output))
    assert re.match(rf"--output {output} .*{tmp_path}/file ", message)


def test_denied_access_names_the_path():
    script = """
import os, sys
from mellow_platform import storage
if os.getuid() == 0:
    os.setuid(65534)  # root may read and write everything
for uri, exists in ((sys.argv[1] + "/secret", True), (sys.argv[1] + "/o", False)):
    try:
        storage.check(uri, exists)
    except PermissionError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "secret").touch(0o000)
        Path(folder).chmod(0o555)
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
        Path(folder).chmod(0o755)
    read, write = done.stdout.splitlines()
    assert read.startswith(f"{folder}/secret ")
    assert re.match(f"{folder}/o .*{folder} ", write)


def test_missing_object_or_bucket_is_named(store: ObjectStore, tmp_path: Path):
    assert preprocess("s3://bucket/absent", "/o").startswith("--corpus s3://bucket/absent: ")
    assert preprocess("s3://other/c", "/o").startswith("--corpus s3://other/c: bucket 'other'")
    assert preprocess(str(tmp_path), "s3://other/o").startswith("--output s3://other/o: bucket 'other'")


def test_wrong_credentials_are_refused(store: ObjectStore):
    message = preprocess("s3://bucket/c", "/o", AWS_SECRET_ACCESS_KEY="wrong")
    assert re.match(r"--corpus s3://bucket/c: .*\bSignatureDoesNotMatch\b", message)
    message = preprocess("s3://bucket/c", "/o", AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert re.match(r"--corpus s3://bucket/c: .*\bAWS_ACCESS_KEY_ID\b", message)


def test_unreachable_s3_endpoint_is_named(store: ObjectStore):
    message = preprocess("s3://bucket/c", "/o", AWS_ENDPOINT_URL=f"http://{DEAD}")
    assert re.match(rf"--corpus s3://bucket/c: .*\b{DEAD}\b", message)


def test_check_ignores_throttling(tmp_path: Path):
    with object_store(tmp_path / "s3", failures=1.0, seed=1) as failing:
        script = f"from mellow_platform import storage\nstorage.check('{failing.uri}/c', True)"
        for _ in range(4):
            subprocess.run([sys.executable, "-c", script], check=True)
        assert failing.failed >= 4


@pytest.mark.parametrize("scheme", ["", "http://", "ray://"])
def test_missing_cluster_is_named(scheme: str, tmp_path: Path):
    address = f"{scheme}{DEAD}"
    message = preprocess(str(tmp_path), "/o", RAY_ADDRESS=address)
    assert f"RAY_ADDRESS={address}: " in message


def test_dashboard_address_is_refused(store: ObjectStore, tmp_path: Path):
    message = preprocess(str(tmp_path), "/o", RAY_ADDRESS=store.env["AWS_ENDPOINT_URL"])
    assert message.startswith(f"RAY_ADDRESS={store.env['AWS_ENDPOINT_URL']} ")


@pytest.mark.extended
def test_debug_prints_traceback_before_message(tmp_path: Path):
    arguments = ["--model", "random", "--corpus", str(tmp_path), "--output", f"{tmp_path}/o", "--debug"]
    output = tmp_path / "job-driver-raysubmit_x.log"  # as Ray names the output of a submitted job
    with output.open("w") as file:
        job = subprocess.run(command("evaluate", *arguments), stdout=file, stderr=subprocess.PIPE, text=True)
    *before, first, second = job.stderr.splitlines()
    log = tmp_path / "job-driver-raysubmit_x-traceback.log"
    assert job.returncode == 1
    assert first.startswith(f"evaluate.py: {tmp_path}/test.json ")
    assert second.startswith("(raised at mellow_platform/") and f"traceback in {log}; --debug" in second
    assert log.read_text().startswith("Traceback (most recent call last):")
    assert log.read_text() in "\n".join([*before, ""])


def test_failure_in_ray_task_ends_with_its_message(tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "bad.parquet").write_text("not Parquet")
    message = run(
        "preprocess", "--source", "parquet", "--corpus", f"{tmp_path}/corpus", "--output", f"{tmp_path}/o",
        "--size", "mellow-tiny",
    )  # fmt: skip
    first, second = message.splitlines()
    assert first.startswith(f"{tmp_path}/corpus/bad.parquet ")
    assert second.startswith("(raised at mellow_platform/storage.py:")
    log = Path(second.partition("traceback in ")[2].partition(";")[0])
    assert "ParquetAudio" in log.read_text()
    log.unlink()


def test_interrupt_exits_with_status_130(tmp_path: Path):
    write_corpus(str(tmp_path / "corpus"), {"train": 4, "val": 1, "test": 1})
    arguments = ["--corpus", f"{tmp_path}/corpus", "--output", f"{tmp_path}/o", "--size", "mellow-tiny"]
    job = subprocess.Popen(
        command("preprocess", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "libtorch" not in Path(f"/proc/{job.pid}/maps").read_text():
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 130, error
    assert error.splitlines()[-1] == "preprocess.py: interrupted" and "Traceback" not in error
