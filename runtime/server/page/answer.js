// One answer: what is asked of the server, and what becomes of the message while it comes.

import { chatChunks } from "./api.js";

/** The request's body for a conversation whose last message is the answer to be written or gone on with. */
export function requestBody(messages, settings, model, goesOn) {
  const rows = [];
  if (settings.system.trim()) rows.push({ role: "system", content: settings.system });
  for (const one of goesOn ? messages : messages.slice(0, -1)) {
    const row = { role: one.role, content: one.content };
    // What was thought comes back: templates that keep it find the prompt that they have computed.
    if (one.role === "assistant" && one.reasoning) row.reasoning_content = one.reasoning;
    rows.push(row);
  }
  const body = {
    model,
    messages: rows,
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
  };
  const temperature = parseFloat(settings.temperature);
  const maxTokens = parseInt(settings.maxTokens, 10);
  if (Number.isFinite(temperature)) body.temperature = temperature;
  if (maxTokens > 0) body.max_tokens = maxTokens;
  if (settings.thinking) body.reasoning_effort = settings.thinking === "on" ? "medium" : "none";
  if (goesOn) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  return body;
}

/** Writes an answer into `message` and calls `changed` after every piece. phase: waiting, reading, writing. */
export class Answer {
  constructor(message, changed) {
    this.message = message;
    this.phase = "waiting";
    this.progress = null;
    this.begunMs = performance.now();
    this.firstMs = 0;
    this.thoughtMs = 0;
    this.numPieces = 0;
    this.changed = changed;
    this.abort = new AbortController();
  }

  stop() {
    this.abort.abort();
  }

  /** Runs to the end; what goes wrong becomes the message's `error`, and is given back. */
  async run(body, key) {
    const { message } = this;
    delete message.error;
    delete message.stopped;
    delete message.cut;
    try {
      for await (const chunk of chatChunks(body, key, this.abort.signal)) {
        this.take(chunk);
        this.changed();
      }
      return null;
    } catch (error) {
      if (this.abort.signal.aborted) {
        message.stopped = true;
        message.stats ??= this.ownStats();
        return null;
      }
      message.error = error.message;
      return error;
    } finally {
      this.phase = "done";
    }
  }

  take(chunk) {
    if (chunk.prompt_progress) {
      this.progress = chunk.prompt_progress;
      if (this.phase === "waiting") this.phase = "reading";
    }
    const choice = chunk.choices?.[0];
    const { content, reasoning_content: thought } = choice?.delta ?? {};
    if (content || thought) {
      const now = performance.now();
      this.phase = "writing";
      this.firstMs ||= now;
      this.numPieces++;
      if (thought) {
        this.message.reasoning += thought;
        this.thoughtMs = now - this.firstMs;
      }
      if (content) this.message.content += content;
    }
    if (choice?.finish_reason === "length") this.message.cut = true;
    if (chunk.usage || chunk.timings) this.message.stats = this.stats(chunk);
  }

  stats({ usage, timings }) {
    const found = { ...this.message.stats, ...this.ownStats() };
    if (usage) {
      found.promptTokens = usage.prompt_tokens;
      found.cachedTokens = usage.prompt_tokens_details?.cached_tokens;
      found.answerTokens = usage.completion_tokens;
    }
    if (timings) {
      found.promptMs = timings.prompt_ms;
      found.perSecond = timings.predicted_per_second;
    }
    return found;
  }

  ownStats() {
    return this.thoughtMs ? { thoughtMs: this.thoughtMs } : {};
  }

  /** Pieces of text a second so far: about the tokens. */
  get rate() {
    const seconds = (performance.now() - this.firstMs) / 1000;
    return this.firstMs && this.numPieces > 4 && seconds > 0.3 ? this.numPieces / seconds : 0;
  }
}
