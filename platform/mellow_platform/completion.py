"""Messages of OpenAI's chat protocol: a clip as a part of a request, and the completion in a response.

OpenAI's client accepts any response with status 200 as a completion; this module checks it.
"""

import base64
from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from mellow_platform.data.audio import decode, encode
from mellow_platform.data.audio_limits import AudioLimits

CONTAINERS = ("wav", "flac", "ogg", "mp3")  # accepted by the Serve endpoint
WAV_RATE = 32_000  # Hz, of converted clips


def input_audio(
    data: bytes, container: str, containers: Sequence[str] = CONTAINERS, limits: AudioLimits | None = None
) -> dict[str, Any]:
    """Return a clip as an `input_audio` part of a message.

    Args:
        data: bytes of the audio file.
        container: its name or the file's suffix (`flac`, `.flac`).
        containers: names that the endpoint accepts; other clips are converted to 16-bit WAV with one channel.
        limits: limits of the clip; by default those of `AudioLimits`.

    Raises:
        AudioError: the bytes are not usable audio; `reason` says why.
    """
    waveform = decode(data, WAV_RATE, limits)
    container = container.removeprefix(".").lower()
    if container not in containers:
        data, container = encode(waveform, WAV_RATE, "WAV"), "wav"
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": container}}


def read_completion(response: Any) -> ChatCompletion | None:
    """Return the completion in a raw response, or None if the body is not a completion with a choice."""
    try:
        completion = response.parse()
    except ValueError:
        return None
    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    return completion if choices and isinstance(choices[0], Choice) else None


def said(choice: Choice) -> str | None:
    """Return the text of a choice, or None if the message is missing (removed by a server's filter).

    Some servers send the text in parts; parts of other types are ignored. Half a character at the end of a cut answer
    becomes a question mark, because files cannot contain it.
    """
    message = getattr(choice, "message", None)
    if not message:
        return None
    content: Any = message.content
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text") or "") for part in parts)
    text = content or getattr(message, "refusal", None)
    return text.encode(errors="replace").decode() if isinstance(text, str) else ""
