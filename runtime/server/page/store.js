// What this browser keeps: conversations, one entry each, and settings. Other programs that were served from
// the same address share the storage, so nothing in it is trusted to have a form.

const CHAT = "krasis.chat.";
const SETTINGS = "krasis.settings";
const FIELDS = ["system", "temperature", "maxTokens", "thinking", "theme", "key"];
const FLAGS = ["stopped", "cut"];
const memory = new Map(); // where the browser keeps nothing

function storage() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

function read(key) {
  try {
    return JSON.parse(memory.get(key) ?? storage()?.getItem(key) ?? "null");
  } catch {
    return null;
  }
}

/** Whether it was kept beyond this page's life. */
function write(key, value) {
  const text = JSON.stringify(value);
  try {
    const kept = storage();
    if (kept !== null) {
      kept.setItem(key, text);
      memory.delete(key);
      return true;
    }
  } catch {
    // Full: this page goes on with what it has.
  }
  memory.set(key, text);
  return false;
}

function remove(key) {
  memory.delete(key);
  storage()?.removeItem(key);
}

function text(value) {
  return typeof value === "string" ? value : "";
}

export function readSettings() {
  const given = read(SETTINGS) ?? {};
  return Object.fromEntries(FIELDS.map((name) => [name, text(given[name])]));
}

export function writeSettings(settings) {
  return write(SETTINGS, settings);
}

/** An id. crypto.randomUUID is there with TLS only. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (one) => one.toString(16).padStart(2, "0")).join("");
}

export function newChat() {
  return { id: newId(), title: "", changed: Date.now(), messages: [] };
}

/** All conversations, the newest first. */
export function readChats() {
  const kept = storage();
  const keys = new Set(memory.keys());
  for (let at = 0; kept !== null && at < kept.length; at++) keys.add(kept.key(at));
  const found = [...keys].filter((key) => key.startsWith(CHAT)).map((key) => readChat(key.slice(CHAT.length)));
  return found.filter((one) => one !== null).sort((one, other) => other.changed - one.changed);
}

export function readChat(id) {
  const given = read(CHAT + id);
  if (given === null || typeof given !== "object" || !Array.isArray(given.messages)) return null;
  const messages = given.messages.filter((one) => one?.role === "user" || one?.role === "assistant").map(message);
  return { id, title: text(given.title), changed: Number(given.changed) || 0, messages };
}

function message(given) {
  const found = { role: given.role, content: text(given.content), reasoning: text(given.reasoning) };
  for (const flag of FLAGS) if (given[flag] === true) found[flag] = true;
  if (text(given.error)) found.error = given.error;
  if (given.stats !== null && typeof given.stats === "object") found.stats = numbers(given.stats);
  return found;
}

function numbers(given) {
  return Object.fromEntries(Object.entries(given).filter(([, value]) => Number.isFinite(value)));
}

/** Whether it was kept. */
export function writeChat(chat) {
  return write(CHAT + chat.id, chat);
}

export function deleteChat(id) {
  remove(CHAT + id);
}

/** Calls `changed` when another window of this browser has changed conversations. */
export function onOtherWindow(changed) {
  window.addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CHAT)) changed(event.key?.slice(CHAT.length) ?? null);
  });
}
