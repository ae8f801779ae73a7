"""The page at `/` in a headless Chromium: clips, questions and answers as a person meets them."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Route,
    expect,
)
from transformers.audio_utils import hertz_to_mel

from mellow_platform.data.audio import decode, encode
from tests.conftest import REPOSITORY

RATE = 32_000
ARTEFACTS = REPOSITORY / "runs" / "artefacts"
CHAT = re.compile("/v1/chat/completions$")
MODELS = re.compile("/v1/models$")
QUESTION = "what is heard?"
GUTTER, FOOT = 36, 20  # pixels of the axes, left of the plots and below the spectrogram
Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, endpoint: str) -> Iterator[Open]:
    """Opens the page, and makes sure at the end that it was without faults and asked nobody else for anything."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []
    refused: set[int] = set()

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            faults.append(message.text)

    def watch(request: Request) -> None:
        if not request.url.startswith((endpoint, "blob:")):
            faults.append(f"{request.url} was asked for")

    def visit(
        refuses: tuple[int, ...] = (), prepare: Callable[[Page], Any] = lambda page: None, **options: Any
    ) -> Page:
        """`refuses`: statuses that the test provokes, which the browser itself reports to its console."""
        refused.update(refuses)
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("console", hear)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", watch)
        prepare(page)
        page.goto(f"{endpoint}/")
        return page

    yield visit
    for context in contexts:
        context.close()
    provoked = tuple(f"Failed to load resource: the server responded with a status of {status}" for status in refused)
    assert [fault for fault in faults if not (provoked and fault.startswith(provoked))] == []


@pytest.fixture(scope="module")
def sounds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two recordings, the longer one first; where there are none, two generated clips."""
    try:
        folder = request.getfixturevalue("real_sounds")
        files = [folder / entry["file"] for entry in json.loads((folder / "labels.json").read_text())]
        files.sort(key=lambda file: soundfile.info(file).duration)
        return [files[-1], files[len(files) // 2]]
    except pytest.skip.Exception:
        folder = tmp_path_factory.mktemp("sounds")
        swelling = [tone(seconds, 300.0 * seconds) * np.hanning(seconds * RATE) for seconds in (4, 2)]
        return [write(folder / f"{number}.wav", waveform) for number, waveform in enumerate(swelling)]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second of silence and one of a tone of 2 kHz, which any of the page's steps would leave as it is."""
    return write(tmp_path_factory.mktemp("short") / "tone.wav", np.concatenate([np.zeros(RATE), tone(1, 2000)]))


def tone(seconds: float, hertz: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


def write(path: Path, waveform: np.ndarray) -> Path:
    path.write_bytes(encode(waveform, RATE, "WAV"))
    return path


def pick(page: Page, *files: Path) -> None:
    """Choose files in the page's file dialogue, and wait until they are clips."""
    clips = page.locator(".clip")
    wanted = clips.count() + len(files)
    page.set_input_files("#file", list(files))
    expect(clips).to_have_count(wanted)


def ask(page: Page, question: str = QUESTION) -> str:
    """Ask, wait for the end of the answer, and return it."""
    page.fill("#question", question)
    page.click("#ask")
    return answered(page)


def answered(page: Page) -> str:
    expect(page.locator("#answer-facts")).to_contain_text("in all", timeout=30_000)
    return page.locator("#answer").inner_text().strip()


def sent(request: Request) -> tuple[str, list[np.ndarray]]:
    """Return the question and the clips of a request."""
    assert request.post_data
    parts = json.loads(request.post_data)["messages"][0]["content"]
    audio = [base64.b64decode(part["input_audio"]["data"]) for part in parts if part["type"] == "input_audio"]
    return parts[0]["text"], [soundfile.read(io.BytesIO(file), dtype="float32")[0] for file in audio]


def pixels(canvas: Locator) -> np.ndarray:
    """Return what a canvas shows, [rows, columns, RGBA]."""
    png = canvas.evaluate("canvas => canvas.toDataURL()").partition(",")[2]
    return (255 * imread(io.BytesIO(base64.b64decode(png)))).astype(int)


def stream(*events: str) -> dict[str, Any]:
    """Return the response that streams `events`, for `route.fulfill`."""
    return {"content_type": "text/event-stream", "body": "".join(f"data: {event}\n\n" for event in events)}


def chunk(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


def refusal(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})


def fits(page: Page) -> bool:
    """Whether nothing of the page is beyond the right edge of the screen."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_picked_recording_is_drawn_and_its_answer_streams_in_as_the_api_gives_it(visit: Open, sounds: list[Path]):
    page = visit()
    pick(page, sounds[0])
    for name in ("waveform", "spectrogram"):
        assert len(np.unique(pixels(page.locator(f".{name}")).reshape(-1, 4), axis=0)) > 3, f"{name} is blank"

    page.evaluate("""() => {
        window.texts = [];
        const answer = document.querySelector("#answer");
        new MutationObserver(() => window.texts.push(answer.textContent))
            .observe(answer, { childList: true, characterData: true, subtree: true });
    }""")
    with page.expect_request(CHAT) as asked:
        answer = ask(page)
    whole = page.request.post(asked.value.url, data=json.loads(asked.value.post_data or "") | {"stream": False})
    assert answer == whole.json()["choices"][0]["message"]["content"].strip()
    texts = [text for text in page.evaluate("window.texts") if text and answer.startswith(text.rstrip())]
    assert len(set(texts)) > 1, "the answer came in one piece"
    assert texts == sorted(texts, key=len)
    expect(page.locator("#answer-facts")).to_contain_text(re.compile(r"first word after \d+\.\d\d s"))
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / "page-desktop.png", full_page=True)


def test_what_is_sent_are_the_samples_of_the_file(visit: Open, short: Path):
    page = visit()
    pick(page, short)
    with page.expect_request(CHAT) as asked:
        ask(page)
    question, (heard,) = sent(asked.value)
    assert question == QUESTION
    np.testing.assert_array_equal(heard, decode(short.read_bytes(), RATE))


def test_the_pictures_show_when_how_loud_and_how_high_it_sounds_in_light_and_dark(visit: Open, short: Path):
    page = visit(color_scheme="light")
    pick(page, short)
    wave = pixels(page.locator(".waveform"))[:, GUTTER:]
    heights = (wave[..., 3] > 128).sum(0)
    middle = len(heights) // 2
    assert heights[: middle - 4].max() <= 3
    assert heights[middle + 4 : -4].min() > 0.9 * len(wave)

    mels = hertz_to_mel(np.array([50.0, 2000.0, 14_000.0]), mel_scale="slaney")
    height = 1 - (mels[1] - mels[0]) / (mels[2] - mels[0])
    corners = []
    for scheme, loudest in (("light", np.argmin), ("dark", np.argmax)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]  # a literal in a tuple
        # The page draws again in the frame after the change.
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        picture = pixels(page.locator(".spectrogram"))[:-FOOT, GUTTER:, :3].sum(-1)
        assert loudest(picture[:, picture.shape[1] * 3 // 4]) / len(picture) == pytest.approx(height, abs=0.02)
        assert np.ptp(picture[:, picture.shape[1] // 4]) < 10, "silence has a shade"
        corners.append(picture[0, 0])
    assert corners[0] > 600 and corners[1] < 150


def test_two_dropped_clips_are_asked_about_in_their_order_and_swapped(visit: Open, sounds: list[Path]):
    page = visit()
    files = [{"name": path.name, "data": base64.b64encode(path.read_bytes()).decode()} for path in sounds]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const { name, data } of files)
                transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name));
            return transfer;
        }""",
        files,
    )
    page.dispatch_event("#adder", "drop", {"dataTransfer": transfer})
    expect(page.locator(".clip .place")).to_have_text(["First", "Second"])
    expect(page.locator(".clip .name")).to_have_text([path.name for path in sounds])
    expect(page.locator("#adder")).to_be_hidden()

    lengths = []
    for _ in range(2):
        with page.expect_request(CHAT) as asked:
            ask(page)
        lengths.append([len(clip) for clip in sent(asked.value)[1]])
        page.click("#swap")
    wanted = [round(RATE * min(10, soundfile.info(path).duration)) for path in sounds]
    np.testing.assert_allclose(lengths, [wanted, wanted[::-1]], atol=1)  # resampled
    expect(page.locator("#earlier li")).to_have_count(2)

    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#sound-error")).to_contain_text("two clips already")
    page.get_by_role("button", name=f"Remove {sounds[0].name}").click()
    expect(page.locator(".clip .name")).to_have_text([sounds[1].name])
    expect(page.locator("#adder")).to_be_visible()


def test_an_example_fills_in_the_question_and_there_are_others_for_two_clips(visit: Open, short: Path):
    page = visit()
    examples = page.locator("#examples button")
    first = examples.nth(1).inner_text()
    examples.nth(1).click()
    expect(page.locator("#question")).to_have_value(first)
    pick(page, short)
    pick(page, short)
    expect(page.get_by_role("button", name=first)).to_have_count(0)
    examples.first.click()
    assert "two audios" in page.input_value("#question")


def test_the_keyboard_alone_adds_plays_asks_and_stops(visit: Open, tmp_path: Path):
    file = write(tmp_path / "tone.wav", tone(8, 500))
    page = visit(prepare=lambda page: page.on("filechooser", lambda chooser: chooser.set_files(file)))

    def tab_to(selector: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.locator(selector).evaluate("element => element === document.activeElement"):
                return
        pytest.fail(f"Tab does not reach {selector}")

    tab_to("#file")
    page.keyboard.press("Enter")
    expect(page.locator(".clip")).to_have_count(1)
    page.locator("h1").click()  # where Tab begins again
    tab_to(".clip .play")
    outline = page.locator(".clip .play").evaluate("element => getComputedStyle(element).outlineStyle")
    assert outline == "solid", "the focus cannot be seen"
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Pause tone.wav")).to_be_visible()
    expect(page.locator(".clip .time")).to_have_text(re.compile(r"^(0\.[3-9]|[1-7]\.\d) / 8\.0 s$"))
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Play tone.wav")).to_be_visible()
    tab_to(".clip .seek")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".clip .time")).to_have_text(re.compile(r"^0\.1 / 8\.0 s$"))
    tab_to("#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Control+Enter")
    assert answered(page)

    page.route(CHAT, lambda route: None)  # and it never gets an answer
    with page.expect_event("requestfailed") as failed:
        with page.expect_request(CHAT):
            page.keyboard.press("Control+Enter")
        page.keyboard.press("Escape")
    assert failed.value.failure == "net::ERR_ABORTED"
    expect(page.locator("#answer")).to_have_text("Stopped before the first word.")
    page.unroute(CHAT)
    page.keyboard.press("Control+Enter")
    assert answered(page)


def test_a_phone_shows_everything_without_scrolling_sideways(visit: Open, sounds: list[Path]):
    page = visit(viewport={"width": 360, "height": 740}, device_scale_factor=2, is_mobile=True, has_touch=True)
    assert fits(page)
    pick(page, sounds[0])
    assert fits(page)
    pick(page, sounds[1])
    page.locator("#examples button").first.tap()
    page.fill("#question", QUESTION)
    page.locator("#ask").tap()
    answered(page)
    expect(page.locator("#answer")).to_be_in_viewport()
    assert fits(page)
    for button in page.locator("button:visible, .picker:visible").all():
        box = button.bounding_box()
        assert box and min(box["width"], box["height"]) >= 44, f"{button.inner_text()!r} is small for a finger"
    page.screenshot(path=ARTEFACTS / "page-phone.png", full_page=True)


def test_a_long_recording_is_cut_to_what_the_model_hears_and_that_is_said(visit: Open, tmp_path: Path):
    page = visit()
    pick(page, write(tmp_path / "long.wav", tone(34, 500)))
    expect(page.locator(".clip .note")).to_have_text("the model hears the first 10 s of 34.0 s")
    with page.expect_request(CHAT) as asked:
        ask(page)
    assert len(sent(asked.value)[1][0]) == 10 * RATE


def test_a_silent_clip_looks_silent_and_is_said_to_be(visit: Open, tmp_path: Path):
    page = visit(color_scheme="light")
    pick(page, write(tmp_path / "silence.wav", np.zeros(RATE)))
    expect(page.locator(".clip .note")).to_have_text("this clip is silent")
    assert pixels(page.locator(".spectrogram"))[:-FOOT, GUTTER:, :3].min() > 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a sound at all", "notes.txt: your browser cannot read this as sound"),
        (b"", "notes.txt: the file is empty"),
    ],
    ids=["text", "empty"],
)
def test_a_file_that_is_no_sound_is_named(visit: Open, tmp_path: Path, short: Path, content: bytes, message: str):
    page = visit()
    (tmp_path / "notes.txt").write_bytes(content)
    page.set_input_files("#file", tmp_path / "notes.txt")
    expect(page.locator("#sound-error")).to_contain_text(message)
    expect(page.locator(".clip")).to_have_count(0)
    pick(page, short)
    expect(page.locator("#sound-error")).to_be_empty()


def test_what_is_missing_for_a_question_is_said(visit: Open, short: Path):
    page = visit()
    page.click("#ask")
    expect(page.locator("#answer-error")).to_contain_text("Add a sound first")
    pick(page, short)
    page.click("#ask")
    expect(page.locator("#answer-error")).to_contain_text("Write a question first")
    expect(page.locator("#question")).to_be_focused()


def test_a_recording_becomes_a_clip_when_it_is_stopped(visit: Open):
    page = visit()
    page.click("#record")
    expect(page.locator("#record-stop")).to_be_focused()
    expect(page.locator("#countdown")).to_have_text(re.compile(r"^[78]\.\d s left$"))  # a beep a second: one is in it
    page.keyboard.press("Enter")
    expect(page.locator(".clip .name")).to_have_text("Recording 1")
    expect(page.locator(".clip .play")).to_be_focused()
    expect(page.locator(".clip .note")).to_be_empty()  # it is not silent
    with page.expect_request(CHAT) as asked:
        ask(page)
    heard = sent(asked.value)[1][0]
    assert RATE < len(heard) < 6 * RATE
    assert np.abs(heard).max() > 0.05

    page.click("#record")
    expect(page.locator("#recorder")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#recorder")).to_be_hidden()
    expect(page.locator(".clip")).to_have_count(1)


def test_a_recording_ends_by_itself_after_ten_seconds(visit: Open):
    page = visit(prepare=lambda page: page.clock.install())
    page.click("#record")
    expect(page.locator("#recorder")).to_be_visible()
    page.clock.run_for(9_000)
    expect(page.locator("#countdown")).to_have_text(re.compile(r"^(1\.\d|0\.[5-9]) s left$"))
    page.clock.run_for(1_500)
    expect(page.locator(".clip .name")).to_have_text("Recording 1")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', 'NotAllowedError') }",
            "was not allowed to use the microphone",
        ),
        (
            "Object.defineProperty(navigator, 'mediaDevices', { value: undefined });"
            "Object.defineProperty(window, 'isSecureContext', { value: false })",
            "only on secure pages",
        ),
    ],
    ids=["denied", "insecure"],
)
def test_why_there_is_no_recording_is_said(visit: Open, script: str, message: str):
    page = visit(prepare=lambda page: page.add_init_script(script))
    page.click("#record")
    expect(page.locator("#sound-error")).to_contain_text(message)
    expect(page.locator("#recorder")).to_be_hidden()


def test_a_refused_question_shows_the_reason_of_the_server(visit: Open, short: Path):
    page = visit(refuses=(400,))
    pick(page, short)
    page.fill("#question", "what is this? " * 200)
    page.click("#ask")
    expect(page.locator("#answer-error")).to_contain_text("shorten it")
    expect(page.locator("#ask")).to_have_attribute("aria-disabled", "false")
    assert ask(page)
    expect(page.locator("#answer-error")).to_be_empty()


@pytest.mark.parametrize(
    ("response", "message", "kept"),
    [
        (
            {"status": 429, "headers": {"Retry-After": "7"}, "body": refusal("the queue is full")},
            "The server is busy (the queue is full). Try again in 7 s.",
            "",
        ),
        ({"status": 502, "body": "<html>"}, "The server answered 502", ""),
        (stream(chunk("a loud "), refusal("the replica is gone")), "the replica is gone", "a loud"),
        (stream(chunk("a loud "), chunk("tone")), "The connection ended before the answer did.", "a loud tone"),
        (stream("{"), "cannot be read", ""),
    ],
    ids=["busy", "proxy", "error in the stream", "cut stream", "not JSON"],
)
def test_a_fault_of_the_server_is_shown_and_what_was_written_stays(
    visit: Open, short: Path, response: dict[str, Any], message: str, kept: str
):
    page = visit(refuses=(response.get("status", 200),))
    pick(page, short)
    page.route(CHAT, lambda route: route.fulfill(**response))
    page.fill("#question", QUESTION)
    page.click("#ask")
    expect(page.locator("#answer-error")).to_contain_text(message)
    expect(page.locator("#answer")).to_have_text(kept)


def test_a_server_that_asks_for_a_key_gets_it_and_it_is_kept_in_the_tab_only(visit: Open, short: Path):
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, body=refusal("no such key"))

    page = visit(refuses=(401,), prepare=lambda page: page.route(re.compile("/v1/"), guard))
    expect(page.locator("#key-message")).to_contain_text("those who have a key")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-message")).to_contain_text("did not take this key")
    pick(page, short)
    page.fill("#question", QUESTION)
    page.click("#ask")
    expect(page.locator("#key")).to_be_focused()  # the question was refused as well, and is what waits for the key
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    assert answered(page), "the question was not asked again"
    expect(page.locator("#key-row")).to_be_hidden()
    assert "secret" not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
    page.reload()
    expect(page.locator("#examples button").first).to_be_visible()
    expect(page.locator("#key-row")).to_be_hidden()


def test_models_are_chosen_from_where_there_are_several(visit: Open, short: Path):
    page = visit()
    pick(page, short)
    with page.expect_request(CHAT) as asked:
        ask(page)
    assert json.loads(asked.value.post_data or "")["model"] == "mellow"
    expect(page.locator("#model")).to_be_hidden()

    several = json.dumps({"object": "list", "data": [{"id": "mellow"}, {"id": "mellow-large"}]})
    page = visit(prepare=lambda page: page.route(MODELS, lambda route: route.fulfill(body=several)))
    page.route(CHAT, lambda route: route.fulfill(**stream(chunk("a tone", "stop"), "[DONE]")))
    pick(page, short)
    page.select_option("#model", "mellow-large")
    with page.expect_request(CHAT) as asked:
        assert ask(page) == "a tone"
    assert json.loads(asked.value.post_data or "")["model"] == "mellow-large"


def test_the_page_is_served_under_a_policy_that_lets_in_nothing_foreign(visit: Open, endpoint: str):
    page = visit()
    headers = page.request.get(f"{endpoint}/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
