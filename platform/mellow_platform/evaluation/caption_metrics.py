"""Scores of descriptions by the programs that captioning papers use: pycocoevalcap, and FENSE by aac-metrics.

The tokenizer, METEOR and SPICE are Java programs; SPICE and FENSE need models that are downloaded once. What cannot run
here is named with the reason, and nothing stands in its place.
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
PLAIN_WORDS = "words are cut at spaces and punctuation, and the other scores differ a little from published ones"
NO_JAVA = "Java is not installed (no `java` on PATH)"
NO_SPICE = (
    "its models are not installed: run pycocoevalcap.spice.get_stanford_models.get_stanford_models() once, online"
)
NO_FENSE = "aac-metrics is not installed: pip install aac-metrics, and aac-metrics-download once, online"

Texts = dict[int, list[str]]


class UnavailableMetricError(Exception):
    """A score that cannot be computed here; the message says why."""


class Bleu(Metric):
    """BLEU-1 to BLEU-4 of a whole corpus, from the counts of pycocoevalcap's BLEU.

    Args:
        each: [N, 10] counts of each answer: n-grams found in a reference and n-grams in all (each for n = 1 to 4), its
            length in words, and that of the reference nearest in length.
    """

    names = tuple(f"BLEU-{n}" for n in range(1, ORDERS + 1))

    def __init__(self, each: np.ndarray):
        self.each = each

    @classmethod
    def from_texts(cls, references: Texts, predictions: Texts) -> "Bleu":
        scorer = BleuScorer(n=ORDERS)
        for number, own in references.items():
            scorer += (predictions[number][0], own)
        rows = []
        for counted in scorer.ctest:
            length = counted["testlen"]
            nearest = min((abs(other - length), other) for other in counted["reflen"])[1]
            rows.append([*counted["correct"], *counted["guess"], length, nearest])
        return cls(np.array(rows, np.float64))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        totals = weights @ self.each
        found, there = totals[:, :ORDERS], totals[:, ORDERS : 2 * ORDERS]
        # The two constants are pycocoevalcap's: no n-gram at all is a score of 0, and no division by it.
        precision = np.cumprod((found + 1e-15) / (there + 1e-9), axis=1) ** (1 / np.arange(1, ORDERS + 1))
        ratio = (totals[:, -2] + 1e-15) / (totals[:, -1] + 1e-9)
        return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))[:, None]

    def of(self, rows: np.ndarray) -> "Bleu":
        return Bleu(self.each[rows])


class CaptionScorer:
    """Scores descriptions against references. Its Java programs are started once and go with it.

    Attributes:
        unavailable: why there is no score of this name.
    """

    def __init__(self) -> None:
        self.unavailable: dict[str, str] = {}

    def score(self, references: Sequence[Sequence[str]], predictions: Sequence[str]) -> tuple[list[Metric], Mean]:
        """Return the measures of predictions, and the one of them that descriptions are compared by.

        That is SPIDEr, the mean of CIDEr and SPICE, or CIDEr where there is no SPICE. CIDEr weighs words by how many
        of the given references hold them: its values go with this set of questions.
        """
        tokens = self._tokens([*map(list, references), *([text] for text in predictions)])
        right = {number: tokens[number] for number in range(len(references))}
        said = {number: tokens[len(references) + number] for number in range(len(predictions))}
        cider = np.asarray(Cider().compute_score(right, said)[1])
        measures: list[Metric] = [Bleu.from_texts(right, said)]
        measures += self._optional("METEOR", lambda: self._meteor(right, said))
        measures.append(Mean("ROUGE-L", Rouge().compute_score(right, said)[1]))
        main = Mean("CIDEr", cider)
        measures.append(main)
        for found in self._optional("SPICE", lambda: _spice(right, said)):
            main = Mean("SPIDEr", (cider + found.each) / 2)
            measures += [found, main]
        if "SPICE" in self.unavailable:
            self.unavailable["SPIDEr"] = "it is the mean of CIDEr and SPICE"
        measures += self._optional("FENSE", lambda: _fense(references, predictions))
        return measures, main

    def _optional(self, name: str, compute: Callable[[], Mean]) -> list[Mean]:
        """Return a score, or none where it cannot be computed; the reason is kept, and said once."""
        if name in self.unavailable:
            return []
        try:
            return [compute()]
        except UnavailableMetricError as error:
            reason = str(error)
        except Exception as error:  # of another program: the other scores do not depend on it
            reason = f"it failed: {type(error).__name__}: {error}"
        self._leave_out(name, reason)
        return []

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self.unavailable:
            self.unavailable[name] = reason
            print(f"no {name}: {reason}", flush=True)

    def _tokens(self, texts: list[list[str]]) -> Texts:
        """Return texts as their words with spaces between, by the tokenizer of the published scores.

        METEOR reads a line a text, with `|||` between texts.
        """
        lines = [" ".join(text.replace("|||", " ").split()) for own in texts for text in own]
        try:
            tokens = iter(_ptb_tokens(lines))
        except UnavailableMetricError as error:
            self._leave_out("PTB tokenizer", f"{error}; {PLAIN_WORDS}")
            tokens = iter([" ".join(re.findall(r"[\w']+", line.lower())) for line in lines])
        return {number: [next(tokens) for _ in own] for number, own in enumerate(texts)}

    def _meteor(self, references: Texts, predictions: Texts) -> Mean:
        """Return METEOR of the corpus, which is of its summed counts and not the mean over answers.

        Intervals come from the answers' own scores, scaled to have the corpus's for their mean.
        """
        if not shutil.which("java"):
            raise UnavailableMetricError(NO_JAVA)
        program = _meteor_program()
        try:
            total, own = program.compute_score(references, predictions)
        except Exception:
            # It keeps the lock where it breaks off, and waits for it when it goes.
            program.lock.release()
            _meteor_program.cache_clear()
            raise
        mean = float(np.mean(own))
        return Mean("METEOR", own, scale=total / mean if mean else 1.0)


def _ptb_tokens(lines: list[str]) -> list[str]:
    """Return lines of text as tokens without punctuation, as pycocoevalcap does.

    Its own wrapper of the program writes beside the program's files, which an image does not allow.
    """
    if not shutil.which("java"):
        raise UnavailableMetricError(NO_JAVA)
    command = ["java", "-cp", str(JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command[1:1] = ["-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"]
    done = subprocess.run(command, input="\n".join([*lines, ""]), capture_output=True, encoding="utf-8")
    tokenized = done.stdout.removesuffix("\n").split("\n")
    if done.returncode or len(tokenized) != len(lines):
        raise UnavailableMetricError(f"it failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in tokenized]


class _Meteor(meteor.Meteor):
    """pycocoevalcap's METEOR, which is told where its table of paraphrases is.

    Left to find the table by itself, the program does not find it in a folder whose path has a space.
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
    """Return METEOR's process: reading its tables takes seconds, so that one serves the whole job."""
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
    scores = fense(list(predictions), [list(own) for own in references])[1]
    return Mean("FENSE", scores["fense"].cpu().numpy())
