// What did I lose? The share kept of every value of the metadata and of the captions with every word.
import { asText, get } from "./api";
import { choice, counted, fixed, h, labelled, number, percent, problem, replace, svg } from "./dom";
import { chosen, state, subject, update, type Filter } from "./state";

export interface Share { value: string | null; rows: number; kept: number; low: number; high: number; shift: number; at_least: number | null; at_most: number | null }
export interface ColumnShares { name: string; kind: string; rows: number; kept: number; others: number | null; values: Share[] }
interface Lost { columns: ColumnShares[]; left_out: Record<string, string> }

const W = 240;
const LEAST = 0.0005; // a sure difference below 0.05 points is not worth a line, as in reports

// -1 if surely less was kept than of all rows, 1 if surely more, 0 if it may be chance.
const side = (share: Share): number => (Math.abs(share.shift) < LEAST ? 0 : Math.sign(share.shift));

// A share as a dot on its interval, with the share of all rows as a line.
export function interval(share: Share, overall: number): HTMLElement {
  const at = (value: number): number => 4 + value * (W - 8);
  return h("span", { class: `interval ${["less", "", "more"][side(share) + 1]}`, role: "img", "aria-label": `${percent(share.kept, share.rows)} kept, 95% interval ${fixed(100 * share.low, 1)}% to ${fixed(100 * share.high, 1)}%` },
    svg("svg", { viewBox: `0 0 ${W} 18`, "aria-hidden": "true", preserveAspectRatio: "none" },
      svg("line", { class: "track", x1: 4, x2: W - 4, y1: 9, y2: 9 }),
      svg("line", { class: "overall", x1: at(overall), x2: at(overall), y1: 1, y2: 17 }),
      svg("line", { class: "reach", x1: at(share.low), x2: at(share.high), y1: 9, y2: 9 }),
      svg("circle", { cx: at(share.kept / share.rows), cy: 9, r: 4 })));
}

export function filterOf(column: ColumnShares, share: Share): Filter | null {
  if (column.kind === "words") return share.value ? { search: share.value } : null;
  if (column.kind === "number" && share.at_least !== null && share.at_most !== null) return { column: column.name, least: share.at_least, most: share.at_most };
  if (column.kind === "text" && share.value !== null) return { column: column.name, value: share.value };
  return null;
}

export class LostPage {
  readonly element = h("section", { class: "page sheet", "aria-label": "What did I lose?" });
  private readonly body = h("div", { class: "stack" });
  private readonly cache = new Map<string, Lost>();
  private by = "";
  private order = "sure";
  private version = 0;

  async show(changed: Set<string>): Promise<void> {
    if (!chosen()) { replace(this.element, h("p", { class: "empty" }, "This needs a selection: thresher view SELECTION")); return; }
    if (!this.element.contains(this.body)) replace(this.element, this.body);
    if (!(changed.has("page") || changed.has("selection") || changed.has("cut"))) return;
    const key = JSON.stringify([state.selection, state.cut]), version = ++this.version;
    try {
      let got = this.cache.get(key);
      if (!got) {
        if (!this.body.childElementCount) replace(this.body, h("div", { class: "card" }, h("p", { class: "waiting-line", role: "status" }, "Counting values and words …")));
        got = await get<Lost>("lost", { selection: state.selection, cut: asText(state.cut) });
        if (this.cache.size > 8) this.cache.clear();
        this.cache.set(key, got);
      }
      if (version === this.version) this.draw(got);
    } catch (error) { if (version === this.version) replace(this.body, problem(error)); }
  }

  private draw(got: Lost): void {
    if (!got.columns.length) { replace(this.body, h("p", { class: "empty" }, "Nothing to compare: the pool has no metadata and no captions, or no value or word is in 5 rows or more."), this.leftOut(got)); return; }
    const column = got.columns.find((one) => one.name === this.by) ?? got.columns[0];
    const overall = column.kept / Math.max(column.rows, 1);
    const name = (one: ColumnShares): string => (one.kind === "words" ? "words in captions" : one.name);
    const sorted = [...column.values];
    if (this.order === "rows") sorted.sort((a, b) => b.rows - a.rows);
    const sure = got.columns.flatMap((one) => one.values.filter(side).map((share) => ({ one, share }))).sort((a, b) => a.share.shift - b.share.shift);
    const list = (title: string, pairs: typeof sure, empty: string): HTMLElement => h("div", { class: "card" }, h("h2", null, title),
      pairs.length ? h("ol", { class: "plain-list" }, pairs.map(({ one, share }) => h("li", null, this.valueOf(one, share), h("small", { class: "muted" }, name(one)), h("b", { class: share.shift < 0 ? "less" : "more" }, percent(share.kept, share.rows, 0)), h("small", { class: "muted" }, ` of ${number(share.rows)}`)))) : h("p", { class: "muted" }, empty));
    const lost = sure.filter(({ share }) => share.shift < 0).slice(0, 8), kept = sure.filter(({ share }) => share.shift > 0).slice(-8).reverse();
    replace(this.body,
      h("p", { class: "lead" }, `Of all rows, ${percent(column.kept, column.rows)} are kept. Below is what was kept less or more often than that, beyond what chance explains.`),
      h("div", { class: "columns" }, list("Kept least", lost, "Nothing is surely kept less than the rest."), list("Kept most", kept, "Nothing is surely kept more than the rest.")),
      h("div", { class: "card" },
        h("div", { class: "card-head" }, h("h2", null, "All values"), h("span", { class: "spring" }),
          labelled("By", choice(got.columns.map((one): [string, string] => [one.name, name(one)]), column.name, (value) => { this.by = value; this.draw(got); })),
          labelled("Order", choice([["sure", "surely lost first"], ["rows", "most rows first"]], this.order, (value) => { this.order = value; this.draw(got); }))),
        h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table of values, scrolls sideways" },
          h("table", { class: "wide" },
            h("caption", null, `${name(column)}; the line marks ${percent(column.kept, column.rows)}, the share of ${column.kind === "words" ? "the captions read" : "all rows"}`),
            h("thead", null, h("tr", null, ["value", "rows", "kept", "share kept, with 95% interval", "differs from all rows"].map((text, i) => h("th", { scope: "col", class: i === 1 || i === 2 ? "num" : "" }, text)))),
            h("tbody", null, sorted.map((share) => h("tr", null,
              h("th", { scope: "row" }, this.valueOf(column, share)),
              h("td", { class: "num" }, number(share.rows)), h("td", { class: "num" }, number(share.kept)),
              h("td", { class: "interval-cell" }, interval(share, overall), h("span", { class: "num" }, percent(share.kept, share.rows))),
              h("td", null, side(share) < 0 ? h("span", { class: "badge dropped" }, "surely less") : side(share) > 0 ? h("span", { class: "badge kept" }, "surely more") : h("span", { class: "muted" }, "may be chance"))))))),
        column.others !== 0 && h("p", { class: "muted" }, column.others === null ? "Rarer values are not listed." : `${counted(column.others, "more value")} not listed: rarer, or with smaller differences.`)),
      this.leftOut(got));
  }

  private leftOut(got: Lost): HTMLElement | null {
    const columns = Object.entries(got.left_out).map(([one, why]) => `${one} (${why})`);
    return columns.length ? h("p", { class: "muted" }, "Not counted: ", columns.join("; "), ".") : null;
  }

  private valueOf(column: ColumnShares, share: Share): HTMLElement {
    const text = share.value === null ? "(none)" : share.value === "" ? "(empty)" : share.value;
    const filter = filterOf(column, share);
    const can = filter && (filter.search || subject.columns.some((one) => one.name === column.name));
    return can ? h("button", { type: "button", class: "link", onclick: () => update({ page: "rows", filter }) }, h("bdi", null, text)) : h("bdi", null, text);
  }
}
