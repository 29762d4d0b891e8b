// Messages as people see them.

import { copyButton, element } from "./dom.js";
import { renderText } from "./render.js";

const NUMBER = new Intl.NumberFormat("en");

export function seconds(ms) {
  const value = ms / 1000;
  if (value < 10) return `${value.toFixed(1)} s`;
  return value < 120 ? `${Math.round(value)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function count(number, noun) {
  return `${NUMBER.format(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function button(label, action, title = label) {
  const made = element("button", { type: "button", class: "small", textContent: label, title });
  made.addEventListener("click", action);
  return made;
}

/** A user's message. edit(text): asks again with other words. */
export class UserView {
  constructor(message, { edit }) {
    this.text = element("div", { class: "said", dir: "auto", textContent: message.content });
    this.buttons = element("div", { class: "actions" }, copyButton(() => message.content));
    this.buttons.append(button("Edit", () => this.edit(message, edit)));
    this.node = element("article", { class: "user", "aria-label": "You" }, this.text, this.buttons);
  }

  edit(message, done) {
    const area = element("textarea", { class: "edit", value: message.content, "aria-label": "The message" });
    area.rows = Math.min(12, message.content.split("\n").length + 1);
    const close = () => this.node.replaceChildren(this.text, this.buttons);
    const send = () => (area.value.trim() ? done(area.value) : close());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    });
    const row = element("div", { class: "actions shown" }, button("Cancel", close), button("Send", send, "Ctrl+Enter"));
    this.node.replaceChildren(area, row);
    area.focus();
  }
}

/** An answer. again: writes another one; goOn: goes on with this one. */
export class AnswerView {
  constructor(message, { again, goOn }) {
    this.message = message;
    this.summary = element("summary");
    this.reasoning = element("div", { class: "text" });
    this.thoughts = element("details", { class: "thoughts" }, this.summary, this.reasoning);
    this.thoughts.addEventListener("toggle", () => this.showReasoning());
    this.text = element("div", { class: "text" });
    this.bar = element("progress", { max: 1, "aria-label": "Prompt" });
    this.barText = element("span");
    this.progress = element("div", { class: "progress" }, this.bar, this.barText);
    this.error = element("p", { class: "error", role: "alert" });
    this.stats = element("span", { class: "stats" });
    this.buttons = element("div", { class: "actions" }, copyButton(() => message.content), button("Again", again, "Write another answer"));
    this.more = button("Continue", goOn, "Go on with this answer");
    this.buttons.append(this.more, this.stats);
    const parts = [this.thoughts, this.progress, this.text, this.error, this.buttons];
    this.node = element("article", { class: "assistant", "aria-label": "Answer" }, ...parts);
    this.update(null);
  }

  /** Shows the message as it is now. answer: what is writing it, if anything. */
  update(answer) {
    const { message } = this;
    this.thoughts.hidden = !message.reasoning;
    this.showReasoning();
    if (message.reasoning) this.summary.textContent = this.thoughtWords(answer);
    this.text.hidden = !message.content;
    renderText(this.text, message.content);
    this.error.hidden = !message.error;
    this.error.textContent = message.error ?? "";
    this.node.classList.toggle("writing", answer?.phase === "writing");
    this.showProgress(answer);
    this.buttons.hidden = answer !== null && answer.phase !== "done" && answer.phase !== "writing";
    this.buttons.classList.toggle("busy", answer !== null);
    this.more.hidden = answer !== null || !message.content || !(message.cut || message.stopped);
    this.stats.textContent = answer === null ? this.statWords() : rateWords(answer);
  }

  showReasoning() {
    if (this.thoughts.open) renderText(this.reasoning, this.message.reasoning);
  }

  thoughtWords(answer) {
    if (answer?.phase === "writing" && !this.message.content) return `Thinking… ${seconds(answer.thoughtMs)}`;
    const ms = this.message.stats?.thoughtMs ?? answer?.thoughtMs;
    return ms ? `Thought for ${seconds(ms)}` : "Thoughts";
  }

  showProgress(answer) {
    const isOn = answer?.phase === "waiting" || answer?.phase === "reading";
    this.progress.hidden = !isOn;
    if (!isOn) return;
    const time = seconds(performance.now() - answer.begunMs);
    const { total = 0, cache = 0, processed = 0 } = answer.progress ?? {};
    if (total > cache && processed < total) {
      this.bar.value = (processed - cache) / (total - cache);
      const known = cache ? ` (${NUMBER.format(cache)} known already)` : "";
      this.barText.textContent = `Reading the prompt: ${NUMBER.format(processed)} of ${count(total, "token")}${known}, ${time}`;
    } else {
      this.bar.removeAttribute("value");
      this.barText.textContent = answer.phase === "waiting" ? `Waiting, ${time}` : `Reading the prompt, ${time}`;
    }
  }

  statWords() {
    const { answerTokens, perSecond, promptTokens, cachedTokens, promptMs } = this.message.stats ?? {};
    const words = [];
    if (this.message.stopped) words.push("Stopped");
    if (this.message.cut) words.push("Cut at its longest");
    if (answerTokens) words.push(count(answerTokens, "token"));
    if (perSecond) words.push(`${perSecond < 10 ? perSecond.toFixed(2) : perSecond.toFixed(1)} tokens/s`);
    if (promptTokens) {
      const known = cachedTokens ? `, ${NUMBER.format(cachedTokens)} known` : "";
      words.push(`prompt ${NUMBER.format(promptTokens)}${known}${promptMs ? ` in ${seconds(promptMs)}` : ""}`);
    }
    return words.join(" · ");
  }
}

function rateWords(answer) {
  return answer.rate ? `about ${answer.rate.toFixed(1)} tokens/s` : "";
}
