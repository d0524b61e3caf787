// Added by `corefit watch`: asks whether the page has changed, and loads it anew with what was chosen; the browser keeps the place.
"use strict";
(() => {
  const KEY = `corefit ${location.host}`;
  const fields = () => [...document.querySelectorAll("select[id], input[id]")];
  const kept = JSON.parse(sessionStorage.getItem(KEY) || "null");
  sessionStorage.removeItem(KEY);
  if (kept) {
    for (const field of fields()) {
      const value = kept.values[field.id];
      if (value === undefined || (field.tagName === "SELECT" && ![...field.options].some((o) => o.value === value))) continue;
      if (field.type === "checkbox") field.checked = value;
      else field.value = value;
      field.dispatchEvent(new Event(field.type === "range" ? "input" : "change"));
    }
    for (const details of document.querySelectorAll("details[id]")) details.open = kept.open.includes(details.id);
  }
  const keep = () => sessionStorage.setItem(KEY, JSON.stringify({
    values: Object.fromEntries(fields().filter((field) => field.id !== "scrub" || field.value !== field.max).map((field) => [field.id, field.type === "checkbox" ? field.checked : field.value])),
    open: [...document.querySelectorAll("details[id][open]")].map((details) => details.id),
  }));
  let tag = document.querySelector("meta[name=version]").content;
  const ask = async () => {
    if (document.hidden || document.querySelector("dialog[open]")) return;
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      const now = answer.ok ? await answer.text() : tag;
      if (now !== tag) {
        tag = now;
        keep();
        location.reload();
      }
    } catch {
      // the server has ended: the page stays as it is
    }
  };
  setInterval(ask, 2000);
})();
