"""How fast the endpoint answers, what HTTP and Serve cost, and how it scales under a step of load.

python tests/benchmarks/serving.py             # a random tiny model, eight minutes on two cores
python tests/benchmarks/serving.py --quick     # three concurrencies and no scaling, two minutes

The cost of HTTP and Serve is the median of answers over HTTP less that of decoding the same file and calling the same
engine in this process, in turn, one at a time: for 10-second clips of the built-in corpus, as FLAC, and for noise as
WAV, which is the largest that a clip gets (850 KB in base64). Latencies are of streams, seen by a client on the same
machine, whose cores it shares. The step of load is more than one replica's `target_ongoing_requests`, with the delays
of serve/config.yaml. Clients do not repeat what fails.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tests  # noqa: F401  # its token for Ray, before Ray is imported

# isort: split
import httpx
from matplotlib.ticker import LogFormatter

from mellow_platform.data import builtin_corpora
from mellow_platform.data.audio import decode
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.request import Request
from mellow_platform.plot_style import BLUE, png, styled_figure
from tests.benchmarks.recorded import add_record_option, report
from tests.conftest import REPOSITORY
from tests.serve_app import RATE, Change, ServedModel, clip, question

CLIPS = 32  # different ones; questions about a clip that was asked about before find it in a cache
TOKENS = 16
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
STEP = 40  # clients at once, for which one replica's 16 are too few and those of three enough
STEP_TOKENS = 200  # so many that requests spend their time with the model, and not on the way to it
QUIET_SECONDS = 10.0  # before the step, and at its full height
PICTURE = REPOSITORY / "runs/benchmarks/serving.png"


@dataclass(frozen=True)
class Answered:
    """A request as its client saw it: when sent, seconds to the first token and to the end, whether it has one."""

    sent: float
    first: float
    total: float
    whole: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer concurrencies, and no scaling")
    parser.add_argument("--rounds", type=int, default=200, help="answers of each kind that the overhead is measured on")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load at each concurrency")
    add_record_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ServedModel(Path(folder), at_most(1)) as served:
        sounds = [builtin_corpora.scene_clip(0, "test", number)[1] for number in range(CLIPS)]
        results: dict[str, Any] = overhead(served, sounds, arguments.rounds)
        large = overhead(served, [clip(seed) for seed in range(CLIPS)], arguments.rounds)
        results["http_overhead_wav_ms_p50"] = large["http_overhead_ms_p50"]
        concurrencies = CONCURRENCIES[::3] if arguments.quick else CONCURRENCIES
        results["latencies"] = [latencies(served, sounds, count, arguments.seconds) for count in concurrencies]
        results["failed"] = sum(row["failed"] for row in results["latencies"])
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as folder, ServedModel(Path(folder), at_most(3)) as served:
            scaled = scaling(served, sounds)
            results["failed"] += scaled.pop("failed")
            results |= scaled
    report("serving", results, arguments.record)


def at_most(replicas: int) -> Change:
    """Return the change to serve/config.yaml that lets the model have so many replicas."""

    def change(endpoint: dict[str, Any], model: dict[str, Any]) -> None:
        model["deployments"][0]["autoscaling_config"]["max_replicas"] = replicas

    return change


def overhead(served: ServedModel, sounds: list[bytes], rounds: int) -> dict[str, float]:
    """Return the medians of answers over HTTP and by the engine in this process, and their difference, in ms."""
    http, direct = [], []
    with Engine.load(served.model, cpu_threads=1) as engine, httpx.Client(base_url=served.url, timeout=60) as client:
        for number in range(-10, rounds):  # those before 0 warm up
            sound = sounds[number % CLIPS]
            body = question(sound, max_tokens=TOKENS)
            start = time.perf_counter()
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            between = time.perf_counter()
            request = Request("what is heard?", (decode(sound, RATE),), max_new_tokens=TOKENS)
            answer = engine.submit(request).result()
            end = time.perf_counter()
            if (said := response.raise_for_status().json()["choices"][0]["message"]["content"]) != answer.text:
                raise RuntimeError(f"over HTTP the answer is {said!r}, the engine's is {answer.text!r}")
            if number >= 0:
                http.append(1000 * (between - start))
                direct.append(1000 * (end - between))
    medians = statistics.median(http), statistics.median(direct)
    print(f"{rounds} answers one at a time: {medians[0]:.1f} ms over HTTP, {medians[1]:.1f} ms by the engine (medians)")
    return {
        "http_overhead_ms_p50": round(medians[0] - medians[1], 1),
        "http_ms_p50": round(medians[0], 1),
        "direct_ms_p50": round(medians[1], 1),
    }


async def ask(client: httpx.AsyncClient, body: bytes) -> Answered:
    """Read a stream to its end."""
    sent = time.perf_counter()
    first, whole = 0.0, False
    try:
        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
            async for line in response.aiter_lines():
                first = first or (time.perf_counter() - sent if '"logprobs"' in line and '"role"' not in line else 0.0)
                whole = whole or line == "data: [DONE]"
    except httpx.HTTPError as error:
        print(f"failed: {error!r}")
    return Answered(sent, first, time.perf_counter() - sent, whole)


async def load(
    url: str,
    sounds: list[bytes],
    concurrency: int,
    over: Callable[[], bool],
    done: list[Answered],
    tokens: int = TOKENS,
) -> None:
    """Have so many clients ask one question after the other until it is over."""
    bodies = [question(sound, max_tokens=tokens, stream=True) for sound in sounds]
    limits = httpx.Limits(max_connections=concurrency)

    async def client_of(number: int, client: httpx.AsyncClient) -> None:
        while not over():
            done.append(await ask(client, bodies[number % CLIPS]))
            number += concurrency

    async with httpx.AsyncClient(base_url=url, timeout=180, limits=limits) as client:
        await asyncio.gather(*(client_of(number, client) for number in range(concurrency)))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 of seconds, in ms."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{share}": round(1000 * cuts[share - 1], 1) for share in (50, 95, 99)}


def latencies(served: ServedModel, sounds: list[bytes], concurrency: int, seconds: float) -> dict[str, Any]:
    """Measure requests a second, time to first token and total at one concurrency."""
    done: list[Answered] = []
    start = time.perf_counter()
    asyncio.run(load(served.url, sounds, concurrency, lambda: time.perf_counter() > start + seconds, done))
    took = time.perf_counter() - start
    row: dict[str, Any] = {
        "concurrency": concurrency,
        "requests_per_second": round(len(done) / took, 1),
        "first_token_ms": percentiles([answered.first for answered in done]),
        "total_ms": percentiles([answered.total for answered in done]),
        "failed": sum(not answered.whole for answered in done),
    }
    first, total = row["first_token_ms"], row["total_ms"]
    print(
        f"{concurrency:3d} at once: {row['requests_per_second']:6.1f} requests/s; first token "
        f"{' / '.join(f'{value:.0f}' for value in first.values())} ms, whole "
        f"{' / '.join(f'{value:.0f}' for value in total.values())} ms (p50 / p95 / p99); {row['failed']} failed"
    )
    return row


def scaling(served: ServedModel, sounds: list[bytes]) -> dict[str, Any]:
    """Put a step of load on the endpoint until three replicas run, take it away until one does; draw it."""
    done: list[Answered] = []
    counts: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            counts.append((time.perf_counter(), len(served.replicas("mellow"))))
            over.wait(0.5)

    def until(count: int, seconds: float = 300.0) -> float:
        start = time.perf_counter()
        while not counts or counts[-1][1] != count:
            if time.perf_counter() - start > seconds:
                raise TimeoutError(f"{counts[-1:]} replicas, expected {count} within {seconds:g} s")
            time.sleep(0.1)
        return time.perf_counter() - start

    enough = threading.Event()
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        until(1)
        quiet = time.perf_counter() + QUIET_SECONDS
        asyncio.run(load(served.url, sounds, 1, lambda: time.perf_counter() > quiet, done))
        step = threading.Thread(
            target=lambda: asyncio.run(load(served.url, sounds, STEP, enough.is_set, done, STEP_TOKENS))
        )
        step.start()
        up = until(3)
        time.sleep(QUIET_SECONDS)
        enough.set()
        step.join()
        down = until(1)
    finally:
        enough.set()
        over.set()
        watching.join()
    draw(counts, done)
    print(f"from 1 to 3 replicas in {up:.0f} s of load, back in {down:.0f} s without; picture: {PICTURE}")
    return {
        "scale_up_s": round(up, 1),
        "scale_down_s": round(down, 1),
        "failed": sum(not answered.whole for answered in done),
    }


def draw(counts: list[tuple[float, int]], done: list[Answered]) -> None:
    """Draw replicas and latency over time."""
    start = counts[0][0]
    with styled_figure(9, 5) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        above.step([at - start for at, _ in counts], [count for _, count in counts], where="post", color=BLUE)
        above.set(ylabel="replicas", ylim=(0, 3.5), title=f"A step of {STEP} clients on the tiny model, two cores")
        below.scatter([one.sent - start for one in done], [1000 * one.total for one in done], s=4, color=BLUE, lw=0)
        below.set(ylabel="whole answer (ms)", xlabel="seconds", yscale="log")
        below.yaxis.set_major_formatter(LogFormatter())
        below.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        for axis in (above, below):
            axis.grid()
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_bytes(png(figure))


if __name__ == "__main__":
    main()
