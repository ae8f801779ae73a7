"""Benchmarks without a model: selection of questions, MMAU's official matching, reports, comparison and gate."""

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


def synthetic_answer(entry: dict[str, Any], kind: str) -> str:
    """Return an answer of one kind to an MMAU question."""
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
    """Apply MMAU's published rule word by word."""
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


def test_mmau_scores_equal_official_matching(mmau: list[dict[str, Any]], tmp_path: Path):
    assert len(mmau) == 1000
    seen: dict[str, set[bool]] = defaultdict(set)
    for first in range(len(KINDS)):  # every question gets an answer of every kind
        kinds = [KINDS[(first + number) % len(KINDS)] for number in range(len(mmau))]
        answered = [
            entry | {"model_output": synthetic_answer(entry, kind)} for entry, kind in zip(mmau, kinds, strict=True)
        ]
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
            for name, values in groups.items():
                got = report["groups"][axis][name]
                assert got["questions"] == len(values)
                assert got["scores"]["audio"]["value"] == pytest.approx(sum(values) / len(values)), name
        scores = pq.read_table(output / "predictions.parquet")["score"].to_pylist()
        assert scores == [float(right) for right in expected]
        # The submission is MMAU's file with the answers added.
        assert json.loads((output / "mmau.json").read_text()) == answered
    assert seen["right"] == seen["punctuation"] == seen["upper case"] == {True}
    assert seen["other wording"] == {True, False}  # wrong choices contain some of its words
    assert seen["empty"] == seen["blank"] == {False}
    # By this rule, a wrong choice with the answer's words in another order is right.
    assert seen["wrong"] == seen["several"] == {True, False}


def test_mmau_lettered_answers_score_like_plain_ones(mmau: list[dict[str, Any]]):
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
                answer = benchmark.reply(item, text)
                assert benchmark.score([item], [answer]).per_item[0] == right, (item.id, text, answer)


def test_mmau_without_references_writes_submission(mmau: list[dict[str, Any]], tmp_path: Path):
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
    """Questions about scenes for every benchmark, with their answers."""
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


def run_evaluation(corpus: SimpleNamespace, name: str, model: str, **fields: Any) -> dict[str, Any]:
    config = {"benchmark": ["all"]} | corpus.fields | {"model": model, "output": str(corpus.root / name)} | fields
    return evaluate(EvaluateConfig(**config))


@pytest.fixture(scope="module")
def truth(corpus: SimpleNamespace) -> dict[str, Any]:
    """The report of only right answers."""
    storage.write_json(str(corpus.root / "truth.json"), corpus.rows)
    return run_evaluation(corpus, "truth", f"predictions:{corpus.root}/truth.json")


def values(report: dict[str, Any], condition: str) -> dict[str, float]:
    return {name: own["scores"][condition][own["main"]]["value"] for name, own in report["benchmarks"].items()}


def choices_of(record: dict[str, str]) -> list[str]:
    return re.findall(r"\b[a-h]\) ", record["input"])


def test_chance_scores_below_right_answers(truth: dict[str, Any], corpus: SimpleNamespace):
    best, drawn = values(truth, "audio"), values(truth, "chance")
    assert best.keys() == {
        "families", "mmau", "entailment", "difference", "clotho-aqa", "captioning", "mcq", "detail"
    }  # fmt: skip
    assert all(best[name] == 1 for name in ("families", "mmau", "entailment", "clotho-aqa", "mcq"))
    assert all(drawn[name] < best[name] for name in best)
    # Choices are equally likely: a question with four has a chance of 1/4.
    choices = [len(choices_of(record)) for record in corpus.records if record["subtype"].endswith("-MCQ")]
    assert drawn["mcq"] == pytest.approx(sum(1 / count for count in choices) / len(choices))
    assert drawn["entailment"] == pytest.approx(1 / 3)
    assert drawn["clotho-aqa"] == pytest.approx(1 / 2)


def test_unanswered_benchmark_fails_job(corpus: SimpleNamespace):
    storage.write_json(str(corpus.root / "no-mmau.json"), [r for r in corpus.rows if not r["id"].startswith("mmau")])
    model = f"predictions:{corpus.root}/no-mmau.json"
    # The share is checked per benchmark: few of all questions, but all of MMAU's.
    with pytest.raises(ValueError, match=r"12 of 12 .*mmau under audio .*no_prediction 12"):
        run_evaluation(corpus, "no-mmau", model)
    report = run_evaluation(corpus, "no-mmau", model, max_failed_share=1.0)
    assert values(report, "audio")["mmau"] == 0
    assert report["benchmarks"]["mmau"]["no_answer"] == {"audio": {"no_prediction": 12}}
    assert "- No answer under audio, scored as wrong: 12 no_prediction." in markdown(report)


def test_predictions_folder_is_read_by_benchmark(corpus: SimpleNamespace):
    # One question is in both benchmarks, with two answers.
    fields = {"benchmark": ["families", "captioning"]}
    drawn = run_evaluation(corpus, "drawn", "random", **fields)
    again = run_evaluation(corpus, "drawn-again", f"predictions:{corpus.root}/drawn", **fields)
    assert values(again, "audio") == values(drawn, "audio")


def test_benchmarks_select_families(truth: dict[str, Any], corpus: SimpleNamespace):
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


def test_captions_of_one_clip_become_references(tmp_path: Path):
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


def test_constant_answer_scores_its_frequency(corpus: SimpleNamespace):
    report = run_evaluation(corpus, "constant", "constant:yes", benchmark=["clotho-aqa"])
    asked = [record["answer"] for record in corpus.records if record["subtype"] == "Scenes-Presence"]
    share = asked.count("yes") / len(asked)
    assert report["benchmarks"]["clotho-aqa"]["scores"]["audio"]["accuracy"]["value"] == pytest.approx(share)


def test_benchmark_noise_is_a_condition():
    fields = {"model": "random", "corpus": "/c", "output": "/o", "conditions": ["audio"]}
    config = EvaluateConfig(**fields, benchmark="mcq,noise")
    assert (config.benchmark, config.conditions) == (["mcq"], ["audio", "noise"])
    with pytest.raises(ValueError, match="noise"):
        EvaluateConfig(**fields, benchmark="noise")
    # The gate compares scores with audio, and must not pass without them.
    with pytest.raises(ValueError, match=r"against: .*audio.*conditions"):
        EvaluateConfig(**fields | {"model": "/m", "conditions": ["noise"]}, against="/a")


def run_job(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/evaluate.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.extended
def test_significantly_lower_score_fails_job(truth: dict[str, Any], corpus: SimpleNamespace):
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
    assert f"lower than in {corpus.root}/truth: mcq accuracy" in worse.stderr
    report = json.loads((corpus.root / "third-wrong/report.json").read_text())
    row = next(row for row in report["comparison"]["differences"] if row["benchmark"] == "mcq")
    assert row["significant"]
    assert row["low"] <= row["value"] <= row["high"] < 0
    assert "| mcq " in worse.stdout
    assert " lower |" in worse.stdout


def test_html_report_has_tables_charts_and_players(truth: dict[str, Any], corpus: SimpleNamespace, browser: Browser):
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


def test_html_report_escapes_answers(corpus: SimpleNamespace):
    attack = "<script>alert(1)</script>"
    run_evaluation(corpus, "attack", f"constant:{attack}", benchmark=["mcq"])
    page = (corpus.root / "attack/report.html").read_text()
    assert attack not in page
    assert "&lt;script&gt;alert(1)" in page


def test_examples_are_sorted_and_name_missing_clips(corpus: SimpleNamespace):
    gone = str(corpus.root / "corpus/audio/test/000000.flac")
    unreadable = gone.replace("000000", "000001")
    for path in (gone, unreadable):
        Path(path).rename(f"{path}.away")
    Path(unreadable).mkdir()
    try:
        run_evaluation(corpus, "gone", "constant:yes", benchmark=["clotho-aqa"], examples=100)
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
        ({"benchmark": ["mmua"]}, "benchmark.0\n.*'families', 'mmau', 'entailment'"),
        ({"benchmark": ["mmau"], "mmau": None}, "benchmark mmau: .*`mmau`"),
        ({"split": "train", "benchmark": ["difference"]}, "benchmark difference: split 'train'"),
        ({"model": "predictions:{root}/corpus/labels.json"}, "labels.json .* id, .*prediction or model_output"),
        ({"model": "predictions:{root}/twice.json"}, "twice.json .* test/0"),
        ({"mmau": "{root}/corpus/labels.json"}, "labels.json: entry 0 has no id, audio_id, question"),
        ({"against": "{root}/other"}, "against .*other"),
    ],
)
def test_invalid_input_raises_value_error(
    corpus: SimpleNamespace, truth: dict[str, Any], fields: dict[str, Any], message: str
):
    twice = [{"id": "test/0", "prediction": text} for text in ("yes", "no")]
    storage.write_json(str(corpus.root / "twice.json"), twice)
    if "against" in fields:
        run_evaluation(corpus, "other", "random", benchmark=["clotho-aqa"])
        fields = fields | {"benchmark": ["detail"]}
    fields = {
        name: value.format(root=corpus.root) if isinstance(value, str) else value for name, value in fields.items()
    }
    with pytest.raises(ValueError, match=message):
        run_evaluation(corpus, f"refused {message}".replace("/", "-"), **({"model": "random"} | fields))


def test_missing_file_does_not_claim_output(corpus: SimpleNamespace):
    file = corpus.root / "later.json"
    for model, message in (
        (f"predictions:{file}", rf"{file} does not exist"),
        ("randm", "model .*randm: .*constant:TEXT, random or predictions:FILE"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            run_evaluation(corpus, "later", model, benchmark=["mcq"])
    with pytest.raises(FileNotFoundError, match=r"corpus/tst.json does not exist"):
        run_evaluation(corpus, "later", "random", benchmark=["mcq"], split="tst")
    wrong = [{"id": str(number), "prediction": "yes"} for number in range(9)]
    storage.write_json(str(file), wrong)
    with pytest.raises(ValueError, match=r"no answer to test/\d+ \(.*0, 1, 2, ...\)"):
        run_evaluation(corpus, "later", f"predictions:{file}", benchmark=["mcq"])
    storage.write_json(str(file), corpus.rows)
    assert values(run_evaluation(corpus, "later", f"predictions:{file}", benchmark=["mcq"]), "audio") == {"mcq": 1.0}


def test_output_of_another_model_is_kept(corpus: SimpleNamespace, truth: dict[str, Any]):
    with pytest.raises(ValueError, match=r"different: model\)"):
        run_evaluation(corpus, "truth", "random")
    with pytest.raises(ValueError, match=r"against.*`output`"):
        run_evaluation(corpus, "truth", "random", against=str(corpus.root / "truth"))


def test_data_sets_are_scored_separately(tmp_path: Path):
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
        # Chance draws depend on question ids, which differ here; only audio is compared.
        assert both["data_sets"][name]["scores"]["audio"] == alone["scores"]["audio"]


def test_explanation_tier_is_a_category(tmp_path: Path):
    records = [
        Record("c", "a.wav", "b.wav", "", "", f"explain {tier}", f"the first barks {tier}", f"ACD-{tier}.json")
        for tier in (1, 2, 3)
    ]
    write_records(str(tmp_path / "test.json"), records)
    config = EvaluateConfig(benchmark=["difference"], corpus=str(tmp_path), model="random", output=str(tmp_path / "o"))
    groups = evaluate(config)["benchmarks"]["difference"]["groups"]
    assert groups.keys() == {"tier"}
    assert groups["tier"].keys() == {"1", "2", "3"}


def test_chance_draws_within_tier(tmp_path: Path):
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


def test_category_names_are_escaped(tmp_path: Path):
    names = (r"$5 and \frac$", "a|b")
    records = [
        Record("c", f"{name}.wav", "", "", "", "is it?", "yes", f"{name}-Presence") for name in names for _ in range(2)
    ]
    write_records(str(tmp_path / "test.json"), records)
    config = EvaluateConfig(benchmark=["clotho-aqa"], corpus=str(tmp_path), model="random", output=str(tmp_path / "o"))
    table = markdown(evaluate(config))
    assert r"| $5 and \frac$-Presence | " in table
    assert r"| a\|b-Presence " in table


def test_invalid_verdict_raises(tmp_path: Path):
    write_records(str(tmp_path / "test.json"), [Record("c", "a.wav", "", "", "", "is it so?", "perhaps", "CLE.json")])
    config = EvaluateConfig(benchmark=["entailment"], corpus=str(tmp_path), model="random", output=str(tmp_path / "o"))
    with pytest.raises(ValueError, match=r"test/0 of CLE .*'perhaps'"):
        evaluate(config)
