"""Kill a synthesis job, driver and Ray together, at seeded random times, and compare requests with stored answers.

python tests/chaos/kill_synthesis.py --captions 2000 --kills 2 --seed 0      # about three minutes on two cores

A test server (`tests/llm_server.py`) fails one request in seven and sends one malformed answer in fourteen; the job is
submitted again after each kill. The server counts arrivals and valid answers per request, and generated answers per
body, whatever its key. Expected: one stored answer per request, and no request after its answer is stored. `again` is
the number of requests with several valid answers: at most those in flight at a kill, and the server, which supports
idempotency keys, generates none of these again (`written_twice`).

The last line is JSON; the exit code is 1 if a request is lost or stored twice, if more requests were repeated than were
in flight, or if the report and the folder differ.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script has only its folder on the path

import tests  # noqa: F401  # sets Ray's token before Ray is imported

# isort: split
import pyarrow.parquet as pq

from mellow_platform import storage
from mellow_platform.data.caption_tables import read_captions
from mellow_platform.data.records import SPLITS, read_records
from mellow_platform.synthesis.requests import plan
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from tests.chaos.cluster import ChaosCluster
from tests.llm_server import LLMServer, llm_server

TIME_LIMIT = 1800.0  # seconds
FAULTS, MALFORMED, REJECTABLE = 0.15, 0.07, 0.15
SOUNDS = [
    f"{adjective} {noun} {verb}"
    for adjective in ("an old", "a small", "a large", "a distant", "a wooden", "a metal")
    for noun, verb in (
        ("dog", "barks"), ("door", "creaks"), ("engine", "idles"), ("bird", "sings"), ("clock", "ticks"),
        ("crowd", "murmurs"), ("kettle", "whistles"), ("train", "passes"), ("pump", "hums"), ("drum", "booms"),
    )
]  # fmt: skip


def write_captions(uri: str, count: int, seed: int) -> None:
    """Write different captions of `count` clips in AudioCaps' layout."""
    rng = random.Random(seed)
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for number in range(count):
        first, second = rng.sample(SOUNDS, 2)
        lines.append(f"{number},clip{number:05d},{number % 300},{first} while {second} number {number}")
    storage.write_bytes(uri, "\n".join(lines).encode())


def run(folder: Path, captions: int, kills: int, seed: int) -> dict[str, Any]:
    """Run the experiment in `folder`; print a table, and return the results."""
    write_captions(str(folder / "train.csv"), captions, seed)
    config = SynthesizeConfig(
        captions=[str(folder / "train.csv")],
        output=str(folder / "out"),
        writer="endpoint",
        kinds=["detail", "mcq"],
        rows_per_part=128,
        endpoint={"concurrency": 16, "retries": 12},
    )
    start = time.monotonic()
    with llm_server(FAULTS, MALFORMED, REJECTABLE, seed) as server:
        killed = _run_with_kills(config, server, folder, kills, random.Random(seed))
        seconds = time.monotonic() - start
        found = compare(config, server, captions)
    print(f"{'kill':>4}  {'after':>7}  answers so far")
    for number, (after, answers) in enumerate(killed, 1):
        print(f"{number:4d}  {after:6.1f}s  {answers}")
    print(f"faults: {dict(server.faults)}; {server.max_active} simultaneous requests at most")
    return {"captions": captions, "kills": len(killed)} | found | {"seconds": round(seconds, 1)}


def _run_with_kills(
    config: SynthesizeConfig, server: LLMServer, folder: Path, kills: int, rng: random.Random
) -> list[tuple[float, int]]:
    """Run the job until it is finished; kill driver and Ray with SIGKILL after random numbers of answers.

    Returns:
        Seconds since the start and number of valid answers, per kill.
    """
    (folder / "job.yaml").write_text(json.dumps(config.model_dump()))
    expected = 2.5 * len(plan(read_captions(config.captions, "", config.clip_name), config))  # includes checks
    moments = [(number + rng.uniform(0.1, 0.8)) / kills * 0.95 * expected for number in range(kills)]
    start = time.monotonic()
    killed: list[tuple[float, int]] = []
    command, log = ["jobs/synthesize.py", "--config", str(folder / "job.yaml")], folder / "job.log"
    for moment in [*moments, float("inf")]:
        with ChaosCluster(server.env, nodes=0) as cluster:
            driver = cluster.run_driver(command, log)
            while driver.poll() is None and len(server.valid_answers()) < moment:
                if time.monotonic() - start > TIME_LIMIT:
                    raise TimeoutError(f"the job did not finish in {TIME_LIMIT:.0f} s:\n{log.read_text()[-4000:]}")
                time.sleep(0.1)
            if driver.poll() is None:
                killed.append((time.monotonic() - start, len(server.valid_answers())))
            elif driver.returncode:
                raise RuntimeError(f"the job failed:\n{log.read_text()[-4000:]}")
        # The end of the block kills the driver and every process of Ray.
    return killed


def compare(config: SynthesizeConfig, server: LLMServer, captions: int) -> dict[str, Any]:
    """Return counts of requests and answers, and the names of failed checks (`wrong`)."""
    report = storage.read_json(storage.join(config.output, "report.json"))
    files = list(Path(config.output, "answers").rglob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file, columns=["request", "error"]).to_pylist()]
    stored = Counter(row["request"] for row in rows)
    successful = {row["request"] for row in rows if not row["error"]}
    requests = sum(counts["requests"] for counts in report["passes"].values())
    failed = sum(sum(counts["failed"].values()) for counts in report["passes"].values())
    valid = server.valid_answers()
    repeated = {request: count for request, count in valid.items() if count > 1}
    pairs = sum(len(read_records(storage.join(config.output, f"{split}.json"))) for split in SPLITS)
    rejected = pq.read_metadata(Path(config.output, "rejected/questions.parquet")).num_rows
    checks = {
        "two requests per caption": report["passes"]["write"]["requests"] == 2 * captions,
        "one stored answer per request": len(stored) == requests and set(stored.values()) == {1},
        "successful requests received an answer": successful <= set(server.answers_sent())
        and len(successful) + failed == requests,
        "sum of pairs": report["requested"] == report["accepted"] + report["rejected"] + report["failed"],
        "pairs in the folder": (pairs, rejected) == (report["accepted"] + captions, report["rejected"]),
        "no answer files remain": not storage.list_folder(storage.join(config.output, "arriving")),
    }
    return {
        "requests": requests,
        "arrivals": server.requests.total(),
        "faults": server.faults.total(),
        "completions": sum(counts["completions"] for counts in report["passes"].values()),
        "http_retries": sum(counts["retries"] for counts in report["passes"].values()),
        "again": len(repeated),
        "written_twice": sum(count > 1 for count in server.generated.values()),
        **{name: report[name] for name in ("requested", "accepted", "rejected", "failed", "rejected_by_reason")},
        "failed_requests": failed,
        "wrong": [name for name, holds in checks.items() if not holds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), arguments.captions, arguments.kills, arguments.seed)
    in_flight = arguments.kills * 2 * 16  # at most: kills x actors x endpoint.concurrency
    print(json.dumps(result | {"again_at_most": in_flight}))
    sys.exit(bool(result["wrong"] or result["written_twice"] or result["again"] > in_flight))


if __name__ == "__main__":
    main()
