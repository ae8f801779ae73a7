"""Audio files of a request to clips for the model: fetched, decoded, resampled and cut into windows, within limits."""

import asyncio
import concurrent.futures
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from pydantic import Field

from mellow_platform.data.audio import AudioError, decode
from mellow_platform.data.audio_limits import AudioLimits, MaxBytes, MaxChannels, MaxRate, MaxSamples, MinRate
from mellow_platform.inference.windows import Window, windows
from serve.error_responses import RequestError
from serve.messages import ClipFormat
from serve.schema import ClipSource


class ClipLimits(AudioLimits):
    """Limits of the clips in a request; bytes and header are checked before decoding."""

    max_bytes: MaxBytes = 16 << 20
    max_samples: MaxSamples = 32 << 20
    max_channels: MaxChannels = 8
    min_rate: MinRate = 4_000
    max_rate: MaxRate = 192_000
    url_hosts: list[str] = Field([], description="hosts that clips are fetched from; default: none, URLs are refused")
    url_seconds: float = Field(10.0, gt=0, description="longest time to fetch a clip, in seconds")
    decoders: int = Field(2, ge=1, description="files that a replica decodes at once; each takes max_samples of memory")


@dataclass(frozen=True)
class DecodedQuestion:
    """Windows of a request's recordings, and a key that is equal for equal audio files and window rules.

    The key chooses the replica. It hashes the files and not the clips, as the replica's cache does: clips are larger.
    """

    windows: list[Window]
    key: str


class ClipReader:
    """Reads the clips of requests, a few at a time."""

    def __init__(self, limits: ClipLimits):
        self._limits = limits
        self._pool = concurrent.futures.ThreadPoolExecutor(limits.decoders, thread_name_prefix="decode")

    async def read(self, sources: Sequence[ClipSource], front_end: ClipFormat, rule: str) -> DecodedQuestion:
        """Return the windows of one or two recordings by a window rule.

        Raises:
            RequestError: a clip cannot be fetched or decoded, or is past a limit; or the rule is for one recording.
        """
        files = await asyncio.gather(*(self._file(source) for source in sources))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._decode_question, files, sources, front_end, rule)

    def _decode_question(
        self, files: Sequence[bytes], sources: Sequence[ClipSource], front_end: ClipFormat, rule: str
    ) -> DecodedQuestion:
        recordings = [
            self._decode(file, source, number, front_end.sampling_rate)
            for number, (file, source) in enumerate(zip(files, sources, strict=True))
        ]
        try:
            cut = windows(recordings, front_end.clip_samples, front_end.sampling_rate, rule)
        except ValueError as error:
            raise RequestError(str(error), "window") from error
        digest = hashlib.sha256(rule.encode())
        for file in files:
            digest.update(file)
        return DecodedQuestion(cut, digest.hexdigest())

    def _decode(self, file: bytes, source: ClipSource, number: int, rate: int) -> np.ndarray:
        try:
            return decode(file, rate, self._limits)
        except AudioError as error:
            raise RequestError(f"clip {number}: {error}", source.param, code=error.reason) from error

    async def _file(self, source: ClipSource) -> bytes:
        """Return the file of a request, or the file at its URL if the host is allowed."""
        if source.data is not None:
            return source.data
        url, param = str(source.url), source.param
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise RequestError(f"not a URL: {error}", param) from error
        if parts.scheme not in ("http", "https") or host not in self._limits.url_hosts:
            message = "the URL's host is not in url_hosts; send the audio file as input_audio"
            raise RequestError(message, param, code="url_refused")
        limit, found = self._limits.max_bytes, bytearray()
        timeout = aiohttp.ClientTimeout(total=self._limits.url_seconds)
        try:
            # A redirect could lead to a host that is not allowed, so it is an error.
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise RequestError(f"the URL's host answered {response.status}", param, code="url_failed")
                async for block in response.content.iter_chunked(1 << 16):
                    found += block
                    if len(found) > limit:
                        raise RequestError(f"the file at the URL has more than {limit} bytes", param, code="too_large")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            message = f"the URL cannot be fetched: {type(error).__name__}"
            raise RequestError(message, param, code="url_failed") from error
        return bytes(found)
