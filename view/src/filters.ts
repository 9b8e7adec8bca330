// The bar that says which rows are shown; the gallery and the map share it.
import { choice, h, labelled, number, once, replace, segments } from "./dom";
import { chosen, state, subject, update, type Filter } from "./state";

function set(change: Partial<Filter>): void {
  const filter: Record<string, unknown> = { ...state.filter, ...change };
  for (const [name, value] of Object.entries(filter)) if (value === undefined || value === "" || value === null) delete filter[name];
  update({ filter: filter as Filter });
}
export const narrow = set;

export class Filters {
  readonly element = h("div", { class: "filters" });
  private readonly chips = h("div", { class: "chips" });
  private readonly count = h("output", { class: "count", role: "status" });
  private readonly controls = h("div", { class: "controls", role: "search", "aria-label": "Which rows" });
  private readonly typed = once(250, (text: string) => set({ search: text }));
  private readonly search: HTMLInputElement = h("input", { type: "search", placeholder: "Search captions and keys", maxlength: "400", autocomplete: "off", spellcheck: "false", dir: "auto", oninput: () => this.typed(this.search.value) });
  private readonly others = h("div", { class: "others" });

  constructor(private readonly ordered = true) {
    this.controls.append(labelled("Search", this.search, { class: "field search" }), this.others);
    this.element.append(this.controls, h("div", { class: "chip-line" }, this.count, this.chips));
    this.build();
  }

  focus(): void { this.search.focus(); this.search.select(); }

  total(count: number): void {
    const all = subject.sources[0]?.rows ?? 0;
    this.count.textContent = count === all ? `${number(all)} rows` : `${number(count)} of ${number(all)} rows`;
  }

  build(): void {
    const filter = state.filter, selection = chosen();
    if (document.activeElement !== this.search) this.search.value = filter.search ?? "";
    const parts: HTMLElement[] = [];
    if (selection) {
      const value = filter.kept === undefined ? "all" : filter.kept ? "kept" : "dropped";
      parts.push(h("div", { class: "field segmented" }, segments("Kept or dropped", [["all", "All"], ["kept", "Kept"], ["dropped", "Dropped"]], value,
        (key) => set({ kept: key === "all" ? undefined : key === "kept", step: undefined }))));
      if (selection.steps.length > 1) parts.push(labelled("Dropped by", choice(
        [["", "any step"], ...selection.steps.map((step, i): [string, string] => [String(i), `${i + 1}. ${step.method}`])],
        filter.step === undefined ? "" : String(filter.step), (key) => set({ step: key === "" ? undefined : Number(key), kept: key === "" ? filter.kept : undefined }))));
    }
    if (this.ordered) {
      const orders: [string, string][] = [["row", "as in the pool"], ["mixed", "mixed"]];
      if (selection?.steps.some((step) => step.scored)) orders.push(["high", "highest score first"], ["low", "lowest score first"]);
      if (selection?.clusters) orders.push(["cluster", "by cluster"]);
      parts.push(labelled("Order", choice(orders, filter.order ?? "row", (key) => set({ order: key === "row" ? undefined : key }))));
      const scored = selection?.steps.map((step, i): [string, string] | null => step.scored ? [String(i), `${i + 1}. ${step.score}`] : null).filter((one) => one !== null) ?? [];
      if (scored.length > 1) parts.push(labelled("Score", choice([["", scored[scored.length - 1][1]], ...scored.slice(0, -1)], filter.scored === undefined ? "" : String(filter.scored), (key) => set({ scored: key === "" ? undefined : Number(key), low: undefined, high: undefined }))));
    }
    replace(this.others, parts); // not the search: who types keeps the focus
    this.chipsOf();
  }

  private chipsOf(): void {
    const f = state.filter;
    const chips: [string, Partial<Filter>][] = [];
    if (f.cluster !== undefined) chips.push([`cluster ${f.cluster}${f.clustered !== undefined ? ` of step ${f.clustered + 1}` : ""}`, { cluster: undefined, clustered: undefined }]);
    if (f.low !== undefined || f.high !== undefined) chips.push([`score ${f.low === undefined ? "" : `from ${f.low.toPrecision(4)} `}${f.high === undefined ? "" : `to ${f.high.toPrecision(4)}`}`, { low: undefined, high: undefined }]);
    if (f.column) chips.push([`${f.column}${f.value !== undefined ? ` = ${f.value}` : ""}${f.least !== undefined ? ` from ${f.least.toPrecision(4)}` : ""}${f.most !== undefined ? ` to ${f.most.toPrecision(4)}` : ""}`, { column: undefined, value: undefined, least: undefined, most: undefined }]);
    if (f.polygon) chips.push(["inside the lasso", { polygon: undefined }]);
    if (f.alone !== undefined) chips.push([`kept only by ${subject.selections[f.alone]?.name ?? f.alone}`, { alone: undefined }]);
    if (f.moved) chips.push([f.moved === "in" ? "newly kept by this cut" : "newly dropped by this cut", { moved: undefined }]);
    const any = chips.length > 0 || f.search || f.kept !== undefined || f.step !== undefined;
    replace(this.chips,
      chips.map(([text, off]) => h("button", { class: "chip", type: "button", onclick: () => set(off), "aria-label": `Remove: ${text}` }, h("bdi", null, text), h("span", { "aria-hidden": "true" }, "×"))),
      any && h("button", { class: "link", type: "button", onclick: () => update({ filter: {} }) }, "Clear"));
  }
}
