// The cut moves: sliders of the last step, the funnel, the scores, what changes, and saving.
import { asText, get, save, type Cut, type Page, type Slider } from "./api";
import { stacked, meter, wide } from "./charts";
import { choice, counted, decimal, h, labelled, number, percent, problem, replace, say, unique } from "./dom";
import { strip } from "./gallery";
import { chosen, state, subject, update, type Filter } from "./state";
import { cutOf, type CutHead } from "./steps";

interface Bins { edges: number[]; kept: number[]; dropped: number[]; apart: number; beyond: number; cut: number | null; label: string }

export const cutText = (cut: Cut): string => (cut ? `${cut[0]} = ${cut[1]}` : "");

// From a slider's position, 0 to 1000, to a value and back.
function valueAt(slider: Slider, at: number): number {
  const t = at / 1000;
  if (slider.scale === "log") return slider.low * (slider.high / slider.low) ** t;
  return slider.low + t * (slider.high - slider.low);
}
function positionOf(slider: Slider, value: number): number {
  const t = slider.scale === "log" ? Math.log(value / slider.low) / Math.log(slider.high / slider.low) : (value - slider.low) / (slider.high - slider.low || 1);
  return Math.round(1000 * Math.min(1, Math.max(0, t)));
}
function written(slider: Slider, at: number): string {
  const value = valueAt(slider, at);
  if (slider.is_share) return `${Math.max(0.1, Math.round(1000 * value) / 10)}%`;
  return String(Number(value.toPrecision(3)));
}

// Asks for the newest value only: while one answer is on its way, further moves of the slider wait.
class Newest {
  private busy = false;
  private next: Cut | undefined;
  constructor(private readonly work: (cut: Cut) => Promise<void>) {}
  ask(cut: Cut): void {
    if (this.busy) { this.next = cut; return; }
    this.busy = true;
    void this.work(cut).finally(() => { this.busy = false; if (this.next !== undefined) { const cut = this.next; this.next = undefined; this.ask(cut); } });
  }
}

export class Sliders {
  readonly element = h("div", { class: "sliders" });
  private readonly inputs = new Map<string, { range: HTMLInputElement; text: HTMLInputElement; slider: Slider }>();
  private readonly wrong = h("div");
  private readonly newest: Newest;
  private readonly only: string[] | null;
  seconds = 0;

  constructor(private readonly onCut: (head: CutHead) => void, only: string[] | null = null) {
    this.only = only;
    this.newest = new Newest(async (cut) => {
      const from = performance.now();
      try {
        const { head } = await cutOf(state.selection, cut);
        this.seconds = (performance.now() - from) / 1000;
        replace(this.wrong);
        update({ cut }, "replace");
        this.onCut(head);
      } catch (error) { replace(this.wrong, problem(error)); }
    });
  }

  build(): void {
    this.inputs.clear();
    const own = chosen()?.sliders.filter((one) => !this.only || this.only.includes(one.name)) ?? [];
    replace(this.element, own.map((slider) => this.field(slider)), own.length > 0 && h("p", null,
      h("button", { type: "button", class: "link", onclick: () => { update({ cut: null }); } }, "Back to the selection as it is")), this.wrong);
  }

  private field(slider: Slider): HTMLElement {
    const about = unique("about");
    const range = h("input", { type: "range", min: "0", max: "1000", step: "1", value: positionOf(slider, slider.at), "aria-label": slider.name, "aria-describedby": about });
    const text = h("input", { type: "text", class: "number", value: slider.value, placeholder: slider.value ? "" : "not set", maxlength: "40", "aria-label": `${slider.name}, typed`, spellcheck: "false" });
    const spoken = (): void => range.setAttribute("aria-valuetext", text.value);
    range.addEventListener("input", () => { text.value = written(slider, Number(range.value)); spoken(); this.newest.ask([slider.name, text.value]); });
    text.addEventListener("change", () => { const value = text.value.trim(); if (value) this.newest.ask([slider.name, value]); });
    spoken();
    this.inputs.set(slider.name, { range, text, slider });
    return h("div", { class: "slider" },
      h("div", { class: "slider-head" }, h("b", null, slider.name), text),
      range, h("p", { class: "muted", id: about }, slider.help));
  }

  // Values that follow from another one, such as a threshold that a budget comes to.
  follow(sliders: Slider[]): void {
    for (const slider of sliders) {
      const here = this.inputs.get(slider.name);
      if (!here) continue;
      if (document.activeElement !== here.range) here.range.value = String(positionOf(here.slider, slider.at));
      if (document.activeElement !== here.text) here.text.value = slider.value;
      here.text.placeholder = slider.value ? "" : "not set";
    }
  }
}

export function funnel(head: { rows: number; kept: number; steps: CutHead["steps"] }, go?: (filter: Filter) => void): HTMLElement {
  const line = (name: string | HTMLElement, rows: number, dropped: number | null, filter: Filter): HTMLElement => h("tr", null,
    h("th", { scope: "row" }, name),
    h("td", { class: "bar-cell" }, meter(rows, head.rows, `${percent(rows, head.rows)} of all rows`)),
    h("td", { class: "num" }, go ? h("button", { type: "button", class: "link", onclick: () => go(filter) }, number(rows)) : number(rows)),
    h("td", { class: "num muted" }, percent(rows, head.rows)),
    h("td", { class: "num" }, dropped === null ? "" : go ? h("button", { type: "button", class: "link dropped-text", onclick: () => go({ step: filter.step }) }, `−${number(dropped)}`) : `−${number(dropped)}`));
  return h("table", { class: "funnel" },
    h("caption", { class: "hidden" }, "Rows after each step"),
    h("thead", null, h("tr", null, h("th", { scope: "col" }, "step"), h("th", { scope: "col" }, h("span", { class: "hidden" }, "share")), h("th", { scope: "col", class: "num" }, "rows kept"), h("th", { scope: "col", class: "num" }, "of all"), h("th", { scope: "col", class: "num" }, "dropped"))),
    h("tbody", null, line("pool", head.rows, null, {}), head.steps.map((step, i) => line(h("span", null, `${i + 1}. ${step.method}`, h("small", { class: "muted" }, step.short.slice(step.method.length))), step.rows_out, step.rows_in - step.rows_out, i === head.steps.length - 1 ? { kept: true, step: i } : { step: i }))));
}

export class CutPage {
  readonly element = h("section", { class: "page sheet", "aria-label": "Cut" });
  private readonly sliders = new Sliders((head) => { this.draw(head); say(`${number(head.kept)} rows kept`); });
  private readonly kept = h("p", { class: "figure-line", "aria-live": "off" });
  private readonly funnelBox = h("div", { class: "card" });
  private readonly scores = h("div", { class: "card" });
  private readonly moved = h("div", { class: "moved" });
  private readonly saveBox = h("div", { class: "card" });
  private built = -1;
  private version = 0;
  private step: number | null = null;
  private timer = 0;

  async show(changed: Set<string>): Promise<void> {
    if (!chosen()) { replace(this.element, h("p", { class: "empty" }, "A cut needs a selection: thresher view SELECTION")); return; }
    if (this.built !== state.selection) {
      this.built = state.selection;
      this.step = null;
      this.sliders.build();
      const can = chosen().sliders.length > 0;
      replace(this.element,
        h("div", { class: "columns" },
          h("div", { class: "card" }, h("h2", null, "Move the cut"),
            h("p", { class: "muted" }, can ? `Of the last step, ${chosen().steps[chosen().steps.length - 1].method}. Everything on the other pages follows.` : "The last step of this selection cannot be cut again."),
            this.kept, this.sliders.element),
          this.funnelBox),
        this.scores, this.moved, this.saveBox);
      this.buildSave();
    }
    if (changed.has("cut") || changed.has("selection") || changed.has("page")) {
      try {
        const cut = JSON.stringify(state.cut), { head } = await cutOf();
        if (cut === JSON.stringify(state.cut)) this.draw(head);
      } catch (error) { replace(this.funnelBox, problem(error)); }
    }
  }

  private draw(head: CutHead): void {
    this.sliders.follow(head.sliders);
    replace(this.kept, h("b", null, number(head.kept)), ` of ${counted(head.rows, "row")} kept, ${percent(head.kept, head.rows)}`, head.uses !== head.kept && ` (used ${number(head.uses)} times)`);
    replace(this.funnelBox, h("h2", null, "Funnel"), funnel(head, (filter) => update({ page: "rows", filter })));
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => { void this.drawScores(head); void this.drawMoved(); void this.drawCommand(); }, 250);
  }

  private async drawScores(head: CutHead): Promise<void> {
    const version = ++this.version;
    const scored = head.steps.map((step, i) => ({ step, i })).filter(({ step }) => step.scored);
    if (!scored.length) { replace(this.scores); this.scores.hidden = true; return; }
    this.scores.hidden = false;
    const at = this.step ?? scored[scored.length - 1].i;
    try {
      const bins = await get<Bins | null>("histogram", { selection: state.selection, cut: state.cut ? JSON.stringify(state.cut) : null, step: at });
      if (version !== this.version) return;
      const pick = scored.length > 1 ? labelled("Step", choice(scored.map(({ step, i }): [string, string] => [String(i), `${i + 1}. ${step.method}`]), String(at), (value) => { this.step = Number(value); void this.drawScores(head); })) : null;
      replace(this.scores, h("div", { class: "card-head" }, h("h2", null, "Scores"), pick),
        bins ? stacked(`${bins.label}, of the rows given to step ${at + 1}`, bins.edges, bins.kept, bins.dropped, bins.cut, bins.label, (low, high) => update({ page: "rows", filter: { low, high, scored: at } }), innerWidth > 900 ? wide : undefined) : h("p", { class: "muted" }, "No usable scores."),
        bins && h("p", { class: "muted" }, "Click a bar to see its rows.", bins.apart > 0 && ` ${counted(bins.apart, "row")} without a score not drawn.`, bins.beyond > 0 && ` ${counted(bins.beyond, "row")} beyond the axis.`));
    } catch (error) { if (version === this.version) replace(this.scores, problem(error)); }
  }

  private async drawMoved(): Promise<void> {
    if (!state.cut) { replace(this.moved); return; }
    const cut = state.cut;
    const one = async (moved: "in" | "out", title: string): Promise<HTMLElement> => {
      const set = { selection: state.selection, cut, moved, order: "mixed" };
      const page = await get<Page>("rows", { set: JSON.stringify(set), count: 24 });
      return h("div", { class: "card" }, h("div", { class: "card-head" }, h("h2", null, `${title} `, h("small", null, counted(page.total, "row"))),
        page.total > page.rows.length && h("button", { type: "button", class: "link", onclick: () => update({ page: "rows", filter: { moved, order: "mixed" } }) }, "Show all")),
        page.total ? strip(page.rows, 0) : h("p", { class: "muted" }, "none"));
    };
    try {
      const parts = await Promise.all([one("in", "Newly kept"), one("out", "Newly dropped")]);
      if (JSON.stringify(cut) === JSON.stringify(state.cut)) replace(this.moved, parts);
    } catch (error) { replace(this.moved, problem(error)); }
  }

  private readonly commandBox = h("div");
  private name: HTMLInputElement | null = null;

  private buildSave(): void {
    const done = h("div", { role: "status" });
    this.name = h("input", { type: "text", value: this.proposed(), maxlength: "100", pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*", spellcheck: "false", autocomplete: "off", oninput: () => void this.drawCommand() });
    const button = h("button", { type: "submit", class: "primary" }, "Save as selection");
    const form = h("form", { class: "save", onsubmit: async (event: Event) => {
      event.preventDefault();
      button.disabled = true;
      try {
        const made = await save({ selection: state.selection, cut: state.cut, name: this.name!.value });
        replace(done, h("p", { class: "good" }, `Saved ${counted(made.kept, "row")} to `, h("code", null, made.path)));
      } catch (error) { replace(done, problem(error)); } finally { button.disabled = false; }
    } }, labelled("Name", this.name), button);
    replace(this.saveBox, h("h2", null, "Save"), subject.out ? [h("p", { class: "muted" }, "Writes a selection folder in ", h("code", null, subject.out), ", as the command line does. Nothing is replaced."), form, done] : h("p", { class: "muted" }, "To save from here, start with --out DIR."), this.commandBox);
  }

  private proposed(): string {
    const base = (chosen()?.name ?? "selection").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "") || "selection";
    return state.cut ? `${base}-${state.cut[0]}-${state.cut[1].replace(/[^A-Za-z0-9.]+/g, "")}` : `${base}-copy`;
  }

  private typed = false;
  private async drawCommand(): Promise<void> {
    if (!this.name) return;
    if (document.activeElement === this.name) this.typed = true;
    else if (!this.typed) this.name.value = this.proposed();
    try {
      const said = await get<{ command: string; python: string }>("command", { selection: state.selection, cut: asText(state.cut), name: this.name.value });
      replace(this.commandBox, said.command && [h("h3", null, "The command that makes it"), code(said.command)], h("details", { open: !said.command }, h("summary", null, "In Python"), code(said.python)));
    } catch { /* the funnel says it */ }
  }
}

export function code(text: string): HTMLElement {
  const button = h("button", { type: "button", class: "quiet copy", onclick: async () => { try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Select and copy"; } setTimeout(() => { button.textContent = "Copy"; }, 1500); } }, "Copy");
  return h("div", { class: "code-box" }, h("pre", { tabindex: "0" }, h("code", null, text)), button);
}
export { decimal };
