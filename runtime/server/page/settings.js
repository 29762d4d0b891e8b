// The settings' dialog.

import { byId } from "./dom.js";
import { deleteChat, readChats, readSettings, writeSettings } from "./store.js";

export class Settings {
  /** changed(): after new settings; deleted(): after all conversations are gone. */
  constructor({ changed, deleted }) {
    this.values = readSettings();
    this.dialog = byId("settings");
    this.form = this.dialog.querySelector("form");
    byId("open-settings").addEventListener("click", () => this.open());
    byId("cancel-settings").addEventListener("click", () => this.dialog.close());
    this.form.addEventListener("submit", () => {
      for (const name of Object.keys(this.values)) this.values[name] = this.form.elements[name].value;
      writeSettings(this.values);
      this.applyTheme();
      changed();
    });
    byId("delete-all").addEventListener("click", () => {
      if (!window.confirm("Delete all conversations of this browser?")) return;
      for (const chat of readChats()) deleteChat(chat.id);
      this.dialog.close();
      deleted();
    });
    this.applyTheme();
  }

  /** field: the one to begin with. */
  open(field = "system") {
    for (const [name, value] of Object.entries(this.values)) this.form.elements[name].value = value;
    if (!this.dialog.open) this.dialog.showModal();
    this.form.elements[field].focus();
  }

  /** What the model would do without settings. */
  describe({ temperature, canThink }) {
    this.form.elements.temperature.placeholder = Number.isFinite(temperature) ? `${Number(temperature.toFixed(3))} (the model's)` : "";
    this.form.elements.thinking.disabled = !canThink;
    this.form.elements.thinking.title = canThink ? "" : "This model's template has no such switch.";
  }

  applyTheme() {
    const { theme } = this.values;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  }
}
