// Two to five selections: what they share, what only one keeps, and how the kept data differ.
import { get, type Page } from "./api";
import { seriesColour } from "./colours";
import { meter } from "./charts";
import { counted, decimal, fixed, h, number, percent, problem, replace } from "./dom";
import { strip } from "./gallery";
import { type ColumnShares } from "./lost";
import { state, subject, update } from "./state";

interface Comparison {
  rows: number; kept: Record<string, number>; only: number[]; all: number; none: number;
  pairs: { a: string; b: string; both: number; only_a: number; only_b: number; overlap: number; jaccard: number }[];
  clusters: { cluster: number; size: number; kept: Record<string, number> }[]; words: string[];
}
interface Deviation { error: number | null; random: number | null; ratio: number | null }
type Errors = Record<string, { kept: number; classes_lost?: number; overall: Deviation; within: Deviation | null; overall_uncentred: Deviation; within_uncentred: Deviation | null }>;

const nameOf = (i: number | string): string => subject.selections[Number(i)].name;
const swatch = (i: number): HTMLElement => h("i", { class: "swatch", style: { background: seriesColour(i) } });

export class ComparePage {
  readonly element = h("section", { class: "page sheet", "aria-label": "Compare" });
  private done = false;

  async show(): Promise<void> {
    if (subject.selections.length < 2) { replace(this.element, h("div", { class: "empty" }, h("p", null, "Comparing needs two to five selections of one pool:"), h("pre", null, "thresher view SELECTION SELECTION"))); return; }
    if (this.done) return;
    this.done = true;
    replace(this.element, h("p", { class: "waiting-line", role: "status" }, "Comparing …"));
    try {
      const got = await get<Comparison>("compare");
      const columns = h("div"), galleries = h("div", { class: "side-by-side" });
      replace(this.element, this.overlaps(got), h("h2", null, "Kept by only one"), galleries, this.clusters(got), columns, this.covariance());
      await Promise.all([this.galleries(galleries, got), this.columns(columns)]);
    } catch (error) { this.done = false; replace(this.element, problem(error)); }
  }

  private overlaps(got: Comparison): HTMLElement {
    const count = subject.selections.length, every = [...Array(count).keys()];
    const pair = (i: number, j: number) => got.pairs.find((one) => (one.a === String(i) && one.b === String(j)) || (one.a === String(j) && one.b === String(i)))!;
    return h("div", { class: "columns" },
      h("div", { class: "card" }, h("h2", null, "Sizes"),
        h("table", { class: "funnel" }, h("caption", { class: "hidden" }, "Rows kept"),
          h("thead", null, h("tr", null, ["selection", "", "kept", "of all", "only here"].map((text, i) => h("th", { scope: "col", class: i > 1 ? "num" : "" }, text || h("span", { class: "hidden" }, "share"))))),
          h("tbody", null, every.map((i) => h("tr", null, h("th", { scope: "row" }, swatch(i), h("bdi", null, nameOf(i))), h("td", { class: "bar-cell" }, meter(got.kept[i], got.rows, "")), h("td", { class: "num" }, number(got.kept[i])), h("td", { class: "num muted" }, percent(got.kept[i], got.rows)), h("td", { class: "num" }, number(got.only[i])))))),
        h("p", { class: "muted" }, `${counted(got.all, "row")} kept by all, ${number(got.none)} by none of them.`)),
      h("div", { class: "card" }, h("h2", null, "Overlap"),
        h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Matrix of overlaps" },
          h("table", { class: "matrix" }, h("caption", null, "Of the rows that the selection at the left keeps, the share that the one at the top keeps too"),
            h("thead", null, h("tr", null, h("td"), every.map((j) => h("th", { scope: "col" }, h("bdi", null, nameOf(j)))))),
            h("tbody", null, every.map((i) => h("tr", null, h("th", { scope: "row" }, h("bdi", null, nameOf(i))), every.map((j) => {
              if (i === j) return h("td", { class: "self" }, "–");
              const share = got.kept[i] ? pair(i, j).both / got.kept[i] : 0, chance = got.kept[j] / got.rows;
              return h("td", { style: { "--share": share.toFixed(3) }, title: `${number(pair(i, j).both)} rows in both; Jaccard ${fixed(pair(i, j).jaccard, 3)}; two independent selections would share ${fixed(100 * chance, 1)}%` }, h("b", null, percent(share, 1, 0)), h("small", null, `by chance ${percent(chance, 1, 0)}`));
            })))))),
        h("p", { class: "muted" }, "By chance: what two independent selections of these sizes would share.")));
  }

  private async galleries(box: HTMLElement, got: Comparison): Promise<void> {
    const parts = await Promise.all(subject.selections.map(async (one, i) => {
      const page = await get<Page>("rows", { set: JSON.stringify({ alone: i, order: "mixed" }), count: 12 });
      return h("section", { class: "card" }, h("div", { class: "card-head" }, h("h3", null, swatch(i), h("bdi", null, one.name), h("small", null, counted(got.only[i], "row"))),
        page.total > 0 && h("button", { type: "button", class: "link", onclick: () => update({ page: "rows", selection: i, cut: null, filter: { alone: i, order: "mixed" } }) }, "Show all")),
        page.total ? strip(page.rows, 0) : h("p", { class: "muted" }, "Every row that it keeps is kept by another one too."));
    }));
    replace(box, parts);
  }

  private shares(title: string, lines: { name: HTMLElement; size: number; kept: number[] }[], note: string): HTMLElement {
    return h("div", { class: "card" }, h("h2", null, title), h("p", { class: "muted" }, note),
      h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": `${title}, scrolls sideways` },
        h("table", { class: "wide" }, h("thead", null, h("tr", null, h("th", { scope: "col" }, "name"), h("th", { scope: "col", class: "num" }, "rows"), subject.selections.map((one, i) => h("th", { scope: "col", class: "num" }, swatch(i), h("bdi", null, one.name))))),
          h("tbody", null, lines.map((line) => h("tr", null, h("th", { scope: "row" }, line.name), h("td", { class: "num" }, number(line.size)), line.kept.map((kept) => h("td", { class: "num share" }, meter(kept, line.size, ""), h("span", null, percent(kept, line.size, 0))))))))));
  }

  private clusters(got: Comparison): HTMLElement | null {
    if (!got.clusters.length) return null;
    const lines = got.clusters.slice(0, 12).map((one) => ({ name: h("button", { type: "button", class: "link", onclick: () => update({ page: "rows", filter: { cluster: one.cluster } }) }, h("bdi", null, got.words[one.cluster] || `cluster ${one.cluster}`)), size: one.size, kept: subject.selections.map((_, i) => one.kept[String(i)]) }));
    return this.shares("Clusters that differ most", lines, "Share kept of the clusters with the largest differences.");
  }

  private async columns(box: HTMLElement): Promise<void> {
    try {
      const all = await Promise.all(subject.selections.map((_, i) => get<{ columns: ColumnShares[] }>("lost", { selection: i })));
      const lines: { name: HTMLElement; size: number; kept: number[]; spread: number }[] = [];
      for (const column of all[0].columns) for (const share of column.values) {
        if (share.rows < 20) continue;
        const kept = all.map((one) => one.columns.find((c) => c.name === column.name)?.values.find((v) => v.value === share.value && v.at_least === share.at_least)?.kept);
        if (kept.some((one) => one === undefined)) continue;
        const parts = (kept as number[]).map((one) => one / share.rows);
        lines.push({ name: h("span", null, h("bdi", null, share.value ?? "(none)"), " ", h("small", { class: "muted" }, column.kind === "words" ? "in captions" : column.name)), size: share.rows, kept: kept as number[], spread: Math.max(...parts) - Math.min(...parts) });
      }
      lines.sort((a, b) => b.spread - a.spread || b.size - a.size);
      if (lines.length) replace(box, this.shares("Metadata and words that differ most", lines.slice(0, 14), "Share kept of values and words with 20 rows or more."));
    } catch (error) { replace(box, problem(error)); }
  }

  private covariance(): HTMLElement {
    const result = h("div");
    const button = h("button", { type: "button", class: "primary", onclick: async () => {
      button.disabled = true;
      replace(result, h("p", { class: "waiting-line", role: "status" }, "Reading all embeddings …"));
      try { replace(result, this.errors(await get<Errors>("covariance"))); button.remove(); } catch (error) { replace(result, problem(error)); button.disabled = false; }
    } }, "Measure");
    return h("div", { class: "card" }, h("h2", null, "Cross-covariance of images and captions"),
      h("p", { class: "muted" }, "How far the selections move the average relation of images and captions in the pool. Reads every embedding once."), button, result);
  }

  private errors(got: Errors): HTMLElement {
    const kinds: [keyof Errors[string], string][] = [["overall", "overall"], ["within", "within clusters"], ["overall_uncentred", "overall, not centred"], ["within_uncentred", "within, not centred"]];
    const shown = kinds.filter(([key]) => Object.values(got)[0][key] !== null);
    const word = (ratio: number | null): string => ratio === null ? "" : ratio < 0.95 ? "closer than random" : ratio <= 1.05 ? "like random" : `${fixed(ratio, 1)}× random`;
    return h("div", null,
      h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Covariance errors, scrolls sideways" },
        h("table", { class: "wide" }, h("caption", null, "Relative error, and next to it that of a random subset of the same size"),
          h("thead", null, h("tr", null, h("th", { scope: "col" }, "selection"), shown.map(([, title]) => h("th", { scope: "col", class: "num" }, title)))),
          h("tbody", null, Object.entries(got).map(([i, one]) => h("tr", null, h("th", { scope: "row" }, swatch(Number(i)), h("bdi", null, nameOf(i))), shown.map(([key]) => { const d = one[key] as Deviation; return h("td", { class: "num" }, `${decimal(d.error, 3)} `, h("small", { class: "muted" }, `random ${decimal(d.random, 3)}`), h("br"), h("b", null, word(d.ratio))); })))))),
      h("details", { open: true }, h("summary", null, "How to read it"),
        h("p", null, "A ratio above 1 does not mean that random data are better to train on. A random subset is, by construction, a small copy of the pool, so it is the closest that a selection of its size usually comes. Every method that improves the data also moves them:"),
        h("ul", null,
          h("li", null, "Well-aligned pairs have a larger cross-covariance, so a selection by CLIP score overshoots that of the pool. Ratios of 3 to 7 are usual for it."),
          h("li", null, "If captions of the pool are wrong, keeping its covariance also keeps these errors."),
          h("li", null, "Compare methods with the same aim at the same size. Of two that preserve the pool, such as herd and clipcov, the lower one is closer to it."),
          h("li", null, "Within clusters, dropping a whole cluster can lower the error; look at what was lost first.")),
        h("p", { class: "muted" }, "Whether a selection is good shows in training only.")));
  }
}
export const here = (): number => state.selection;
