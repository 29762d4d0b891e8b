// The page: one conversation at a time, and what people do with it.

import { Answer, requestBody } from "./answer.js";
import { getJson, ServerError } from "./api.js";
import { byId } from "./dom.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { newChat, onOtherWindow, readChat, writeChat } from "./store.js";
import { AnswerView, count, UserView } from "./view.js";

const SWITCHES = /\b(?:enable_thinking|thinking|thinking_mode)\b/;
const TITLE_LENGTH = 60;
const POLL_MS = 1500;
const NEAR_PX = 80;

class Page {
  constructor() {
    this.chat = newChat();
    this.views = [];
    this.running = new Map(); // answers that are being written, of whichever conversation, by its id
    this.model = "";
    this.context = 0;
    this.follows = true;
    this.isDrawn = true;
    this.settings = new Settings({ changed: () => this.greet(), deleted: () => this.deletedAll() });
    this.sidebar = new Sidebar({
      open: (id) => this.show(this.running.get(id)?.chat ?? readChat(id) ?? newChat()),
      create: () => this.show(newChat()),
      deleted: (id) => this.deleted(id),
    });
    onOtherWindow((id) => this.otherWindow(id));
    this.listen();
    this.show(this.chat);
    this.greet();
    setInterval(() => this.draw(), 500); // clocks go on while nothing comes
    setInterval(() => this.keepRunning(), 5000);
  }

  /** The answer that is being written in the conversation that is shown, or null. */
  get answer() {
    return this.running.get(this.chat.id)?.answer ?? null;
  }

  listen() {
    const input = byId("input");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.answer?.stop());
    input.addEventListener("input", () => this.fitInput());
    input.addEventListener("keydown", (event) => {
      // While an input method composes a word, Enter belongs to it.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.send();
    });
    document.addEventListener("keydown", (event) => this.key(event));
    const scroll = byId("scroll");
    scroll.addEventListener("scroll", () => {
      this.follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_PX;
      byId("to-end").hidden = this.follows;
    });
    byId("to-end").addEventListener("click", () => this.toEnd(true));
    window.addEventListener("pagehide", () => {
      this.keepRunning();
      for (const { answer } of this.running.values()) answer.stop();
    });
  }

  key(event) {
    if (byId("settings").open) return;
    if (event.key === "Escape") {
      if (this.answer === null) this.sidebar.hide();
      else this.answer.stop();
    }
    else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.show(newChat());
    }
  }

  // ---- the server ------------------------------------------------------------------------------------------

  /** Asks who is there. While the model is loading, asks again. */
  async greet() {
    clearTimeout(this.later);
    const { key } = this.settings.values;
    try {
      const [models, properties] = await Promise.all([getJson("v1/models", key), getJson("props", key)]);
      const model = models.data[0];
      this.model = model.id;
      this.context = model.context_length;
      byId("model").textContent = model.id;
      document.title = `${model.id} · Krasis`;
      byId("input").placeholder = `Write to ${model.id}`;
      byId("facts").textContent =
        `${model.id}, ${count(this.context, "token")} of context. Programs reach it under ${new URL("v1", document.baseURI)}.`;
      this.settings.describe({
        temperature: properties.default_generation_settings?.params?.temperature,
        canThink: SWITCHES.test(properties.chat_template ?? ""),
      });
      this.notice("");
      this.showContext();
    } catch (error) {
      this.refused(error);
    }
  }

  refused(error) {
    if (error.status === 401) {
      this.notice(this.settings.values.key ? "The server does not know this API key." : "The server asks for an API key.");
      this.settings.open("key");
    } else if (error.status === 503 || error.status === 0 || !(error instanceof ServerError)) {
      this.notice(error.message);
      this.later = setTimeout(() => this.greet(), POLL_MS);
    } else this.notice(error.message);
  }

  notice(words) {
    const line = byId("notice");
    line.textContent = words;
    line.hidden = !words;
  }

  // ---- the conversation ------------------------------------------------------------------------------------

  show(chat) {
    this.chat = chat;
    this.views = [];
    byId("messages").replaceChildren();
    chat.messages.forEach((_, index) => this.addView(index));
    byId("welcome").hidden = chat.messages.length > 0;
    this.sidebar.show(chat.id);
    this.showContext();
    this.showRunning();
    this.draw();
    this.toEnd(true);
    if (window.matchMedia("(pointer: fine)").matches) byId("input").focus();
  }

  addView(index) {
    const message = this.chat.messages[index];
    const view =
      message.role === "user"
        ? new UserView(message, { edit: (words) => this.ask(words, index) })
        : new AnswerView(message, { again: () => this.write(index, false), goOn: () => this.write(index, true) });
    this.views.push(view);
    byId("messages").append(view.node);
  }

  /** The conversation up to a message, without it. */
  cutTo(index) {
    this.chat.messages.length = index;
    for (const view of this.views.splice(index)) view.node.remove();
  }

  send() {
    const input = byId("input");
    if (!input.value.trim() || this.answer !== null) return;
    const words = input.value;
    input.value = "";
    this.fitInput();
    this.ask(words, this.chat.messages.length);
  }

  ask(words, index) {
    if (this.answer !== null) return;
    this.cutTo(index);
    this.chat.messages.push({ role: "user", content: words, reasoning: "" });
    if (index === 0) this.chat.title = words.trim().replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
    this.addView(index);
    this.write(index + 1, false);
  }

  /** Writes the answer at an index; goesOn: more of the one that is there. */
  async write(index, goesOn) {
    if (this.answer !== null) return;
    this.cutTo(goesOn ? index + 1 : index);
    const { chat } = this;
    if (!goesOn) {
      chat.messages.push({ role: "assistant", content: "", reasoning: "" });
      this.addView(index);
    }
    byId("welcome").hidden = true;
    const answer = new Answer(chat.messages[index], () => this.drawSoon());
    const body = requestBody(chat.messages, this.settings.values, this.model, goesOn);
    this.running.set(chat.id, { chat, answer });
    this.showRunning();
    this.keep(chat);
    this.draw();
    this.toEnd(true);
    const error = await answer.run(body, this.settings.values.key);
    if (this.running.get(chat.id)?.answer !== answer) return; // the conversation was deleted
    this.running.delete(chat.id);
    this.keep(chat);
    if (this.chat !== chat) return; // another one is shown by now
    this.showRunning();
    this.views[index].update(null);
    this.showContext();
    this.toEnd(false);
    byId("state").textContent = error === null ? "The answer is complete." : "";
    if (error !== null && (error.status === 401 || error.status === 503)) this.refused(error);
  }

  showRunning() {
    const isOn = this.answer !== null;
    byId("send").hidden = isOn;
    byId("stop").hidden = !isOn;
    byId("messages").setAttribute("aria-busy", String(isOn));
  }

  keep(chat) {
    chat.changed = Date.now();
    const isKept = writeChat(chat);
    byId("storage-note").textContent = isKept ? "" : "This browser's storage is full or off: new text is kept until the page is closed. Delete conversations to make room.";
    this.sidebar.show(this.chat.id);
  }

  /** What is being written would be lost with the window otherwise. If it is, that is where it stopped. */
  keepRunning() {
    for (const { chat, answer } of this.running.values()) {
      answer.message.stopped = true;
      writeChat(chat);
      delete answer.message.stopped;
    }
  }

  deleted(id) {
    const found = this.running.get(id);
    this.running.delete(id);
    found?.answer.stop();
    if (id === this.chat.id) this.show(newChat());
    else this.sidebar.show(this.chat.id);
  }

  deletedAll() {
    for (const id of [...this.running.keys()]) this.deleted(id);
    this.show(newChat());
  }

  otherWindow(id) {
    const chat = id === null ? null : readChat(id);
    if (id !== null && chat === null) this.deleted(id);
    else if (id === this.chat.id && this.answer === null) this.show(chat);
    else this.sidebar.show(this.chat.id);
  }

  // ---- what is seen ----------------------------------------------------------------------------------------

  drawSoon() {
    if (!this.isDrawn) return;
    this.isDrawn = false;
    const draw = () => {
      if (this.isDrawn) return;
      this.isDrawn = true;
      this.draw();
    };
    // A page in the background gets no frames.
    requestAnimationFrame(draw);
    setTimeout(draw, 250);
  }

  draw() {
    if (this.answer === null) return;
    const index = this.chat.messages.indexOf(this.answer.message);
    if (index === -1) return;
    this.views[index].update(this.answer);
    this.toEnd(false);
  }

  showContext() {
    const stats = this.chat.messages.at(-1)?.stats ?? {};
    const used = (stats.promptTokens ?? 0) + (stats.answerTokens ?? 0);
    const line = byId("context");
    line.textContent = used && this.context ? `${Math.round((100 * used) / this.context)} % of ${count(this.context, "token")}` : "";
  }

  fitInput() {
    const input = byId("input");
    input.rows = 1;
    input.rows = Math.min(12, Math.max(1, Math.floor((input.scrollHeight - 24) / 24)));
  }

  toEnd(force) {
    const scroll = byId("scroll");
    if (force || this.follows) scroll.scrollTop = scroll.scrollHeight;
  }
}

new Page();
