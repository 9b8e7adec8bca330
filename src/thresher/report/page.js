"use strict";
// Sliders that move the cut of a step: every number is computed from the counts in the page.
const rows = new Intl.NumberFormat("en-US");
for (const box of document.querySelectorAll(".slider")) {
  const data = JSON.parse(box.dataset.cut);
  const input = box.querySelector("input");
  const [kept, share, change, typed] = ["kept", "share", "change", "typed"].map((name) => box.querySelector("." + name));
  const area = box.querySelector(".live .on");
  const count = (at) => {
    if (at === data.now) return data.kept;
    const side = data.above ? data.rows.slice(at) : data.rows.slice(0, at);
    return side.reduce((a, b) => a + b, data.outside);
  };
  const value = (number) => String(Number(number.toPrecision(4)));
  const show = () => {
    const at = Number(input.value), now = count(at), more = now - data.kept, part = (100 * at) / (data.edges.length - 1);
    const cut = value(data.edges[at]);
    kept.textContent = rows.format(now);
    share.textContent = ((100 * now) / data.total).toFixed(1) + "%";
    change.textContent = more ? rows.format(Math.abs(more)) + (more > 0 ? " rows more" : " rows fewer") : "as selected";
    typed.textContent =
      data.parameter === "eps" ? "eps = " + value(1 - data.edges[at])
      : data.parameter === "keep" ? "keep = " + now
      : data.parameter === "threshold" ? "threshold = " + cut
      : "cut at " + cut;
    area.style.clipPath = data.above ? "inset(0 0 0 " + part + "%)" : "inset(0 " + (100 - part) + "% 0 0)";
    input.setAttribute("aria-valuetext", "cut at " + cut + ": " + kept.textContent + " rows kept, " + share.textContent);
  };
  input.addEventListener("input", show);
  box.querySelector("button").addEventListener("click", () => { input.value = data.now; show(); });
  box.hidden = false;
  input.value = data.now;
  show();
}
