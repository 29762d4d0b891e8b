// The server's HTTP. Paths are relative to the page, so that a proxy may put both under a folder.

/** What the server refused, in its words. status 0: nobody answered. */
export class ServerError extends Error {
  constructor(message, status, code = "", retryAfterS = 0) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

const GONE = "The server cannot be reached. Is it still running?";

async function send(path, key, options = {}) {
  const headers = { Accept: "application/json", ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    // What fetch says of a key it cannot send is about headers, and helps nobody.
    throw new ServerError(/[^\x20-\x7e]/.test(key) ? "An API key has letters of ASCII only." : GONE, 0);
  }
  if (reply.ok) return reply;
  throw await refusal(reply);
}

async function refusal(reply) {
  let said = {};
  try {
    said = (await reply.json()).error ?? {};
  } catch {
    // A proxy's page of HTML, or nothing: the status has to do.
  }
  const words = typeof said.message === "string" ? said.message : `The server answered ${reply.status}.`;
  return new ServerError(words, reply.status, String(said.code ?? ""), Number(reply.headers.get("retry-after")) || 0);
}

export async function getJson(path, key) {
  return (await send(path, key)).json();
}

/** The chunks of a chat's answer, as they come. Ends at [DONE]; throws ServerError. */
export async function* chatChunks(body, key, signal) {
  const reply = await send("v1/chat/completions", key, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(body),
  });
  for await (const data of eventData(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(String(chunk.error.message), 200, String(chunk.error.code ?? ""));
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer did.", 0);
}

/** The data of server-sent events. */
async function* eventData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The connection broke before the answer ended.", 0);
      }
      if (piece.done) return;
      const lines = (rest + decoder.decode(piece.value, { stream: true })).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
