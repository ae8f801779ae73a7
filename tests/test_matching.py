"""Scores: matching of answers, metrics against their reference programs, and bootstrap intervals."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu as PublishedBleu
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from mellow_platform.data.records import Record
from mellow_platform.evaluation import caption_metrics, matching
from mellow_platform.evaluation.bootstrap import Bootstrap, holm
from mellow_platform.evaluation.caption_metrics import NO_JAVA, CaptionScorer
from mellow_platform.evaluation.metrics import Classification, ExpectedMetric, Mean, MeanOverFamilies, Metric

CHOICES = ("a) rain", "b) heavy rain", "c) a dog barking", "d) wind")
REFERENCES = [
    ["a dog barks loudly at a man", "the dog is barking"],
    ["rain falls on a metal roof"],
    ["a car drives past at high speed"],
    ["birds sing in the forest"],
]
PREDICTIONS = ["a dog barks at the man", "rain falls on the roof", "", "birds sing"]
SAME_WORDS = {0: ["rain falls on a roof"]}, {0: ["rain falls on a roof"]}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("b) horn", True), ("B) Horn.", True), (" b)  horn ", True), ("a) horn", False), ("b", False), ("", False)],
)
def test_exact_match_ignores_case_and_spaces(answer: str, right: bool):
    record = Record("scenes", "a.wav", "", "", "", "which? a) tone b) horn", "b) horn", "MCQ")
    assert matching.is_right(record, answer) is right


@pytest.mark.parametrize(
    ("prediction", "choice"),
    [
        ("c) a dog barking", 2),
        ("C", 2),
        ("(c)", 2),
        ("c) something else", 2),
        ("A dog barking.", 2),
        ("it is a dog barking in the yard", 2),
        ("rain", 0),
        ("heavy rain", 1),
        ("one hears heavy rain", 1),
        ("rain and wind", None),
        ("winding", None),
        ("e) snow", None),
        ("a cat", None),
        ("", None),
        ("The answer is (c).", 2),
        ("Answer: B", 1),
        ("**c** is right", 2),
        ("option b", 1),
        ("I would say (d)", 3),
        ("either (c) or (d)", None),
        ("the answer is a dog barking", 2),
        ("A: b) heavy rain", 1),
        (" ".join(CHOICES), None),
        (f"{' '.join(CHOICES)}. Answer: d", 3),
    ],
)
def test_choice_index_of_lettered_choices(prediction: str, choice: int | None):
    assert matching.choice_index(prediction, CHOICES) == choice


@pytest.mark.parametrize(
    ("prediction", "choice"),
    [
        ("Yes.", 0),
        ("no", 1),
        ("yes, there is", 0),
        ("Yes, there is no traffic.", 0),
        ("No. Yes would be wrong.", 1),
        ("there is no traffic", 1),
        ("yes or no", None),
    ],
)
def test_choice_index_of_yes_and_no(prediction: str, choice: int | None):
    assert matching.choice_index(prediction, ("yes", "no")) == choice


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("b) Two", "Two"), ("b) two.", "two."), ("b", "Two"), ("(b)", "Two"), ("b) it is two", "it is two"),
        ("a) Two", "a) Two"), ("A tone", "A tone"), ("g)", "g)"), ("D", "D"), ("D:maj", "D:maj"),
    ],
)  # fmt: skip
def test_choice_text_strips_letter_of_its_choice(answer: str, text: str):
    assert matching.choice_text(answer, ("One", "Two", "D", "E", "D:maj")) == text


def prediction_metrics() -> dict[str, Metric]:
    metrics, _ = CaptionScorer().score(REFERENCES, PREDICTIONS)
    return {name: metric for metric in metrics for name in metric.names}


def scores_of(metric: Metric, count: int) -> dict[str, float]:
    return dict(zip(metric.names, metric(np.ones((1, count)))[0], strict=True))


def test_weighted_classification_equals_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, 200), rng.integers(0, 4, 200)  # 3: no class
    times = rng.integers(0, 4, 200)
    metric = Classification(truth, predicted, ["true", "plausible", "false"])
    got = dict(zip(metric.names, metric(times[None].astype(float))[0], strict=True))
    truth, predicted = truth.repeat(times), predicted.repeat(times)
    options = {"labels": [0, 1, 2], "zero_division": 0}
    macro = precision_recall_fscore_support(truth, predicted, average="macro", **options)
    assert got["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert [got[name] for name in ("precision", "recall", "F1")] == pytest.approx(macro[:3])
    by_class = [got[f"accuracy of {name!r}"] for name in ("true", "plausible", "false")]
    assert by_class == pytest.approx([np.mean(predicted[truth == number] == number) for number in range(3)])


def test_weighted_bleu_equals_pycocoevalcap():
    times = [1, 3, 0, 2]
    metric = prediction_metrics()["BLEU-1"]
    order = np.repeat(range(4), times)
    published, _ = PublishedBleu(4).compute_score(
        {place: REFERENCES[number] for place, number in enumerate(order)},
        {place: [PREDICTIONS[number]] for place, number in enumerate(order)},
        verbose=0,
    )
    assert metric(np.array([times], float))[0] == pytest.approx(published)


def test_caption_scores_rank_reference_prediction_empty():
    scorer = CaptionScorer()
    right, main = scorer.score(REFERENCES, [own[-1] for own in REFERENCES])
    best = {name: value for metric in right for name, value in scores_of(metric, 4).items()}
    assert [best[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert (best["METEOR"], best["ROUGE-L"]) == (pytest.approx(1), pytest.approx(1))
    assert main.names == ("CIDEr",)
    nothing, _ = scorer.score(REFERENCES, [""] * 4)
    assert all(value < 1e-6 for metric in nothing for value in scores_of(metric, 4).values())
    some, _ = scorer.score(REFERENCES, PREDICTIONS)
    for name, value in ((name, value) for metric in some for name, value in scores_of(metric, 4).items()):
        assert 0 < value < best[name], name


@pytest.mark.extended
def test_meteor_runs_in_path_with_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(caption_metrics.METEOR, tmp_path / "a space")
    monkeypatch.setattr(caption_metrics, "METEOR", tmp_path / "a space")
    caption_metrics._meteor_program.cache_clear()
    try:
        (meteor,) = CaptionScorer()._optional("METEOR", lambda: CaptionScorer()._meteor(*SAME_WORDS))
        assert scores_of(meteor, 1) == {"METEOR": pytest.approx(1)}
    finally:
        caption_metrics._meteor_program.cache_clear()


def test_tokens_equal_pycocoevalcap():
    texts = ["A dog, barks! It's loud -- (very).", "", ".", '50% of rain\'s sound... "drip"; café', "end"]
    ours = CaptionScorer()._tokens([[text] for text in texts])
    assert ours == PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})


def test_unavailable_metrics_are_reported_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    scorer = CaptionScorer()
    metrics, _ = scorer.score(REFERENCES, PREDICTIONS)
    names = {name for metric in metrics for name in metric.names}
    assert names == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    assert scorer.unavailable["METEOR"] == scorer.unavailable["SPICE"] == NO_JAVA
    assert scorer.unavailable["PTB tokenizer"].startswith(f"{NO_JAVA}; words are split")
    assert {"SPIDEr", "FENSE"} <= scorer.unavailable.keys()
    scorer.score(REFERENCES, PREDICTIONS)
    assert capsys.readouterr().out.count("no METEOR: Java is not installed") == 1


def test_bootstrap_resamples_clips():
    values = np.random.default_rng(1).random(40) < 0.6
    clips = [str(number) for number in range(40)]
    once = Bootstrap(clips, 2000, 0).estimate(Mean("accuracy", values))["accuracy"]
    # Ten questions per clip, all right or all wrong together, carry the information of one.
    tenfold = Bootstrap(clips * 10, 2000, 0).estimate(Mean("accuracy", np.tile(values, 10)))["accuracy"]
    assert tenfold == once
    apart = Bootstrap([str(number) for number in range(400)], 2000, 0)
    narrow = apart.estimate(Mean("accuracy", np.tile(values, 10)))["accuracy"]
    assert (narrow.high - narrow.low) < 0.5 * (once.high - once.low)


def test_intervals_cover_95_percent():
    rng = np.random.default_rng(2)
    held = 0
    for seed in range(200):
        right = rng.random(150) < 0.7
        interval = Bootstrap([str(n) for n in range(150)], 300, seed).estimate(Mean("accuracy", right))["accuracy"]
        held += interval.low <= 0.7 <= interval.high
    assert 180 <= held <= 199


def test_comparison_is_paired():
    rng = np.random.default_rng(3)
    before = rng.random(300) < 0.7
    draws = Bootstrap([str(number) for number in range(300)], 1000, 0)
    same = draws.compare(Mean("accuracy", before), Mean("accuracy", before))["accuracy"]
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    worse = before & (rng.random(300) < 0.9)
    lower = draws.compare(Mean("accuracy", worse), Mean("accuracy", before))["accuracy"]
    assert lower.high < 0 < lower.p < 1e-3
    # The runs agree on most questions, so the interval of their difference is narrower than that of a score.
    alone = draws.estimate(Mean("accuracy", before))["accuracy"]
    assert lower.high - lower.low < alone.high - alone.low


def test_comparison_of_equal_accuracy_and_different_precision():
    # 30 of 120 verdicts are wrong in both runs: another class in one, no class in the other.
    truth, clips = np.arange(120) % 3, [str(number) for number in range(120)]
    other, none = truth.copy(), truth.copy()
    other[:30], none[:30] = (truth[:30] + 1) % 3, 3
    runs = [Classification(truth, predicted, ("true", "plausible", "false")) for predicted in (other, none)]
    found = Bootstrap(clips, 500, 0).compare(*runs)
    assert found["accuracy"].value == 0 and found["accuracy"].p == 1
    assert found["precision"].high < 0 and found["precision"].p < 1e-6


@pytest.mark.parametrize(("differing", "p"), [(1, 1.0), (2, 0.5), (5, 0.0625)])
def test_p_value_is_bounded_by_sign_test(differing: int, p: float):
    before = np.ones(40, bool)
    worse = before.copy()
    worse[:differing] = False
    draws = Bootstrap([str(number) for number in range(40)], 1000, 0)
    lower = draws.compare(Mean("accuracy", worse), Mean("accuracy", before))["accuracy"]
    assert lower.p == pytest.approx(p)
    only = Bootstrap(["a"] * 5, 1000, 0)  # one clip: no draw differs from another
    whole = only.compare(Mean("accuracy", np.zeros(5)), Mean("accuracy", np.ones(5)))["accuracy"]
    assert whole.p == 1


def test_holm_step_down():
    assert holm([0.001, 0.04, 0.03]) == [True, False, False]
    assert holm([0.01, 0.02]) == [True, True]
    assert holm([0.2]) == [False]


def test_families_have_equal_weight():
    metric = MeanOverFamilies("mean", np.array([1, 1, 1, 0, 0]), ["a", "a", "a", "b", "b"])
    assert scores_of(metric, 5) == {"mean": 0.5}
    # A draw without any question of a family is the mean over the others.
    assert metric(np.array([[1.0, 2, 0, 0, 0], [1, 0, 0, 1, 0]])).tolist() == [[1.0], [0.5]]


def test_expected_metric_averages_candidates():
    right = np.array([1, 0, 1, 0, 0, 0])  # of two choices, of one, of three
    question = np.array([0, 0, 1, 2, 2, 2])
    metric = ExpectedMetric(Mean("accuracy", right), question)
    assert scores_of(metric, 3)["accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert metric(np.array([[2.0, 0, 1]]))[0, 0] == pytest.approx((2 * 1 / 2 + 0) / 3)
    assert scores_of(metric.subset(np.array([0, 2])), 2)["accuracy"] == pytest.approx((1 / 2 + 0) / 2)


def test_metric_subset_equals_metric_of_subset():
    rows = np.array([0, 3])
    some = CaptionScorer().score([REFERENCES[row] for row in rows], [PREDICTIONS[row] for row in rows])[0]
    whole = prediction_metrics()
    assert scores_of(whole["BLEU-1"].subset(rows), 2) == pytest.approx(scores_of(some[0], 2))
    classes = Classification(np.array([0, 1, 1, 0]), np.array([0, 0, 1, 2]), ["x", "y"])
    assert scores_of(classes.subset(rows), 2)["accuracy"] == 0.5
    assert scores_of(Mean("m", np.arange(4.0), scale=2.0).subset(rows), 2) == {"m": 3.0}
