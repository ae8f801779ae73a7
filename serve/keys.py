"""API keys: who may ask. The endpoint knows their SHA-256 alone.

python -m serve.keys alice >> keys.txt        # prints alice's key, and adds the line that lets her in
"""

import hashlib
import hmac
import logging
import re
import secrets
import sys
import time
from pathlib import Path

LINE = re.compile(r"(?P<name>[\w.@-]+) (?P<digest>[0-9a-f]{64})")
RELOAD_SECONDS = 5.0  # a key that is added or removed counts within so long, without a restart
logger = logging.getLogger("ray.serve")


class KeyFile:
    """A file with a line `name sha256-of-the-key` for each key; empty lines and those with # are left out.

    Keys are random and long, so a plain hash of them cannot be guessed back.

    Raises:
        ValueError: a line is something else, or there is no key; the message names file and line.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str):
        self._path = Path(path)
        self._read_at = time.monotonic()
        self._keys = self._read()
        if not self._keys:
            raise ValueError(f"{self._path} holds no key: nobody could ask")

    def holder(self, key: str) -> str | None:
        """Return the name that goes with a key; None where there is none."""
        if time.monotonic() - self._read_at > RELOAD_SECONDS:
            self._read_at = time.monotonic()
            try:
                self._keys = self._read()
            except (OSError, ValueError) as error:  # being edited, or damaged: those who were let in still are
                logger.error(f"API keys are not read anew: {error}")
        digest = _digest(key)
        # All are compared, whether one fits or not: the time that it takes says nothing.
        found = [name for known, name in self._keys.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def _read(self) -> dict[str, str]:
        keys = {}
        for number, line in enumerate(self._path.read_text().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            if not (match := LINE.fullmatch(line.strip())):
                raise ValueError(
                    f"{self._path}, line {number}: expected a name and the SHA-256 of a key; "
                    "`python -m serve.keys NAME` writes such a line"
                )
            keys[match["digest"]] = match["name"]
        return keys


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def main() -> None:
    if len(sys.argv) != 2 or not LINE.fullmatch(f"{sys.argv[1]} {'0' * 64}"):
        sys.exit("usage: python -m serve.keys NAME   (letters, digits and . _ @ -)")
    key = f"mellow-{secrets.token_urlsafe(32)}"
    print(f"the key of {sys.argv[1]}, shown only now: {key}", file=sys.stderr)
    print(sys.argv[1], _digest(key))


if __name__ == "__main__":
    main()
