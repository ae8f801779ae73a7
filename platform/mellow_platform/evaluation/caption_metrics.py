"""Caption metrics of the literature: pycocoevalcap's, and FENSE by aac-metrics.

The tokenizer, METEOR and SPICE are Java programs; SPICE and FENSE need models that are downloaded once. A metric that
cannot run is reported as unavailable with the reason, without a substitute.
"""

import importlib.util
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice
from pycocoevalcap.tokenizer import ptbtokenizer

from mellow_platform.evaluation.metrics import Mean, Metric

ORDERS = 4  # BLEU-1 to BLEU-4
METEOR = Path(meteor.__file__).parent
JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
PLAIN_WORDS = "words are split at spaces and punctuation; the other scores differ slightly from published ones"
NO_JAVA = "Java is not installed (no `java` on PATH)"
NO_SPICE = (
    "its models are not installed; run pycocoevalcap.spice.get_stanford_models.get_stanford_models() once, online"
)
NO_FENSE = "aac-metrics is not installed; run pip install aac-metrics, and aac-metrics-download once, online"

Texts = dict[int, list[str]]


class UnavailableMetricError(Exception):
    """A metric cannot be computed on this machine; the message is the reason."""


class Bleu(Metric):
    """Corpus BLEU-1 to BLEU-4, from the counts of pycocoevalcap's BLEU.

    Args:
        values: counts of each answer [N, 10]: matched n-grams and all n-grams (n = 1 to 4 each), length in words, and
            length of the reference closest in length.
    """

    names = tuple(f"BLEU-{n}" for n in range(1, ORDERS + 1))

    def __init__(self, values: np.ndarray):
        self.values = values

    @classmethod
    def from_texts(cls, references: Texts, predictions: Texts) -> "Bleu":
        scorer = BleuScorer(n=ORDERS)
        for number, texts in references.items():
            scorer += (predictions[number][0], texts)
        rows = []
        for counts in scorer.ctest:
            length = counts["testlen"]
            closest = min((abs(other - length), other) for other in counts["reflen"])[1]
            rows.append([*counts["correct"], *counts["guess"], length, closest])
        return cls(np.array(rows, np.float64))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        totals = weights @ self.values
        matched, total = totals[:, :ORDERS], totals[:, ORDERS : 2 * ORDERS]
        # The two constants are pycocoevalcap's; without any n-gram the score is 0.
        precision = np.cumprod((matched + 1e-15) / (total + 1e-9), axis=1) ** (1 / np.arange(1, ORDERS + 1))
        ratio = (totals[:, -2] + 1e-15) / (totals[:, -1] + 1e-9)
        return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))[:, None]

    def subset(self, rows: np.ndarray) -> "Bleu":
        return Bleu(self.values[rows])


class CaptionScorer:
    """Scores captions against references.

    Attributes:
        unavailable: reason by name of each metric that cannot be computed.
    """

    def __init__(self) -> None:
        self.unavailable: dict[str, str] = {}

    def score(self, references: Sequence[Sequence[str]], predictions: Sequence[str]) -> tuple[list[Metric], Mean]:
        """Return all available metrics of the predictions, and the main one of them.

        The main metric is SPIDEr, the mean of CIDEr and SPICE, or CIDEr if SPICE is unavailable. CIDEr weighs n-grams
        by their frequency in the passed references, so its values depend on this set of questions.
        """
        tokens = self._tokens([*map(list, references), *([text] for text in predictions)])
        truth = {number: tokens[number] for number in range(len(references))}
        predicted = {number: tokens[len(references) + number] for number in range(len(predictions))}
        cider = np.asarray(Cider().compute_score(truth, predicted)[1])
        metrics: list[Metric] = [Bleu.from_texts(truth, predicted)]
        metrics += self._optional("METEOR", lambda: self._meteor(truth, predicted))
        metrics.append(Mean("ROUGE-L", Rouge().compute_score(truth, predicted)[1]))
        main = Mean("CIDEr", cider)
        metrics.append(main)
        for mean in self._optional("SPICE", lambda: _spice(truth, predicted)):
            main = Mean("SPIDEr", (cider + mean.values) / 2)
            metrics += [mean, main]
        if "SPICE" in self.unavailable:
            self.unavailable["SPIDEr"] = "it is the mean of CIDEr and SPICE"
        metrics += self._optional("FENSE", lambda: _fense(references, predictions))
        return metrics, main

    def _optional(self, name: str, compute: Callable[[], Mean]) -> list[Mean]:
        """Return a metric, or an empty list if it cannot be computed; the reason is recorded and printed once."""
        if name in self.unavailable:
            return []
        try:
            return [compute()]
        except UnavailableMetricError as error:
            reason = str(error)
        except Exception as error:  # an external program failed; the other metrics do not depend on it
            reason = f"failed: {type(error).__name__}: {error}"
        self._record(name, reason)
        return []

    def _record(self, name: str, reason: str) -> None:
        if name not in self.unavailable:
            self.unavailable[name] = reason
            print(f"no {name}: {reason}", flush=True)

    def _tokens(self, texts: list[list[str]]) -> Texts:
        """Return texts as space-separated tokens, by the tokenizer of the published scores.

        `|||` is removed: METEOR uses it as a separator.
        """
        lines = [" ".join(text.replace("|||", " ").split()) for group in texts for text in group]
        try:
            tokens = iter(_ptb_tokens(lines))
        except UnavailableMetricError as error:
            self._record("PTB tokenizer", f"{error}; {PLAIN_WORDS}")
            tokens = iter([" ".join(re.findall(r"[\w']+", line.lower())) for line in lines])
        return {number: [next(tokens) for _ in group] for number, group in enumerate(texts)}

    def _meteor(self, references: Texts, predictions: Texts) -> Mean:
        """Return corpus METEOR, which is computed from summed counts and is not the mean over answers.

        Intervals use the scores of single answers, scaled so that their mean is the corpus score.
        """
        if not shutil.which("java"):
            raise UnavailableMetricError(NO_JAVA)
        program = _meteor_program()
        try:
            total, scores = program.compute_score(references, predictions)
        except Exception:
            # A failed call keeps the lock, and the process would wait for it at exit.
            program.lock.release()
            _meteor_program.cache_clear()
            raise
        mean = float(np.mean(scores))
        return Mean("METEOR", scores, scale=total / mean if mean else 1.0)


def _ptb_tokens(lines: list[str]) -> list[str]:
    """Return lines as tokens without punctuation, like pycocoevalcap.

    pycocoevalcap's own wrapper writes next to the program's files, which is impossible in a read-only image.
    """
    if not shutil.which("java"):
        raise UnavailableMetricError(NO_JAVA)
    command = ["java", "-cp", str(JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command[1:1] = ["-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"]
    done = subprocess.run(command, input="\n".join([*lines, ""]), capture_output=True, encoding="utf-8")
    tokenized = done.stdout.removesuffix("\n").split("\n")
    if done.returncode or len(tokenized) != len(lines):
        raise UnavailableMetricError(f"failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in tokenized]


class _Meteor(meteor.Meteor):
    """pycocoevalcap's METEOR with an explicit path of its paraphrase table.

    By itself the program does not find the table if the folder's path contains a space.
    """

    def __init__(self) -> None:
        command = ["java", "-jar", "-Xmx2G", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        self.meteor_p = subprocess.Popen(
            [*command, "-a", "data/paraphrase-en.gz"],
            cwd=METEOR,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.lock = threading.Lock()


@cache
def _meteor_program() -> _Meteor:
    """Return the METEOR process of this job, started once because it reads its tables for seconds."""
    return _Meteor()


def _spice(references: Texts, predictions: Texts) -> Mean:
    if not shutil.which("java"):
        raise UnavailableMetricError(NO_JAVA)
    if not list((Path(spice.__file__).parent / "lib").glob("stanford-corenlp-*-models.jar")):
        raise UnavailableMetricError(NO_SPICE)
    scores = spice.Spice().compute_score(references, predictions)[1]
    return Mean("SPICE", np.nan_to_num([score["All"]["f"] for score in scores]))


def _fense(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> Mean:
    if not importlib.util.find_spec("aac_metrics"):
        raise UnavailableMetricError(NO_FENSE)
    fense = importlib.import_module("aac_metrics.functional.fense").fense
    scores = fense(list(predictions), [list(texts) for texts in references])[1]
    return Mean("FENSE", scores["fense"].cpu().numpy())
