"""Benchmarks: which questions each asks, MMAU's official matching, reports, comparison and gate, without a model."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser

from mellow_platform import storage
from mellow_platform.data.records import Record, write_records
from mellow_platform.evaluation.benchmarks import MMAU
from mellow_platform.evaluation.dataset import QuestionSource
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.evaluate_job import evaluate
from mellow_platform.evaluation.evaluation_report import markdown
from tests.conftest import REPOSITORY, SHARED
from tests.small_corpus import write_corpus

MMAU_FILE = SHARED / "data" / "mmau" / "mmau-test-mini.json"
KINDS = (
    "right", "wrong", "several", "all", "empty", "missing word", "other wording", "punctuation", "upper case",
    "right with a word of a wrong one", "letter", "blank",
)  # fmt: skip


@pytest.fixture(scope="module")
def mmau() -> list[dict[str, Any]]:
    if not MMAU_FILE.is_file():
        pytest.skip(f"{MMAU_FILE} is absent: no questions of MMAU")
    return json.loads(MMAU_FILE.read_text())


def made_up(entry: dict[str, Any], kind: str) -> str:
    """Return an answer of one kind to a question of MMAU."""
    answer = entry["answer"]
    wrong = [choice for choice in entry["choices"] if choice != answer]
    return {
        "right": answer,
        "wrong": wrong[0],
        "several": f"{answer} or {wrong[-1]}",
        "all": ", ".join(entry["choices"]),
        "empty": "",
        "missing word": " ".join(answer.split()[1:]),
        "other wording": f"I believe the correct option would be: {' '.join(reversed(answer.split()))}",
        "punctuation": f'"{answer}"!!! ... ({answer})',
        "upper case": answer.upper(),
        "right with a word of a wrong one": f"{answer} {wrong[0].split()[0]}",
        "letter": f"{'abcdefgh'[entry['choices'].index(answer)]}) {answer}",
        "blank": " \n ",
    }[kind]


def officially_right(entry: dict[str, Any], prediction: str) -> bool:
    """MMAU's rule, word by word as its description has it."""
    said = {word.lower() for word in re.findall(r"\w+", prediction)}
    needed = {word.lower() for word in re.findall(r"\w+", entry["answer"])}
    for word in needed:
        if word not in said:
            return False
    for choice in entry["choices"]:
        for word in re.findall(r"\w+", choice.lower()):
            if word in said and word not in needed:
                return False
    return len(said) > 0


def test_made_up_answers_to_mmau_score_as_its_official_matching_has_it(mmau: list[dict[str, Any]], tmp_path: Path):
    assert len(mmau) == 1000
    seen: dict[str, set[bool]] = defaultdict(set)
    for first in range(len(KINDS)):  # so that every question is answered in every way
        kinds = [KINDS[(first + number) % len(KINDS)] for number in range(len(mmau))]
        answered = [entry | {"model_output": made_up(entry, kind)} for entry, kind in zip(mmau, kinds, strict=True)]
        expected = [officially_right(entry, entry["model_output"]) for entry in answered]
        for kind, right in zip(kinds, expected, strict=True):
            seen[kind].add(right)
        file = tmp_path / "answered.json"
        file.write_text(json.dumps(answered))
        output = tmp_path / str(first)
        report = evaluate(
            EvaluateConfig(
                benchmark=["mmau"], mmau=str(MMAU_FILE), model=f"predictions:{file}", output=str(output),
                conditions=["audio"], resamples=100, examples=0,
            )
        )["benchmarks"]["mmau"]  # fmt: skip
        assert report["scores"]["audio"]["accuracy"]["value"] == pytest.approx(sum(expected) / 1000)
        for axis in ("task", "difficulty", "sub-category"):
            groups: dict[str, list[bool]] = defaultdict(list)
            for entry, right in zip(mmau, expected, strict=True):
                groups[entry[axis]].append(right)
            assert report["groups"][axis].keys() == groups.keys()
            for name, own in groups.items():
                got = report["groups"][axis][name]
                assert got["questions"] == len(own)
                assert got["scores"]["audio"]["value"] == pytest.approx(sum(own) / len(own)), name
        scores = pq.read_table(output / "predictions.parquet")["score"].to_pylist()
        assert scores == [float(right) for right in expected]
        # The file for MMAU's own script is the benchmark's, with what was answered.
        assert json.loads((output / "mmau.json").read_text()) == answered
    assert seen["right"] == seen["punctuation"] == seen["upper case"] == {True}
    assert seen["other wording"] == {True, False}  # some of its words stand in wrong choices
    assert seen["empty"] == seen["blank"] == {False}
    # A wrong choice of the answer's words in another order is right by this rule.
    assert seen["wrong"] == seen["several"] == {True, False}


def test_what_a_model_writes_to_mmaus_prompt_is_as_right_as_what_it_means(mmau: list[dict[str, Any]]):
    source = QuestionSource(EvaluateConfig(benchmark=["mmau"], mmau=str(MMAU_FILE), model="random", output="/o"))
    benchmark = MMAU()
    items = benchmark.records(source)
    for entry, item in zip(mmau, items, strict=True):
        letters = dict(zip(item.choices, "abcdefgh", strict=False))
        for choice in item.choices:
            right = officially_right(entry, choice)
            lettered = f"{letters[choice]}) {choice}"
            assert lettered in benchmark.prompt(item)
            for text in (choice, lettered, lettered.lower(), f"({letters[choice]}) {choice}"):
                said = benchmark.reply(item, text)
                assert benchmark.score([item], [said]).each[0] == right, (item.id, text, said)


def test_mmau_without_answers_is_written_to_be_submitted(mmau: list[dict[str, Any]], tmp_path: Path):
    unknown = [{name: value for name, value in entry.items() if name != "answer"} for entry in mmau[:20]]
    storage.write_json(str(tmp_path / "test.json"), unknown)
    config = EvaluateConfig(
        benchmark=["mmau"], mmau=str(tmp_path / "test.json"), model="random", output=str(tmp_path / "out")
    )
    report = evaluate(config)
    assert report["benchmarks"]["mmau"]["scored"] == 0
    assert "not public" in markdown(report)
    submitted = json.loads((tmp_path / "out/mmau.json").read_text())
    assert [entry["id"] for entry in submitted] == [entry["id"] for entry in unknown]
    assert all(entry["model_output"] in entry["choices"] for entry in submitted)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Questions about scenes of every kind that there is a benchmark of, and answers to them."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_corpus(str(root / "corpus"), {"train": 1, "val": 1, "test": 12})
    records = json.loads((root / "corpus/test.json").read_text())
    rows = [{"id": f"test/{number}", "prediction": record["answer"]} for number, record in enumerate(records)]
    entries = json.loads((root / "corpus/mmau.json").read_text())
    rows += [{"id": f"mmau/{entry['id']}", "prediction": entry["answer"]} for entry in entries]
    return SimpleNamespace(
        root=root,
        rows=rows,
        records=records,
        fields={"corpus": str(root / "corpus"), "mmau": str(root / "corpus/mmau.json"), "resamples": 200},
    )


def judged(corpus: SimpleNamespace, name: str, model: str, **fields: Any) -> dict[str, Any]:
    config = {"benchmark": ["all"]} | corpus.fields | {"model": model, "output": str(corpus.root / name)} | fields
    return evaluate(EvaluateConfig(**config))


@pytest.fixture(scope="module")
def truth(corpus: SimpleNamespace) -> dict[str, Any]:
    """The report on answers that are all right."""
    storage.write_json(str(corpus.root / "truth.json"), corpus.rows)
    return judged(corpus, "truth", f"predictions:{corpus.root}/truth.json")


def values(report: dict[str, Any], condition: str) -> dict[str, float]:
    return {name: own["scores"][condition][own["main"]]["value"] for name, own in report["benchmarks"].items()}


def choices_of(record: dict[str, str]) -> list[str]:
    return re.findall(r"\b[a-h]\) ", record["input"])


def test_right_answers_score_highest_in_every_benchmark_and_chance_less(truth: dict[str, Any], corpus: SimpleNamespace):
    best, drawn = values(truth, "audio"), values(truth, "chance")
    assert best.keys() == {
        "families", "mmau", "entailment", "difference", "clotho-aqa", "captioning", "mcq", "detail"
    }  # fmt: skip
    assert all(best[name] == 1 for name in ("families", "mmau", "entailment", "clotho-aqa", "mcq"))
    assert all(drawn[name] < best[name] for name in best)
    # Every choice is as likely: of a question of four, one in four is right.
    choices = [len(choices_of(record)) for record in corpus.records if record["subtype"].endswith("-MCQ")]
    assert drawn["mcq"] == pytest.approx(sum(1 / count for count in choices) / len(choices))
    assert drawn["entailment"] == pytest.approx(1 / 3)
    assert drawn["clotho-aqa"] == pytest.approx(1 / 2)


def test_a_benchmark_whose_questions_have_no_answers_is_no_score(corpus: SimpleNamespace):
    storage.write_json(str(corpus.root / "no-mmau.json"), [r for r in corpus.rows if not r["id"].startswith("mmau")])
    model = f"predictions:{corpus.root}/no-mmau.json"
    # Of all questions together they are few, and allowed; of the benchmark they are all.
    with pytest.raises(ValueError, match=r"benchmark mmau: 12 of 12 questions have no answer under audio \(no_predict"):
        judged(corpus, "no-mmau", model)
    report = judged(corpus, "no-mmau", model, max_failed_share=1.0)
    assert values(report, "audio")["mmau"] == 0
    assert report["benchmarks"]["mmau"]["no_answer"] == {"audio": {"no_prediction": 12}}
    assert "- Without an answer under audio, and so wrong: 12 no_prediction." in markdown(report)


def test_what_a_run_over_several_benchmarks_answered_is_read_back_by_benchmark(corpus: SimpleNamespace):
    # One question is in both, and is answered in two ways.
    fields = {"benchmark": ["families", "captioning"]}
    drawn = judged(corpus, "drawn", "random", **fields)
    again = judged(corpus, "drawn-again", f"predictions:{corpus.root}/drawn", **fields)
    assert values(again, "audio") == values(drawn, "audio")


def test_each_benchmark_asks_its_own_questions(truth: dict[str, Any], corpus: SimpleNamespace):
    rows = pq.read_table(corpus.root / "truth/predictions.parquet").to_pylist()
    families = defaultdict(set)
    for row in rows:
        if row["condition"] == "audio":
            families[row["benchmark"]].add(dict(row["groups"]).get("family", "").removeprefix("Scenes-"))
    assert families["entailment"] == {"Entailment"}
    assert families["difference"] == {"Difference"}
    assert families["clotho-aqa"] == {"Presence"}
    assert families["captioning"] == {"Caption"}
    assert families["detail"] == {"Detail"}
    assert families["mcq"] == {"Heard-MCQ", "Count-MCQ", "Pitch-MCQ", "Level-MCQ", "Order-MCQ", "Compare-MCQ"}
    asked = [row for row in rows if row["benchmark"] == "families" and row["condition"] == "audio"]
    assert [row["question"] for row in asked] == [record["input"] for record in corpus.records]


def test_captions_of_one_clip_are_references_of_one_question(tmp_path: Path):
    captions = ["a dog barks", "a dog is barking", "barking of a dog", "a dog", "dogs bark"]
    records = [
        Record("clothov21", clip, "", text, "", "caption the audio.", text, "Clotho.json")
        for clip in ("a.wav", "b.wav")
        for text in captions
    ]
    write_records(str(tmp_path / "test.json"), records)
    config = EvaluateConfig(
        benchmark=["captioning"], corpus=str(tmp_path), model="constant:a dog barks", output=str(tmp_path / "out")
    )
    summary = evaluate(config)["benchmarks"]["captioning"]
    assert summary["questions"] == 2
    rows = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert {tuple(row["answer"]) for row in rows} == {tuple(captions)}
    assert summary["scores"]["audio"]["BLEU-1"]["value"] == pytest.approx(1, abs=1e-6)


def test_a_constant_answer_is_right_as_often_as_it_is_the_answer(corpus: SimpleNamespace):
    report = judged(corpus, "constant", "constant:yes", benchmark=["clotho-aqa"])
    asked = [record["answer"] for record in corpus.records if record["subtype"] == "Scenes-Presence"]
    share = asked.count("yes") / len(asked)
    assert report["benchmarks"]["clotho-aqa"]["scores"]["audio"]["accuracy"]["value"] == pytest.approx(share)


def test_noise_among_the_benchmarks_is_a_condition_of_the_others():
    fields = {"model": "random", "corpus": "/c", "output": "/o", "conditions": ["audio"]}
    config = EvaluateConfig(**fields, benchmark="mcq,noise")
    assert (config.benchmark, config.conditions) == (["mcq"], ["audio", "noise"])
    with pytest.raises(ValueError, match="noise is a control on others"):
        EvaluateConfig(**fields, benchmark="noise")
    # The gate is on what is answered with audio, and must not pass for want of it.
    with pytest.raises(ValueError, match="against: scores are compared with audio: have it among the conditions"):
        EvaluateConfig(**fields | {"model": "/m", "conditions": ["noise"]}, against="/a")


def run_job(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/evaluate.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.extended
def test_a_significantly_lower_score_fails_the_job_and_a_like_one_does_not(
    truth: dict[str, Any], corpus: SimpleNamespace
):
    def gate(name: str, rows: list[dict[str, str]]) -> subprocess.CompletedProcess:
        file = corpus.root / f"{name}.json"
        file.write_text(json.dumps(rows))
        return run_job(
            "--benchmark", "mcq,entailment", "--corpus", corpus.fields["corpus"], "--model", f"predictions:{file}",
            "--output", str(corpus.root / name), "--against", str(corpus.root / "truth"),
        )  # fmt: skip

    one_wrong = [row | {"prediction": "?"} if number == 20 else row for number, row in enumerate(corpus.rows)]
    same = gate("one-wrong", one_wrong)
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout.splitlines()[-1])["lower"] == []
    third_wrong = [row | {"prediction": "?"} if number % 3 == 0 else row for number, row in enumerate(corpus.rows)]
    worse = gate("third-wrong", third_wrong)
    assert worse.returncode == 1
    assert f"significantly lower than {corpus.root}/truth: mcq accuracy" in worse.stderr
    report = json.loads((corpus.root / "third-wrong/report.json").read_text())
    row = next(row for row in report["comparison"]["differences"] if row["benchmark"] == "mcq")
    assert row["significant"]
    assert row["low"] <= row["value"] <= row["high"] < 0
    assert "| mcq " in worse.stdout
    assert " lower |" in worse.stdout


def test_the_report_is_one_page_with_tables_pictures_and_players(
    truth: dict[str, Any], corpus: SimpleNamespace, browser: Browser
):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else faults.append(request.url)
    )
    page.goto(f"file://{corpus.root}/truth/report.html")
    page.wait_for_function("[...document.querySelectorAll('audio')].every(sound => sound.readyState > 0)")
    assert page.locator("section h2").all_inner_texts() == list(truth["benchmarks"])
    overview = page.locator("table").first
    assert overview.locator("thead th").all_inner_texts() == ["benchmark", "score", "questions", "audio", "chance"]
    cells = overview.locator("tbody tr", has_text="mcq").locator("td").all_inner_texts()
    assert cells[3].startswith("1.000 1.000")
    seconds = page.evaluate("[...document.querySelectorAll('audio')].map(sound => sound.duration)")
    assert len(seconds) > 20
    assert all(7.5 < length <= 10.1 for length in seconds)
    widths = page.evaluate("[...document.querySelectorAll('img')].map(image => image.naturalWidth)")
    assert len(widths) >= 4
    assert all(width > 500 for width in widths)
    assert all(page.evaluate("[...document.querySelectorAll('img')].map(image => image.alt)"))
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
    assert faults == []


def test_what_a_model_wrote_is_text_on_the_page_and_nothing_else(corpus: SimpleNamespace):
    attack = "<script>alert(1)</script>"
    judged(corpus, "attack", f"constant:{attack}", benchmark=["mcq"])
    page = (corpus.root / "attack/report.html").read_text()
    assert attack not in page
    assert "&lt;script&gt;alert(1)" in page


def test_examples_come_worst_first_and_a_clip_that_is_gone_is_named(corpus: SimpleNamespace):
    gone = str(corpus.root / "corpus/audio/test/000000.flac")
    unreadable = gone.replace("000000", "000001")
    for path in (gone, unreadable):
        Path(path).rename(f"{path}.away")
    Path(unreadable).mkdir()
    try:
        judged(corpus, "gone", "constant:yes", benchmark=["clotho-aqa"], examples=100)
    finally:
        Path(unreadable).rmdir()
        for path in (gone, unreadable):
            Path(f"{path}.away").rename(path)
    page = (corpus.root / "gone/report.html").read_text()
    scores = [float(text) for text in re.findall(r"<dt>score</dt><dd>([\d.]+)</dd>", page)]
    assert scores == sorted(scores)
    assert scores[-1] == 1
    assert f"{gone} does not exist" in page
    assert f"{unreadable}: " in page


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"benchmark": ["mmua"]}, "benchmark.0\n.* should be 'families', 'mmau', 'entailment'"),
        ({"benchmark": ["mmau"], "mmau": None}, "benchmark mmau: .* give `mmau`, the benchmark's file"),
        ({"split": "train", "benchmark": ["difference"]}, "benchmark difference: split 'train' has no such questions"),
        ({"model": "predictions:{root}/corpus/labels.json"}, "has no columns id, and prediction or model_output"),
        ({"model": "predictions:{root}/twice.json"}, "has two answers to question test/0: keep one"),
        ({"mmau": "{root}/corpus/labels.json"}, "entry 0 has no id, audio_id, question; id, audio_id,"),
        ({"against": "{root}/other"}, "against .*other: it has none of the questions"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_its_name(
    corpus: SimpleNamespace, truth: dict[str, Any], fields: dict[str, Any], message: str
):
    twice = [{"id": "test/0", "prediction": text} for text in ("yes", "no")]
    storage.write_json(str(corpus.root / "twice.json"), twice)
    if "against" in fields:
        judged(corpus, "other", "random", benchmark=["clotho-aqa"])
        fields = fields | {"benchmark": ["detail"]}
    fields = {
        name: value.format(root=corpus.root) if isinstance(value, str) else value for name, value in fields.items()
    }
    with pytest.raises(ValueError, match=message):
        judged(corpus, f"refused {message}".replace("/", "-"), **({"model": "random"} | fields))


def test_a_file_that_is_not_there_is_named_and_takes_no_folder(corpus: SimpleNamespace):
    file = corpus.root / "later.json"
    for model, message in (
        (f"predictions:{file}", rf"{file} does not exist: check the URI"),
        ("randm", "model .*randm: no such folder, and no address .* constant:TEXT, random or predictions:FILE"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            judged(corpus, "later", model, benchmark=["mcq"])
    with pytest.raises(FileNotFoundError, match=r"corpus/tst.json does not exist: check the URI"):
        judged(corpus, "later", "random", benchmark=["mcq"], split="tst")
    wrong = [{"id": str(number), "prediction": "yes"} for number in range(9)]
    storage.write_json(str(file), wrong)
    with pytest.raises(ValueError, match=r"has no answer to test/\d+ \(ids there: 0, 1, 2, ...\)"):
        judged(corpus, "later", f"predictions:{file}", benchmark=["mcq"])
    storage.write_json(str(file), corpus.rows)
    assert values(judged(corpus, "later", f"predictions:{file}", benchmark=["mcq"]), "audio") == {"mcq": 1.0}


def test_another_models_scores_are_not_overwritten(corpus: SimpleNamespace, truth: dict[str, Any]):
    with pytest.raises(ValueError, match=r"holds answers of another configuration \(differing: model\)"):
        judged(corpus, "truth", "random")
    with pytest.raises(ValueError, match="that is `output`, give the folder of another evaluation"):
        judged(corpus, "truth", "random", against=str(corpus.root / "truth"))


def test_data_sets_are_scored_alone_too(tmp_path: Path):
    texts = {"Clotho": ["a dog barks", "rain on a roof"], "AudioCaps": ["a man speaks", "a car passes", "wind blows"]}
    records = [
        Record("c", f"{name}-{number}.wav", "", text, "", "caption the audio.", text, f"{name}.json")
        for name, own in texts.items()
        for number, text in enumerate(own)
    ]
    write_records(str(tmp_path / "test.json"), records)

    def scores(kept: list[Record], name: str) -> dict[str, Any]:
        write_records(str(tmp_path / "test.json"), kept)
        config = EvaluateConfig(
            benchmark=["captioning"], corpus=str(tmp_path), model="constant:a dog barks on a roof", resamples=100,
            output=str(tmp_path / name),
        )  # fmt: skip
        return evaluate(config)["benchmarks"]["captioning"]

    both = scores(records, "both")
    assert both["data_sets"].keys() == texts.keys()
    for name in texts:
        alone = scores([record for record in records if record.family == name], name)
        # Chance draws among the answers of a family, which are the same ones; each draw depends on the question's id.
        assert both["data_sets"][name]["scores"]["audio"] == alone["scores"]["audio"]


def test_a_tier_of_explanation_is_a_category(tmp_path: Path):
    records = [
        Record("c", "a.wav", "b.wav", "", "", f"explain {tier}", f"the first barks {tier}", f"ACD-{tier}.json")
        for tier in (1, 2, 3)
    ]
    write_records(str(tmp_path / "test.json"), records)
    config = EvaluateConfig(benchmark=["difference"], corpus=str(tmp_path), model="random", output=str(tmp_path / "o"))
    groups = evaluate(config)["benchmarks"]["difference"]["groups"]
    assert groups.keys() == {"tier"}
    assert groups["tier"].keys() == {"1", "2", "3"}


def test_chance_is_drawn_among_answers_of_the_same_tier(tmp_path: Path):
    records = [
        Record("c", f"{n}.wav", "b.wav", "", "", f"explain {tier}", f"{n} barks {tier}", f"ACD-{tier}.json")
        for n in range(8)
        for tier in (1, 2, 3)
    ]
    write_records(str(tmp_path / "test.json"), records)
    config = EvaluateConfig(benchmark=["difference"], corpus=str(tmp_path), model="random", output=str(tmp_path / "o"))
    evaluate(config)
    rows = pq.read_table(tmp_path / "o/predictions.parquet").to_pylist()
    assert all(row["prediction"][-1] == row["question"][-1] for row in rows)
    assert all(row["prediction"] not in row["answer"] for row in rows)


def test_names_of_categories_are_shown_as_they_are(tmp_path: Path):
    names = (r"$5 and \frac$", "a|b")
    records = [
        Record("c", f"{name}.wav", "", "", "", "is it?", "yes", f"{name}-Presence") for name in names for _ in range(2)
    ]
    write_records(str(tmp_path / "test.json"), records)
    config = EvaluateConfig(benchmark=["clotho-aqa"], corpus=str(tmp_path), model="random", output=str(tmp_path / "o"))
    table = markdown(evaluate(config))
    assert r"| $5 and \frac$-Presence | " in table
    assert r"| a\|b-Presence " in table


def test_a_hypothesis_without_a_verdict_is_refused(tmp_path: Path):
    write_records(str(tmp_path / "test.json"), [Record("c", "a.wav", "", "", "", "is it so?", "perhaps", "CLE.json")])
    config = EvaluateConfig(benchmark=["entailment"], corpus=str(tmp_path), model="random", output=str(tmp_path / "o"))
    with pytest.raises(ValueError, match="question test/0 of CLE has the answer 'perhaps', which is no verdict"):
        evaluate(config)
