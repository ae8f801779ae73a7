"""From the files of a request to the clips that a model hears: fetched, decoded and resampled within limits."""

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
from serve.messages import ClipFormat
from serve.schema import ClipSource, RequestError


class ClipLimits(AudioLimits):
    """Limits of the clips in a request; bytes and header are checked before decoding."""

    max_bytes: MaxBytes = 16 << 20
    max_samples: MaxSamples = 32 << 20
    max_channels: MaxChannels = 8
    min_rate: MinRate = 4_000
    max_rate: MaxRate = 192_000
    url_hosts: list[str] = Field([], description="hosts that clips may be fetched from; none: URLs are refused")
    url_seconds: float = Field(10.0, gt=0, description="a host that takes longer to send a clip is given up")
    decoders: int = Field(2, ge=1, description="clips decoded at once by a replica; each holds max_samples in memory")


@dataclass(frozen=True)
class DecodedQuestion:
    """What a model hears of a request's recordings, and a hash of their files: equal for equal ones, whoever sent them.

    It finds the replica, which looks the clips up by what is heard; to hash that here, too, would take longer.
    """

    heard: list[Window]
    key: str


class ClipReader:
    """Reads the clips of requests, a few at a time."""

    def __init__(self, limits: ClipLimits):
        self._limits = limits
        self._pool = concurrent.futures.ThreadPoolExecutor(limits.decoders, thread_name_prefix="decode")

    async def read(self, sources: Sequence[ClipSource], front_end: ClipFormat, rule: str) -> DecodedQuestion:
        """Return what is heard of one or two recordings, by the window rule.

        Raises:
            RequestError: a clip cannot be fetched, decoded, or is past a limit; or the rule does not fit.
        """
        files = await asyncio.gather(*(self._file(source) for source in sources))
        hearing = asyncio.get_running_loop().run_in_executor(self._pool, self._hear, files, sources, front_end, rule)
        return await hearing

    def _hear(
        self, files: Sequence[bytes], sources: Sequence[ClipSource], front_end: ClipFormat, rule: str
    ) -> DecodedQuestion:
        recordings = [
            self._decode(file, source, number, front_end.sampling_rate)
            for number, (file, source) in enumerate(zip(files, sources, strict=True))
        ]
        try:
            heard = windows(recordings, front_end.clip_samples, front_end.sampling_rate, rule)
        except ValueError as error:
            raise RequestError(str(error), "window") from error
        digest = hashlib.sha256(rule.encode())
        for file in files:
            digest.update(file)
        return DecodedQuestion(heard, digest.hexdigest())

    def _decode(self, file: bytes, source: ClipSource, number: int, rate: int) -> np.ndarray:
        try:
            return decode(file, rate, self._limits)
        except AudioError as error:
            raise RequestError(f"clip {number}: {error}", source.param, code=error.reason) from error

    async def _file(self, source: ClipSource) -> bytes:
        return source.data if source.data is not None else await self._fetch(str(source.url), source.param)

    async def _fetch(self, url: str, param: str) -> bytes:
        """Return the file at a URL whose host is one of those that are allowed."""
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise RequestError(f"not a URL: {error}", param) from error
        if parts.scheme not in ("http", "https") or host not in self._limits.url_hosts:
            raise RequestError(
                "clips are not fetched from this address: send the file itself as input_audio",
                param,
                code="url_refused",
            )
        limit, found = self._limits.max_bytes, bytearray()
        timeout = aiohttp.ClientTimeout(total=self._limits.url_seconds)
        try:
            # A redirect could lead to a host that is not allowed.
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise RequestError(f"the clip's host answered {response.status}", param, code="url_failed")
                async for block in response.content.iter_chunked(1 << 16):
                    found += block
                    if len(found) > limit:
                        raise RequestError(f"the file at the URL has more than {limit} bytes", param, code="too_large")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise RequestError(
                f"the clip cannot be fetched: {type(error).__name__}", param, code="url_failed"
            ) from error
        return bytes(found)
