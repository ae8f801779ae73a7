/** The endpoint, as OpenAI's API has it: which models there are, and an answer as it is written. */

const LONGEST_ANSWER = 300; // tokens

/** What the server refused or could not do; the message is for people. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** @returns {Promise<string[]>} the names of the served models */
export async function models(key) {
  const response = await request("v1/models", { headers: headers(key) });
  return parsed(await response.text()).data.map((model) => model.id);
}

/**
 * Ask, and yield the answer piece by piece.
 * @param {{model: string, question: string, clips: string[], key: string?, signal: AbortSignal}} what clips in base64
 * @yields {{text: string, finish: "stop" | "length" | null}}
 */
export async function* answer({ model, question, clips, key, signal }) {
  const audio = clips.map((data) => ({ type: "input_audio", input_audio: { data, format: "wav" } }));
  const body = {
    model,
    stream: true,
    max_tokens: LONGEST_ANSWER,
    messages: [{ role: "user", content: [{ type: "text", text: question }, ...audio] }],
  };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const { error, choices } = parsed(data);
    if (error) throw new ServerError(error.message);
    const [choice] = choices; // a chunk may come without one: usage
    if (choice) yield { text: choice.delta.content ?? "", finish: choice.finish_reason ?? null };
  }
  throw new ServerError("The connection ended before the answer did.");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ServerError("The server's answer cannot be read: it is not JSON.");
  }
}

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const told = await response.json().catch(() => null); // a proxy's error page is no JSON
  let message = told?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  const wait = response.headers.get("Retry-After");
  if (response.status === 429) {
    message = `The server is busy (${message}). Try again ${/^\d+$/.test(wait) ? `in ${wait} s` : "in a moment"}.`;
  }
  return new ServerError(message, response.status);
}

/** Yield the data of the server-sent events in `body`. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = lines.pop(); // its end has not come yet
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {}); // nobody reads on: let the server stop too
  }
}
