// The inside of a paragraph: emphasis, code, links. A text becomes a tree of plain objects; nothing of it is
// ever markup. Every search that fails is remembered, so the time is linear in the text whatever it says.

const MAX_DEPTH = 8;
const MAX_URL = 4096;
const MAX_PARENTHESES = 8; // in an address
const PUNCTUATION = /[!-/:-@[-`{-~]/;
// Backslashes before these are mathematics in models' texts, and stay.
const KEPT_ESCAPES = "()[]";
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", "#39": "'" };
const DELIMITERS = [
  ["***", "both"], ["___", "both"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"],
];

/** The address of a link if it may be followed from this page, else null. Only whole addresses of the web and
 * of mail: no scripts, no files, no paths of this server. */
export function safeAddress(text) {
  const trimmed = text.trim();
  if (trimmed.length > MAX_URL || !/^(?:https?:\/\/|mailto:)/i.test(trimmed)) return null;
  try {
    const url = new URL(trimmed);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** A text's nodes: {kind: text, code, strong, em, del, link, break}, with `text` or `children`. */
export function parseInline(text, depth = 0, inLink = false) {
  return new Inline(text, depth, inLink).parse();
}

class Inline {
  constructor(text, depth, inLink) {
    this.text = text;
    this.depth = depth;
    this.inLink = inLink;
    this.nodes = [];
    this.plain = "";
    this.codes = codeSpans(text);
    this.brackets = inLink || !text.includes("](") ? new Map() : matchingBrackets(text, this.codes);
    this.noCloser = new Set();
  }

  parse() {
    let at = 0;
    while (at < this.text.length) at = this.step(at);
    this.flush();
    return this.nodes;
  }

  step(at) {
    const { text } = this;
    switch (text[at]) {
      case "\\":
        return this.escape(at);
      case "`": {
        const end = this.codes.get(at);
        return end === undefined ? this.take(at, backticks(text, at)) : this.code(at, end);
      }
      case "\n":
        this.plain = this.plain.replace(/ {1,8}$/, "");
        this.push({ kind: "break" });
        return at + 1;
      case "*":
      case "_":
      case "~":
        return this.emphasis(at);
      case "!":
        return text[at + 1] === "[" ? this.link(at + 1, at) : this.take(at, 1);
      case "[":
        return this.link(at, at);
      case "<":
        return this.angle(at);
      case "&":
        return this.entity(at);
      case "h":
        return this.bareAddress(at);
      default: {
        const next = /[\\`\n*_~![<&h]/g;
        next.lastIndex = at + 1;
        return this.take(at, (next.exec(text)?.index ?? text.length) - at);
      }
    }
  }

  take(at, length) {
    this.plain += this.text.slice(at, at + length);
    return at + length;
  }

  flush() {
    if (this.plain) this.nodes.push({ kind: "text", text: this.plain });
    this.plain = "";
  }

  push(node) {
    this.flush();
    this.nodes.push(node);
  }

  inner(text, inLink = this.inLink) {
    return this.depth < MAX_DEPTH
      ? parseInline(text, this.depth + 1, inLink)
      : [{ kind: "text", text }];
  }

  escape(at) {
    const next = this.text[at + 1];
    if (next === "\n") return at + 1; // a hard break, as every line's end is one here
    if (next === undefined || !PUNCTUATION.test(next) || KEPT_ESCAPES.includes(next)) return this.take(at, 1);
    this.plain += next;
    return at + 2;
  }

  code(at, end) {
    const length = backticks(this.text, at);
    let words = this.text.slice(at + length, end - length).replaceAll("\n", " ");
    if (words.startsWith(" ") && words.endsWith(" ") && words.trim()) words = words.slice(1, -1);
    this.push({ kind: "code", text: words });
    return end;
  }

  emphasis(at) {
    const { text } = this;
    for (const [mark, kind] of DELIMITERS) {
      if (!text.startsWith(mark, at)) continue;
      const end = this.closer(mark, at);
      if (end === -1) continue;
      const children = this.inner(text.slice(at + mark.length, end));
      if (kind === "both") this.push({ kind: "strong", children: [{ kind: "em", children }] });
      else this.push({ kind, children });
      return end + mark.length;
    }
    let length = 1;
    while (text[at + length] === text[at]) length++;
    return this.take(at, length);
  }

  /** Where the mark that opens at `at` is closed, or -1. */
  closer(mark, at) {
    const { text } = this;
    const sign = mark[0];
    const first = at + mark.length;
    if (!text[first] || /\s/.test(text[first])) return -1;
    if (text[first] === sign && mark.length < 3) return -1;
    if (sign === "_" && isWord(text[at - 1])) return -1;
    if (this.noCloser.has(mark)) return -1;
    for (let end = text.indexOf(mark, first + 1); end !== -1; end = text.indexOf(mark, end)) {
      const codeEnd = this.codes.covering(end);
      let run = mark.length;
      while (text[end + run] === sign) run++;
      if (codeEnd !== -1) end = codeEnd;
      else if (run !== mark.length && !(mark.length === 2 && run === 3)) end += run;
      else if (/\s/.test(text[end - 1]) || text[end - 1] === "\\") end += run;
      else if (sign === "_" && isWord(text[end + run])) end += run;
      else return end + run - mark.length;
    }
    this.noCloser.add(mark); // what closes does not depend on what opened: no later one is closed either
    return -1;
  }

  /** A link, or a picture: nothing is loaded from anywhere, so a picture is a link to it. */
  link(open, from) {
    const { text } = this;
    const close = this.brackets.get(open);
    if (close === undefined || text[close + 1] !== "(") return this.take(from, open + 1 - from);
    const end = closingParenthesis(text, close + 2);
    if (end === -1) return this.take(from, open + 1 - from);
    const target = text.slice(close + 2, end).trim();
    const address = safeAddress(/^<([^<>]*)>|^[^\s]*/.exec(target)?.[1] ?? target.split(/\s/, 1)[0]);
    const label = text.slice(open + 1, close);
    if (address === null) {
      // What may not be followed is shown as it was written.
      return this.take(from, end + 1 - from);
    }
    this.push({ kind: "link", address, children: label ? this.inner(label, true) : [{ kind: "text", text: address }] });
    return end + 1;
  }

  angle(at) {
    const line = /^<br ?\/?>/i.exec(this.text.slice(at, at + 6));
    if (line !== null) {
      this.push({ kind: "break" });
      return at + line[0].length;
    }
    const end = this.inLink ? -1 : this.text.slice(at, at + MAX_URL).search(/[>\s]/);
    if (end > 0 && this.text[at + end] === ">") {
      const words = this.text.slice(at + 1, at + end);
      const address = safeAddress(words);
      if (address !== null) {
        this.push({ kind: "link", address, children: [{ kind: "text", text: words }] });
        return at + end + 1;
      }
    }
    return this.take(at, 1);
  }

  entity(at) {
    const found = /^&(#?\w{1,5});/.exec(this.text.slice(at, at + 8));
    if (found === null || !Object.hasOwn(ENTITIES, found[1])) return this.take(at, 1);
    this.plain += ENTITIES[found[1]];
    return at + found[0].length;
  }

  bareAddress(at) {
    const { text } = this;
    if (this.inLink || isWord(text[at - 1]) || !/^https?:\/\//.test(text.slice(at, at + 8))) return this.take(at, 1);
    let words = /^[^\s<>"`\u0000-\u0020]*/.exec(text.slice(at, at + MAX_URL))[0];
    for (;;) {
      const last = words.at(-1);
      if (/[.,;:!?'*_~]/.test(last)) words = words.slice(0, -1);
      else if (last === ")" && words.split(")").length > words.split("(").length) words = words.slice(0, -1);
      else if (last === "]" || last === "}") words = words.slice(0, -1);
      else break;
    }
    const address = words.length > 8 ? safeAddress(words) : null;
    if (address === null) return this.take(at, 1);
    this.push({ kind: "link", address, children: [{ kind: "text", text: words }] });
    return at + words.length;
  }
}

function isWord(sign) {
  return sign !== undefined && /[\p{L}\p{N}]/u.test(sign);
}

function backticks(text, at) {
  let end = at;
  while (text[end] === "`") end++;
  return end - at;
}

class Spans {
  constructor() {
    this.starts = [];
    this.ends = [];
    this.byStart = new Map();
  }

  add(start, end) {
    this.starts.push(start);
    this.ends.push(end);
    this.byStart.set(start, end);
  }

  get(start) {
    return this.byStart.get(start);
  }

  /** The end of the span that a position is in, or -1. */
  covering(at) {
    let low = 0;
    let high = this.starts.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= at) low = middle + 1;
      else high = middle;
    }
    return low > 0 && at < this.ends[low - 1] ? this.ends[low - 1] : -1;
  }
}

/** Spans of code: a run of backticks up to the next run of the same length. */
function codeSpans(text) {
  const spans = new Spans();
  const runs = [];
  for (let at = text.indexOf("`"); at !== -1; at = text.indexOf("`", at)) {
    const length = backticks(text, at);
    runs.push([at, length]);
    at += length;
  }
  const next = new Map(); // a length, and the run of that length which comes next
  const following = new Array(runs.length);
  for (let index = runs.length - 1; index >= 0; index--) {
    following[index] = next.get(runs[index][1]);
    next.set(runs[index][1], index);
  }
  for (let index = 0; index < runs.length; index++) {
    const [at, length] = runs[index];
    if (following[index] === undefined || text[at - 1] === "\\") continue;
    spans.add(at, runs[following[index]][0] + length);
    index = following[index];
  }
  return spans;
}

/** Which bracket closes which. */
function matchingBrackets(text, codes) {
  const found = new Map();
  const open = [];
  const sign = /[[\]`\\]/g;
  for (let one = sign.exec(text); one !== null; one = sign.exec(text)) {
    const at = one.index;
    const end = one[0] === "`" ? codes.get(at) : undefined;
    if (end !== undefined) sign.lastIndex = end;
    else if (one[0] === "\\") sign.lastIndex = at + 2;
    else if (one[0] === "[") open.push(at);
    else if (one[0] === "]" && open.length) found.set(open.pop(), at);
  }
  return found;
}

function closingParenthesis(text, from) {
  let depth = 1;
  const limit = Math.min(text.length, from + MAX_URL);
  for (let at = from; at < limit; at++) {
    if (text[at] === "\n" || depth > MAX_PARENTHESES) return -1;
    if (text[at] === "(") depth++;
    else if (text[at] === ")" && --depth === 0) return at;
  }
  return -1;
}
