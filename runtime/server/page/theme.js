// Before the first paint, so that nothing flashes: which colours the reader has chosen.
"use strict";
try {
  const chosen = JSON.parse(localStorage.getItem("krasis.settings") ?? "{}").theme;
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // No storage, or nothing readable in it: the system's colours.
}
