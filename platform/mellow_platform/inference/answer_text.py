"""Text of an answer as its tokens arrive."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class AnswerText:
    """Decodes tokens to text that can be shown at once: released text is final.

    Bytes of an unfinished character, trailing white space and a possible start of a stop string are withheld. Released
    pieces add up to `text`, which has no leading or trailing white space.
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
        """Add a token; return the newly released text. `stopped` is true after a stop string."""
        self._whole = (self._whole + (self._stream.step(self._tokenizer, token) or "")).lstrip()
        positions = [position for stop in self._stop if (position := self._whole.find(stop)) >= 0]
        if positions:
            self.stopped = True
            self._whole = self._whole[: min(positions)].rstrip()
            return self._release(len(self._whole))
        return self._release(len(self._whole) - self._undecided())

    def finish(self) -> str:
        """Return the text that was withheld for a possible stop string."""
        return self._release(len(self._whole.rstrip()))

    def _undecided(self) -> int:
        """Return the number of trailing characters that may not be part of the answer."""
        spaces = len(self._whole) - len(self._whole.rstrip())
        lengths = [
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(self._whole) + 1))
            if stop.startswith(self._whole[-length:])
        ]
        length = max(lengths, default=0)
        # White space before a stop string would be trailing white space of the answer.
        before = self._whole[: len(self._whole) - length]
        return max(spaces, len(self._whole) - len(before.rstrip()) if length else 0)

    def _release(self, end: int) -> str:
        piece = self._whole[self._released : end]
        self._released = max(self._released, end)
        return piece
