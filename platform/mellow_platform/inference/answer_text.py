"""An answer's text as its tokens arrive."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class AnswerText:
    """Turns tokens into text that can be shown at once: what was released is never taken back.

    Held back are bytes of an unfinished character, white space at the end, and what may be the beginning of a stop
    string. Released pieces add up to `text`, which has no white space around it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]):
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._whole = ""
        self._released = 0
        self.stopped = False

    @property
    def text(self) -> str:
        return self._whole[: self._released]

    def push(self, token: int) -> str:
        """Add a token; return the text that can be shown now. `stopped` is true once a stop string was written."""
        self._whole = (self._whole + (self._stream.step(self._tokenizer, token) or "")).lstrip()
        found = [place for stop in self._stop if (place := self._whole.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._whole = self._whole[: min(found)].rstrip()
            return self._release(len(self._whole))
        return self._release(len(self._whole) - self._undecided())

    def finish(self) -> str:
        """Return what was held back in case of a stop string that did not come."""
        return self._release(len(self._whole.rstrip()))

    def _undecided(self) -> int:
        """Return how many characters at the end may yet turn out to be no part of the answer."""
        spaces = len(self._whole) - len(self._whole.rstrip())
        begun = [
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(self._whole) + 1))
            if stop.startswith(self._whole[-length:])
        ]
        length = max(begun, default=0)
        # White space before the beginning of a stop string would be the end of the answer.
        before = self._whole[: len(self._whole) - length]
        return max(spaces, len(self._whole) - len(before.rstrip()) if length else 0)

    def _release(self, end: int) -> str:
        piece = self._whole[self._released : end]
        self._released = max(self._released, end)
        return piece
