"""Reading what a server that speaks OpenAI's chat protocol sends: its client takes whatever has a status of 200."""

from typing import Any

from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice


def read_completion(response: Any) -> ChatCompletion | None:
    """Return the completion in a raw response, or None where its body has none with a choice in it."""
    try:
        completion = response.parse()
    except ValueError:
        return None
    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    return completion if choices and isinstance(choices[0], Choice) else None


def said(choice: Choice) -> str | None:
    """Return the text of a choice, or None where a filter of the server's has taken the message.

    Some servers send it in parts, of which others than texts are left out. Half a character, where an answer was cut,
    is none that a file can hold, and becomes a question mark.
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
