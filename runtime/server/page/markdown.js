// A model's text, as far as it is Markdown: blocks of lines. Plain objects come out, which render.js makes
// nodes of. HTML is text here.

import { parseInline } from "./inline.js";

const MAX_DEPTH = 12;
const MAX_COLUMNS = 64;
const MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;

/** A text's blocks, each with `raw`, the lines it was made of: equal lines are equal blocks. */
export function parseBlocks(text) {
  return blocksOf(text.replace(/\r\n?/g, "\n").split("\n").map(expandTabs), 0);
}

function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [block, end] = oneBlock(lines, at, depth);
    block.raw = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function oneBlock(lines, at, depth) {
  const line = lines[at];
  const fence = openingFence(line);
  if (fence !== null) return fencedCode(lines, at, fence);
  const head = heading(line);
  if (head !== null) return [head, at + 1];
  if (isRule(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_DEPTH && /^ {0,3}>/.test(line)) return quote(lines, at, depth);
  if (depth < MAX_DEPTH && MARKER.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

function expandTabs(line) {
  if (!line.includes("\t")) return line;
  const rest = line.trimStart();
  const lead = line.slice(0, line.length - rest.length).replaceAll("\t", "    ");
  return lead + rest;
}

function openingFence(line) {
  const found = /^( *)(`{3,}|~{3,})(.*)$/.exec(line);
  if (found === null || (found[2][0] === "`" && found[3].includes("`"))) return null;
  return { indent: found[1].length, mark: found[2], language: found[3].trim().split(/\s/, 1)[0].slice(0, 40) };
}

function fencedCode(lines, at, { indent, mark, language }) {
  let end = at + 1;
  const close = mark[0];
  while (end < lines.length) {
    const words = lines[end].trim();
    if (words.length >= mark.length && words === close.repeat(words.length)) break;
    end++;
  }
  const inside = lines.slice(at + 1, end).map((line) => dedent(line, indent));
  return [{ kind: "code", language, text: inside.join("\n") }, Math.min(end + 1, lines.length)];
}

function dedent(line, count) {
  let at = 0;
  while (at < count && line[at] === " ") at++;
  return line.slice(at);
}

function heading(line) {
  const found = /^ {0,3}(#{1,6})(?: |$)/.exec(line);
  if (found === null) return null;
  let words = line.slice(found[0].length).trim();
  let end = words.length;
  while (words[end - 1] === "#") end--;
  if (end < words.length && (end === 0 || words[end - 1] === " ")) words = words.slice(0, end).trim();
  return { kind: "heading", level: found[1].length, children: parseInline(words) };
}

function isRule(line) {
  const words = line.trim();
  const sign = words[0];
  if (sign !== "-" && sign !== "*" && sign !== "_") return false;
  let count = 0;
  for (const one of words) {
    if (one === sign) count++;
    else if (one !== " ") return false;
  }
  return count >= 3;
}

function quote(lines, at, depth) {
  const inside = [];
  let end = at;
  while (end < lines.length && /^ {0,3}>/.test(lines[end])) {
    inside.push(lines[end].replace(/^ {0,3}> ?/, ""));
    end++;
  }
  return [{ kind: "quote", children: blocksOf(inside, depth + 1) }, end];
}

function isOrdered(marker) {
  return marker !== "-" && marker !== "*" && marker !== "+";
}

function list(lines, at, depth) {
  const first = MARKER.exec(lines[at]);
  const ordered = isOrdered(first[2]);
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const found = MARKER.exec(lines[end]);
    if (found === null || isOrdered(found[2]) !== ordered || isRule(lines[end])) break;
    const next = item(lines, end, found);
    items.push({ lines: next.lines, blank: next.blankInside });
    isLoose ||= next.blankInside;
    end = next.end;
    let following = end;
    while (following < lines.length && !lines[following].trim()) following++;
    if (following === lines.length) break;
    if (following > end && MARKER.test(lines[following]) && !isRule(lines[following])) end = following;
  }
  const children = items.map((one) => listItem(one.lines, depth));
  return [{ kind: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, isLoose, children }, end];
}

/** The lines of one item. Models indent what belongs to an item by two, three or four columns. */
function item(lines, at, found) {
  const lead = found[1].length;
  const width = lead + found[2].length + Math.min(Math.max(found[3].length, 1), 4);
  const inside = [lines[at].slice(Math.min(found[0].length, width))];
  let end = at + 1;
  let blanks = 0;
  let blankInside = false;
  let fence = openingFence(inside[0]);
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (!line.trim()) {
      blanks++;
      continue;
    }
    const indent = line.length - line.trimStart().length;
    if (fence === null) {
      const belongs = indent >= Math.min(width, lead + 2);
      const goesOn = blanks === 0 && !startsBlock(line);
      if (!belongs && !goesOn) break;
    } else if (indent < lead + 2 && blanks > 0 && MARKER.test(line)) break;
    for (; blanks > 0; blanks--) {
      inside.push("");
      blankInside ||= fence === null;
    }
    const words = dedent(line, Math.min(width, indent));
    inside.push(words);
    const mark = openingFence(words);
    if (fence === null) fence = mark;
    else if (mark !== null && mark.language === "" && mark.mark[0] === fence.mark[0]) fence = null;
  }
  return { lines: inside, end: end - blanks, blankInside };
}

function listItem(lines, depth) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  const rest = task === null ? lines : [lines[0].slice(4), ...lines.slice(1)];
  return { done: task === null ? null : task[1] !== " ", children: blocksOf(rest, depth + 1) };
}

function startsBlock(line) {
  return (
    openingFence(line) !== null || /^ {0,3}(?:#{1,6} |>)/.test(line) || isRule(line) ||
    /^ {0,3}(?:[-*+]|\d{1,9}[.)]) /.test(line)
  );
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim()) {
    const line = lines[end];
    const isNested = depth >= MAX_DEPTH && !openingFence(line) && !isRule(line);
    if (!isNested && startsBlock(line) && interrupts(line)) break;
    if (isTable(lines, end)) break;
    end++;
  }
  const words = lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd();
  return [{ kind: "paragraph", children: parseInline(words) }, end];
}

/** A line such as "1984. That year" in the middle of a paragraph begins no list. */
function interrupts(line) {
  const found = /^ {0,3}(\d{1,9})[.)] /.exec(line);
  return found === null || found[1] === "1";
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const marks = cells(lines[at + 1]);
  return marks.every((one) => /^:?-+:?$/.test(one)) && marks.length === cells(lines[at]).length;
}

function table(lines, at) {
  const align = cells(lines[at + 1]).map((one) => {
    if (one.endsWith(":")) return one.startsWith(":") ? "center" : "right";
    return one.startsWith(":") ? "left" : "";
  });
  const head = cells(lines[at]).map((one) => parseInline(one));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) {
    const row = cells(lines[end]).slice(0, head.length).map((one) => parseInline(one));
    while (row.length < head.length) row.push([]);
    rows.push(row);
    end++;
  }
  return [{ kind: "table", align, head, rows }, end];
}

/** A row's cells; a bar behind a backslash or inside code is none. */
function cells(line) {
  const words = line.trim();
  const found = [];
  let cell = "";
  let inCode = false;
  for (let at = words.startsWith("|") ? 1 : 0; at < words.length; at++) {
    if (words[at] === "\\" && words[at + 1] === "|") {
      cell += "|";
      at++;
    } else if (words[at] === "|" && !inCode && found.length < MAX_COLUMNS) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (words[at] === "`") inCode = !inCode && words.includes("`", at + 1);
      cell += words[at];
    }
  }
  if (cell.trim() || !words.endsWith("|")) found.push(cell.trim());
  return found;
}
