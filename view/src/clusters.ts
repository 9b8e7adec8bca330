// Clusters: named by the words that set them apart, with their sizes, shares and quotas.
import { asText, get, type Row } from "./api";
import { meter } from "./charts";
import { Sliders } from "./cut";
import { choice, counted, decimal, h, labelled, number, once, percent, problem, replace } from "./dom";
import { image } from "./gallery";
import { chosen, state, update } from "./state";

interface Clusters {
  step: number; steps: { step: number; name: string }[]; size: number[]; kept: number[]; before: number[] | null;
  more: Record<string, (number | null)[]>; names: string[]; examples: number[][]; words: string[];
}
const TITLES: Record<string, [string, string]> = {
  quota: ["quota", "rows that the step may keep of the cluster"],
  complexity: ["complexity", "d_inter × d_intra: higher keeps more"],
  d_intra: ["spread", "mean cosine distance of its rows to the centroid (d_intra)"],
  d_inter: ["distance", "mean distance to the nearest other centroids (d_inter)"],
};
const SHOWN = 60;

export class ClustersPage {
  readonly element = h("section", { class: "page sheet", "aria-label": "Clusters" });
  private readonly table = h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table of clusters, scrolls sideways" });
  private readonly head = h("div", { class: "card-head" });
  private readonly sliders = new Sliders(() => this.soon(), ["temperature", "keep"]);
  private readonly soon = once(60, () => void this.load());
  private data: Clusters | null = null;
  private sort = "size";
  private up = false;
  private find = "";
  private count = SHOWN;
  private clustered: number | null = null;
  private version = 0;
  private built = -1;
  private readonly pictures = new Map<number, Row>();

  async show(changed: Set<string>): Promise<void> {
    if (!chosen()?.clusters) { replace(this.element, h("p", { class: "empty" }, chosen() ? "No step of this selection has clusters." : "Clusters need a selection: thresher view SELECTION")); return; }
    if (this.built !== state.selection) {
      this.built = state.selection;
      this.clustered = null;
      this.pictures.clear();
      this.sliders.build();
      const can = chosen().sliders.some((one) => one.name === "temperature");
      replace(this.element, h("div", { class: "card" }, this.head,
        can && h("details", { class: "what-if" }, h("summary", null, "At another temperature or budget"), this.sliders.element),
        this.table));
    }
    if (changed.has("page") || changed.has("selection") || changed.has("cut")) await this.load();
  }

  private async load(): Promise<void> {
    const version = ++this.version;
    try {
      const got = await get<Clusters>("clusters", { selection: state.selection, cut: asText(state.cut), clustered: this.clustered });
      if (version !== this.version) return;
      this.data = got;
      this.draw();
    } catch (error) { if (version === this.version) replace(this.table, problem(error)); }
  }

  private title(j: number): string { return this.data!.names[j] || this.data!.words[j] || `cluster ${j}`; }

  private value(key: string, j: number): number | string {
    const d = this.data!;
    if (key === "name") return this.title(j);
    if (key === "size") return d.size[j];
    if (key === "kept") return d.kept[j];
    if (key === "share") return d.size[j] ? d.kept[j] / d.size[j] : -1;
    if (key === "change") return d.before ? d.kept[j] - d.before[j] : 0;
    return d.more[key][j] ?? -Infinity;
  }

  private draw(): void {
    const d = this.data!;
    const filled = d.size.map((_, j) => j).filter((j) => d.size[j] > 0 && (!this.find || this.title(j).toLowerCase().includes(this.find) || String(j) === this.find));
    filled.sort((a, b) => { const x = this.value(this.sort, a), y = this.value(this.sort, b); const order = typeof x === "string" ? x.localeCompare(String(y)) : x - Number(y); return (this.up ? order : -order) || a - b; });
    if (!this.head.childElementCount) {
      const search = h("input", { type: "search", placeholder: "a word or a number", oninput: once(150, () => { this.find = search.value.trim().toLowerCase(); this.count = SHOWN; this.draw(); }) });
      replace(this.head, h("h2", null, "Clusters"), h("span", { class: "spring" }),
        d.steps.length > 1 && labelled("Of step", choice(d.steps.map((one): [string, string] => [String(one.step), one.name]), String(d.step), (value) => { this.clustered = Number(value); this.pictures.clear(); void this.load(); })),
        labelled("Find", search));
    }
    const columns: [string, string, string][] = [["name", "cluster", "the words that set it apart"], ["size", "rows", "rows that the step was given"], ["kept", "kept", "rows that the selection keeps"], ["share", "share kept", ""]];
    if (d.before) columns.push(["change", "change", "rows kept compared with the selection as it was"]);
    for (const key of Object.keys(d.more)) columns.push([key, ...(TITLES[key] ?? [key.replaceAll("_", " "), ""])] as [string, string, string]);
    const header = columns.map(([key, title, help]) => h("th", { scope: "col", class: key === "name" ? "" : "num", "aria-sort": this.sort === key ? (this.up ? "ascending" : "descending") : "none", title: help },
      h("button", { type: "button", class: "sort", onclick: () => { this.up = this.sort === key ? !this.up : key === "name"; this.sort = key; this.draw(); (this.table.querySelector(`[data-sort="${key}"]`) as HTMLElement | null)?.focus(); }, "data-sort": key }, title, h("span", { "aria-hidden": "true" }, this.sort === key ? (this.up ? " ▲" : " ▼") : ""))));
    const total = d.size.reduce((a, b) => a + b, 0), kept = d.kept.reduce((a, b) => a + b, 0);
    const body = filled.slice(0, this.count).map((j) => {
      const change = d.before ? d.kept[j] - d.before[j] : 0;
      return h("tr", null,
        h("th", { scope: "row" }, h("div", { class: "cluster-name" },
          h("div", { class: "thumbs", "data-rows": d.examples[j].join(",") }, d.examples[j].map((row) => image(0, { row, caption: this.pictures.get(row)?.caption ?? `an example of ${this.title(j)}` }))),
          h("button", { type: "button", class: "link", onclick: () => update({ page: "rows", filter: { cluster: j, ...(d.steps.length > 1 ? { clustered: d.step } : {}) } }) }, h("bdi", null, this.title(j))),
          h("small", null, `cluster ${j}`))),
        h("td", { class: "num" }, number(d.size[j])),
        h("td", { class: "num" }, number(d.kept[j])),
        h("td", { class: "num share" }, meter(d.kept[j], d.size[j], ""), h("span", null, percent(d.kept[j], d.size[j]))),
        d.before && h("td", { class: `num ${change > 0 ? "more" : change < 0 ? "less" : "muted"}` }, change > 0 ? `+${number(change)}` : change < 0 ? `−${number(-change)}` : "0"),
        Object.keys(d.more).map((key) => h("td", { class: "num" }, decimal(d.more[key][j], 3))));
    });
    replace(this.table, h("table", { class: "wide" },
      h("caption", null, `${counted(filled.length, "cluster")}; ${number(kept)} of ${counted(total, "row")} kept, ${percent(kept, total)}`),
      h("thead", null, h("tr", null, header)), h("tbody", null, body)),
    filled.length > this.count && h("button", { type: "button", class: "more-rows", onclick: () => { this.count += 2 * SHOWN; this.draw(); } }, `Show more (${number(filled.length - this.count)} left)`));
  }
}
