// The list of conversations.

import { byId, element } from "./dom.js";
import { deleteChat, readChats } from "./store.js";

const PHONE = window.matchMedia("(max-width: 800px)");

export class Sidebar {
  /** open(id), created(), deleted(id): what the page does then. */
  constructor({ open, create, deleted }) {
    this.open = open;
    this.deleted = deleted;
    this.list = byId("chats");
    byId("new-chat").addEventListener("click", () => {
      this.hide();
      create();
    });
    byId("open-sidebar").addEventListener("click", () => this.toggle());
    byId("close-sidebar").addEventListener("click", () => this.hide());
    byId("scrim").addEventListener("click", () => this.hide());
    PHONE.addEventListener("change", () => this.hide());
    this.hide();
  }

  toggle() {
    if (PHONE.matches) this.setShown(!document.body.classList.contains("list-shown"));
    else document.body.classList.toggle("list-hidden");
    this.makeReachable();
  }

  hide() {
    if (PHONE.matches || document.body.classList.contains("list-shown")) this.setShown(false);
    this.makeReachable();
  }

  setShown(isShown) {
    document.body.classList.toggle("list-shown", isShown);
    byId("scrim").hidden = !isShown;
    this.makeReachable();
    if (isShown) byId("new-chat").focus();
  }

  /** What cannot be seen cannot be reached by the Tab key either. */
  makeReachable() {
    const classes = document.body.classList;
    const isShown = PHONE.matches ? classes.contains("list-shown") : !classes.contains("list-hidden");
    byId("sidebar").inert = !isShown;
    byId("open-sidebar").setAttribute("aria-expanded", String(isShown));
  }

  show(current) {
    this.list.replaceChildren(...readChats().map((chat) => this.row(chat, chat.id === current)));
  }

  row(chat, isCurrent) {
    const title = chat.title || "Untitled";
    const link = element("button", { type: "button", class: "chat", title, dir: "auto", textContent: title });
    if (isCurrent) link.setAttribute("aria-current", "true");
    link.addEventListener("click", () => {
      this.hide();
      this.open(chat.id);
    });
    const bin = element("button", { type: "button", class: "icon bin", "aria-label": `Delete “${title}”`, title: "Delete", textContent: "✕" });
    bin.addEventListener("click", () => {
      if (!window.confirm(`Delete “${title}”?`)) return;
      deleteChat(chat.id);
      this.deleted(chat.id);
    });
    return element("li", {}, link, bin);
  }
}
