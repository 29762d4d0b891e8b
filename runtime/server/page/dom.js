// Nodes of the document. Text goes in as text: there is no way from here to markup.

/** An element. given: properties, `class` and `data-` or `aria-` attributes; children: nodes and texts. */
export function element(name, given = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") made.className = value;
    else if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** The element of the page that has this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Puts a text into the clipboard; false if the browser refuses. Pages without TLS have no clipboard API. */
export async function copyText(text) {
  try {
    if (navigator.clipboard !== undefined) {
      await navigator.clipboard.writeText(text);
      return true;
    }
  } catch {
    // Not allowed: the old way may be.
  }
  const area = element("textarea", { value: text, class: "visually-hidden", readOnly: true });
  document.body.append(area);
  area.select();
  try {
    return document.execCommand("copy");
  } finally {
    area.remove();
  }
}

/** A small button that copies what `text()` gives, and says that it has. */
export function copyButton(text, label = "Copy") {
  const button = element("button", { type: "button", class: "small", textContent: label });
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}
