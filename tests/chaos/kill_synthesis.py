"""Kill a synthesis job, driver and Ray together, at seeded random moments, and count what was asked, answered and kept.

python tests/chaos/kill_synthesis.py --captions 2000 --kills 2 --seed 0      # about three minutes on two cores

A language model's server that fails one request in seven and writes one answer in fourteen out of form
(`tests/llm_server.py`), and one job that is submitted again whenever it was killed. For every request the server counts
how often it was asked and sent an answer in form, and for every prompt with its seed, whatever the request's key, how
often it wrote an answer. The promise is that one answer to every request is kept, and that none is asked for again once
it is: `again` are requests that got a second answer in form, which can only be such as were on their way at a kill, and
of which the server, knowing their keys, wrote none anew (`written_twice`).

The last line is JSON; the exit code is 1 if a request is lost or there twice, if more was asked again than was on its
way, or if the report does not add up with what is in the folder.
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

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder alone would be on it

import tests  # noqa: F401  # its token for Ray, before Ray is imported

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
FAULTS, OUT_OF_FORM, SLIPS = 0.15, 0.07, 0.15
SOUNDS = [
    f"{how} {what} {does}"
    for how in ("an old", "a small", "a large", "a distant", "a wooden", "a metal")
    for what, does in (
        ("dog", "barks"), ("door", "creaks"), ("engine", "idles"), ("bird", "sings"), ("clock", "ticks"),
        ("crowd", "murmurs"), ("kettle", "whistles"), ("train", "passes"), ("pump", "hums"), ("drum", "booms"),
    )
]  # fmt: skip


def write_captions(uri: str, count: int, seed: int) -> None:
    """Write captions of so many clips in AudioCaps' layout, no two alike."""
    rng = random.Random(seed)
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for number in range(count):
        first, second = rng.sample(SOUNDS, 2)
        lines.append(f"{number},clip{number:05d},{number % 300},{first} while {second} number {number}")
    storage.write_bytes(uri, "\n".join(lines).encode())


def run(folder: Path, captions: int, kills: int, seed: int) -> dict[str, Any]:
    """Run the experiment in `folder`; print a table, and return what is to be reported."""
    write_captions(str(folder / "train.csv"), captions, seed)
    config = SynthesizeConfig(
        captions=[str(folder / "train.csv")],
        output=str(folder / "out"),
        writer="endpoint",
        kinds=["detail", "mcq"],
        rows_per_part=128,
        endpoint={"concurrency": 16, "retries": 12},
    )
    begun = time.monotonic()
    with llm_server(FAULTS, OUT_OF_FORM, SLIPS, seed) as server:
        killed = _disturb(config, server, folder, kills, random.Random(seed))
        seconds = time.monotonic() - begun
        found = compare(config, server, captions)
    print(f"{'kill':>4}  {'after':>7}  answers so far")
    for number, (after, answers) in enumerate(killed, 1):
        print(f"{number:4d}  {after:6.1f}s  {answers}")
    print(f"faults: {dict(server.faults)}; {server.most_at_once} requests at once at most")
    return {"captions": captions, "kills": len(killed)} | found | {"seconds": round(seconds, 1)}


def _disturb(
    config: SynthesizeConfig, server: LLMServer, folder: Path, kills: int, rng: random.Random
) -> list[tuple[float, int]]:
    """Run the job to its end; end its driver and its Ray with SIGKILL after random numbers of answers.

    Returns:
        Seconds since the start and answers so far at every kill.
    """
    (folder / "job.yaml").write_text(json.dumps(config.model_dump()))
    expected = 2.5 * len(plan(read_captions(config.captions, "", config.clip_name), config))  # with those of checks
    moments = [(number + rng.uniform(0.1, 0.8)) / kills * 0.95 * expected for number in range(kills)]
    begun = time.monotonic()
    killed: list[tuple[float, int]] = []
    command, log = ["jobs/synthesize.py", "--config", str(folder / "job.yaml")], folder / "job.log"
    for moment in [*moments, float("inf")]:
        with ChaosCluster(server.env, nodes=0) as cluster:
            driver = cluster.run_driver(command, log)
            while driver.poll() is None and len(server.answered()) < moment:
                if time.monotonic() - begun > TIME_LIMIT:
                    raise TimeoutError(f"the job did not end:\n{log.read_text()[-4000:]}")
                time.sleep(0.1)
            if driver.poll() is None:
                killed.append((time.monotonic() - begun, len(server.answered())))
            elif driver.returncode:
                raise RuntimeError(f"the job failed:\n{log.read_text()[-4000:]}")
        # The end of the block has killed the driver and every process of Ray.
    return killed


def compare(config: SynthesizeConfig, server: LLMServer, captions: int) -> dict[str, Any]:
    """Return what was asked, sent and kept, and what of it does not add up (`wrong`)."""
    report = storage.read_json(storage.join(config.output, "report.json"))
    files = list(Path(config.output, "answers").rglob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file, columns=["request", "error"]).to_pylist()]
    kept = Counter(row["request"] for row in rows)
    good = {row["request"] for row in rows if not row["error"]}
    requests = sum(counts["requests"] for counts in report["passes"].values())
    failed = sum(sum(counts["failed"].values()) for counts in report["passes"].values())
    answered = server.answered()
    again = {request: count for request, count in answered.items() if count > 1}
    pairs = sum(len(read_records(storage.join(config.output, f"{split}.json"))) for split in SPLITS)
    rejected = pq.read_metadata(Path(config.output, "rejected/questions.parquet")).num_rows
    checks = {
        "two requests a caption": report["passes"]["write"]["requests"] == 2 * captions,
        "an answer kept of every request, and one": len(kept) == requests and set(kept.values()) == {1},
        "an answer was sent of every request that did not fail": good <= set(server.replied())
        and len(good) + failed == requests,
        "pairs add up": report["requested"] == report["accepted"] + report["rejected"] + report["failed"],
        "pairs are those in the folder": (pairs, rejected) == (report["accepted"] + captions, report["rejected"]),
        "nothing that arrived is left": not storage.list_folder(storage.join(config.output, "arriving")),
    }
    return {
        "requests": requests,
        "arrivals": server.asked.total(),
        "faults": server.faults.total(),
        "completions": sum(counts["completions"] for counts in report["passes"].values()),
        "http_retries": sum(counts["retries"] for counts in report["passes"].values()),
        "again": len(again),
        "written_twice": sum(count > 1 for count in server.written.values()),
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
    in_flight = arguments.kills * 2 * 16  # at most: kills, actors, and what each of these asks at once
    print(json.dumps(result | {"again_at_most": in_flight}))
    sys.exit(bool(result["wrong"] or result["written_twice"] or result["again"] > in_flight))


if __name__ == "__main__":
    main()
