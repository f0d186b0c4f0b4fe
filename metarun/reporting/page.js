"use strict";
(() => {
  const root = document.documentElement;

  // Theme: the reader's choice, else the system's preference. Printing uses the light theme.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let theme = null;
  try { theme = localStorage.getItem("metarun-theme"); } catch { /* no storage for this file */ }
  const apply = (name) => root.setAttribute("data-theme", name);
  const wanted = () => theme || (dark.matches ? "dark" : "light");
  apply(wanted());
  dark.addEventListener("change", () => apply(wanted()));
  addEventListener("beforeprint", () => apply("light"));
  addEventListener("afterprint", () => apply(wanted()));
  document.getElementById("theme").addEventListener("click", () => {
    theme = wanted() === "dark" ? "light" : "dark";
    apply(theme);
    try { localStorage.setItem("metarun-theme", theme); } catch { /* forgotten when closed */ }
  });

  // The id of every artist of a series begins with the id of the series.
  const parts = (prefix, within = document) =>
    [...within.querySelectorAll(`[id^="${CSS.escape(prefix)}"]`)].filter((part) => {
      const rest = part.id.slice(prefix.length);
      return rest === "" || rest.startsWith("-");
    });
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const part of parts(button.dataset.hides)) part.classList.toggle("hidden", !shown);
    });
  }

  // Hovering over a table row highlights its line in every figure.
  for (const row of document.querySelectorAll("tr[data-series]")) {
    const light = (on) => {
      for (const drawing of document.querySelectorAll(".drawing")) {
        const all = [...drawing.querySelectorAll('[id*="--entry"]')];
        const own = all.filter((part) => {
          const rest = part.id.split("--")[1];
          return rest === row.dataset.series || rest.startsWith(`${row.dataset.series}-`);
        });
        // Figures without this series do not change.
        for (const part of own.length ? all : []) {
          part.classList.toggle("faded", on && !own.includes(part));
          part.classList.toggle("lit", on && own.includes(part));
        }
      }
    };
    row.addEventListener("mouseenter", () => light(true));
    row.addEventListener("mouseleave", () => light(false));
    row.addEventListener("focus", () => light(true));
    row.addEventListener("blur", () => light(false));
  }

  const sort = (table, heads, column) => {
    const head = heads[column];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const key = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    };
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (typeof x === "number" && typeof y === "number") return x - y;
      return String(x).localeCompare(String(y), undefined, { numeric: true });
    };
    body.append(...[...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a))));
  };
  for (const table of document.querySelectorAll(".sortable table")) {
    const heads = [...table.querySelectorAll("th")];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, heads, column));
    });
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const pre = button.parentElement.querySelector("pre");
      let done = true;
      try {
        await navigator.clipboard.writeText(pre.textContent);
      } catch {
        // A page opened from disk may not use the clipboard: select the text and try execCommand.
        const range = document.createRange();
        range.selectNodeContents(pre);
        const selection = getSelection();
        selection.removeAllRanges();
        selection.addRange(range);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "copied" : "selected";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }

  // Saved figures use the light theme's colors, whatever the theme of the page.
  const light = JSON.parse(document.getElementById("light").textContent);
  const svgOf = (figure) => {
    const svg = figure.querySelector("svg").cloneNode(true);
    const whole = svg.getAttribute("data-whole");
    const [, , width, height] = whole.split(" ").map(Number);
    svg.setAttribute("viewBox", whole);
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    for (const part of svg.querySelectorAll(".hidden")) part.remove();
    const text = new XMLSerializer().serializeToString(svg);
    return [text.replace(/var\((--[\w-]+)\)/g, (all, name) => light[name] || all), width, height];
  };
  const save = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", () => {
      const figure = button.closest("figure");
      const name = figure.id.replace("figure-", "");
      if (button.dataset.save === "csv") {
        save(new Blob([figure.querySelector(".numbers pre").textContent], { type: "text/csv" }), `${name}.csv`);
        return;
      }
      const [text, width, height] = svgOf(figure);
      const blob = new Blob([text], { type: "image/svg+xml" });
      if (button.dataset.save === "svg") {
        save(blob, `${name}.svg`);
        return;
      }
      const image = new Image();
      image.onload = () => {
        const canvas = document.createElement("canvas");
        canvas.width = 2 * width;
        canvas.height = 2 * height;
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        canvas.toBlob((made) => save(made, `${name}.png`));
      };
      image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
    });
  }
})();
