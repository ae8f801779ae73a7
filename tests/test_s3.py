"""Data in object storage: preprocess, train and evaluate for a few steps with an S3 server on loopback; retries."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from s3fs import S3FileSystem

from mellow_platform import storage
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.evaluate_job import evaluate
from mellow_platform.model import MellowConfig, MellowFeatureExtractor, MellowForConditionalGeneration, MellowProcessor
from mellow_platform.model.conversion import export, from_reference
from mellow_platform.model.folder import load_model, save_model
from mellow_platform.model.tokenizer import train_tokenizer
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from mellow_platform.s3 import S3
from mellow_platform.training.finetune import finetune
from mellow_platform.training.tagger import pretrain
from mellow_platform.training.tagger_config import TaggerConfig
from mellow_platform.training.train_config import TrainConfig
from tests.object_storage import object_store
from tests.shared_ray import SharedRay
from tests.small_corpus import write_corpus


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Empty bucket on an S3 server, set in the standard AWS variables."""
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store.uri


@pytest.fixture(scope="module")
def cluster_on_s3(bucket: str) -> str:
    """Bucket of a Ray cluster whose workers have the AWS variables of the S3 server."""
    SharedRay.use()
    return bucket


@pytest.mark.extended
def test_pipeline_runs_in_object_storage(cluster_on_s3: str):
    def uri(name: str) -> str:
        return storage.join(cluster_on_s3, name)

    write_corpus(uri("corpus"), {"train": 8, "val": 1, "test": 2})
    common = {"corpus": uri("corpus"), "size": "mellow-tiny", "clips_per_shard": 4}
    run = {"storage": uri("runs"), "size": "mellow-tiny", "batch": 4, "micro_batch": 2, "checkpoint_every": 2}
    preprocess(PreprocessConfig(**common, output=uri("log-mel")))
    tagging = TaggerConfig(
        **run, shards=uri("log-mel"), labels=uri("corpus/labels.json"), output=uri("encoder"), run="encoder"
    )
    pretrain(tagging)
    manifest = preprocess(
        PreprocessConfig(**common, output=uri("features"), features="encoder", encoder=uri("encoder"))
    )
    assert manifest.counts["clips"] == 11
    tuning = TrainConfig(
        **run, shards=uri("features"), encoder=uri("encoder"), output=uri("model"), run="mellow", epochs=0.15
    )
    result = finetune(tuning)
    assert result["step"] == result["total_steps"]
    report = evaluate(
        EvaluateConfig(
            model=uri("model"), shards=uri("features"), output=uri("evaluation"), limit=4, conditions=["audio"]
        )
    )
    assert report["records"] == 4
    assert storage.read_json(uri("evaluation/report.json")) == report
    model, _ = load_model(uri("model"))
    assert not model.training


def test_missing_folder_is_named(bucket: str):
    with pytest.raises(FileNotFoundError, match="s3://bucket/nothing"):
        storage.local_copy("s3://bucket/nothing")


def test_listings_are_not_cached(bucket: str):
    folder = storage.join(bucket, "listed")
    storage.write_bytes(storage.join(folder, "first"), b"1")
    assert storage.list_folder(folder) == ["first"]
    another = S3FileSystem(skip_instance_cache=True)
    pq.write_table(pa.table({"step": [1]}), f"{bucket.removeprefix('s3://')}/listed/second", filesystem=another)
    assert storage.read_tables([storage.join(folder, "second")]).to_pydict() == {"step": [1]}
    assert storage.size(storage.join(folder, "second")) > 0


def test_reads_are_not_stale(bucket: str):
    uri = storage.join(bucket, "some", "value.json")
    assert not storage.exists(uri)
    for value in ({"step": 1}, {"step": 2}):
        storage.write_json(uri, value)
        assert storage.exists(uri)
        assert storage.read_json(uri) == value


def test_upload_does_not_wait_for_100_continue(monkeypatch: pytest.MonkeyPatch):
    class Handler(BaseHTTPRequestHandler):
        def handle_expect_100(self) -> bool:
            return True  # without `100 Continue`

        def do_PUT(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

    received: list[bytes] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", **keys}.items():
        monkeypatch.setenv(name, value)
    S3.clear_instance_cache()
    try:
        # In a thread, so that a blocked upload fails the test and does not block it.
        upload = threading.Thread(target=storage.write_bytes, args=("s3://bucket/object", b"bytes"), daemon=True)
        upload.start()
        upload.join(20)
        assert not upload.is_alive()
        assert len(received) == 1 and b"bytes" in received[0]
    finally:
        S3.clear_instance_cache()
        server.shutdown()
        server.server_close()


def test_checkpoint_is_written_to_and_read_from_bucket(bucket: str):
    config, extractor = MellowConfig.from_size("mellow-tiny"), MellowFeatureExtractor.from_size("mellow-tiny")
    model = MellowForConditionalGeneration(config)
    processor = MellowProcessor(extractor, train_tokenizer(["a loud tone"]))
    save_model(model, processor, f"{bucket}/exported")
    export(f"{bucket}/exported", f"{bucket}/checkpoints/tiny.ckpt")
    back = from_reference(f"{bucket}/checkpoints/tiny.ckpt", config, extractor).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_failed_requests_are_retried_for_every_operation(tmp_path: Path):
    with object_store(tmp_path, failures=0.2) as store:
        folder = f"{store.uri}/many"
        names = [f"{number:03d}" for number in range(12)]
        for name in names:
            storage.write_bytes(f"{folder}/{name}", name.encode() * 1000)
        storage.write_bytes(f"{folder}/large", bytes(120 << 20))  # in several parts
        assert storage.list_folder(folder) == [*names, "large"]
        assert all(storage.exists(f"{folder}/{name}") for name in names)
        assert not storage.exists(f"{folder}/absent")
        copy = storage.local_copy(folder)
        assert all((copy / name).read_bytes() == name.encode() * 1000 for name in names)
        assert (copy / "large").stat().st_size == 120 << 20
        storage.delete_folder(folder)
        assert storage.list_folder(folder) == []
        assert 0.1 < store.failed / store.requests < 0.4


def test_permanent_errors_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with object_store(tmp_path, failures=1e-9) as store:
        before = store.requests
        with pytest.raises(FileNotFoundError):
            storage.read_bytes("s3://nobucket/file")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        storage.filesystem("s3://bucket")[0].clear_instance_cache()
        with pytest.raises(PermissionError):
            storage.read_bytes(f"{store.uri}/file")
        assert store.requests - before <= 4
