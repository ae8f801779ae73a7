"""API keys of the endpoint, which stores only their SHA-256.

python -m serve.keys alice >> keys.txt        # prints a key for alice, and appends its line to the key file
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
RELOAD_SECONDS = 5.0  # an edit of the file takes effect within this time, without a restart
logger = logging.getLogger("ray.serve")


class KeyFile:
    """A file with a line `name sha256-of-the-key` per key; empty lines and lines that start with # are ignored.

    Keys are random and long, so a hash without salt cannot be reversed by guessing.

    Raises:
        ValueError: a line is malformed, or there is no key; the message names file and line.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str):
        self._path = Path(path)
        self._read_at = time.monotonic()
        self._keys = self._read()
        if not self._keys:
            raise ValueError(f"{self._path} contains no key; add a line with `python -m serve.keys NAME`")

    def holder(self, key: str) -> str | None:
        """Return the name of a key's holder, or None if the key is invalid."""
        if time.monotonic() - self._read_at > RELOAD_SECONDS:
            self._read_at = time.monotonic()
            try:
                self._keys = self._read()
            except (OSError, ValueError) as error:  # the file may be half edited: the previous keys stay valid
                logger.error(f"API keys are not reloaded: {error}")
        digest = _digest(key)
        # All keys are compared, so that the time reveals nothing about them.
        found = [name for known, name in self._keys.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def _read(self) -> dict[str, str]:
        keys = {}
        for number, line in enumerate(self._path.read_text().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            if not (match := LINE.fullmatch(line.strip())):
                raise ValueError(
                    f"{self._path}, line {number}: expected a name and the SHA-256 of a key, as "
                    "`python -m serve.keys NAME` prints"
                )
            keys[match["digest"]] = match["name"]
        return keys


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def main() -> None:
    if len(sys.argv) != 2 or not LINE.fullmatch(f"{sys.argv[1]} {'0' * 64}"):
        sys.exit("usage: python -m serve.keys NAME   (letters, digits and . _ @ -)")
    key = f"mellow-{secrets.token_urlsafe(32)}"
    print(f"key for {sys.argv[1]} (not shown again): {key}", file=sys.stderr)
    print(sys.argv[1], _digest(key))


if __name__ == "__main__":
    main()
