// Nodes for what markdown.js found. Elements are made by name out of a fixed set; a model's words are text in
// them, and the one attribute with words of a model is the address of a link, which inline.js has checked.

import { copyButton, element } from "./dom.js";
import { parseBlocks } from "./markdown.js";

const shown = new WeakMap(); // an element, and the raw lines of the blocks in it

/** Shows a text in an element. Called again with a longer text, it makes anew what has changed: the last
 * block, mostly. What the reader has selected above stays selected. */
export function renderText(target, text) {
  const blocks = parseBlocks(text);
  const before = shown.get(target) ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && before[same] === blocks[same].raw) same++;
  // A block that is the last may look otherwise with the next line: it is always made anew.
  if (same === before.length && same > 0 && same < blocks.length) same--;
  while (target.childNodes.length > same) target.lastChild.remove();
  for (const block of blocks.slice(same)) target.append(blockNode(block));
  shown.set(target, blocks.map((one) => one.raw));
}

function blockNode(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block);
    case "heading":
      return element(`h${Math.min(block.level + 1, 6)}`, {}, ...inlineNodes(block.children));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.children.map(blockNode));
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block);
    default:
      return element("p", { dir: "auto" }, ...inlineNodes(block.children));
  }
}

function codeBlock({ language, text }) {
  const caption = element("figcaption", {}, element("span", { textContent: language || "text" }), copyButton(() => text));
  const code = element("code", { textContent: text });
  return element("figure", { class: "code", dir: "ltr" }, caption, element("pre", { tabIndex: 0 }, code));
}

function listNode({ ordered, start, isLoose, children }) {
  const items = children.map(({ done, children: blocks }) => {
    const tight = blocks.flatMap((block) =>
      block.kind === "paragraph" && !isLoose ? inlineNodes(block.children) : [blockNode(block)],
    );
    const label = done ? "done" : "to do";
    const box =
      done === null ? null : element("input", { type: "checkbox", checked: done, disabled: true, "aria-label": label });
    return element("li", { dir: "auto", class: done === null ? null : "task" }, box, ...tight);
  });
  return element(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {}, ...items);
}

function tableNode({ align, head, rows }) {
  const row = (name, cells) =>
    element("tr", {}, ...cells.map((cell, at) => element(name, { class: align[at] || null }, ...inlineNodes(cell))));
  const body = element("tbody", {}, ...rows.map((cells) => row("td", cells)));
  const table = element("table", {}, element("thead", {}, row("th", head)), body);
  return element("div", { class: "table", tabIndex: 0, dir: "auto" }, table);
}

function inlineNodes(nodes) {
  return nodes.map((node) => {
    switch (node.kind) {
      case "text":
        return document.createTextNode(node.text);
      case "break":
        return element("br");
      case "code":
        return element("code", { textContent: node.text });
      case "link":
        return linkNode(node);
      default:
        return element(node.kind, {}, ...inlineNodes(node.children));
    }
  });
}

function linkNode({ address, children }) {
  return element(
    "a",
    { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" },
    ...inlineNodes(children),
  );
}
