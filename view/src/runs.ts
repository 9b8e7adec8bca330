// Training runs: losses, what was left out when, the rows that look most wrong, evaluations; several runs together.
import { get, type Row } from "./api";
import { bars, heat, lines, plainNumber, shareNumber, stacked, type Series } from "./charts";
import { seriesColour, tone } from "./colours";
import { choice, counted, h, labelled, number, percent, problem, replace, say } from "./dom";
import { strip } from "./gallery";
import { subject } from "./state";

interface Metric { name: string; epochs: number[]; values: number[]; first: boolean; chance: number | null; share: boolean }
interface Run {
  same?: boolean; name: string; stamp: string; source: number | null; why: string; policy: string; rows: number; unfinished: string; target: number | null;
  facts: [string, string][]; epochs: number[]; phases: string[]; columns: Record<string, (number | null)[]>; titles: Record<string, string>; chance: (number | null)[];
  losses: { edges: number[]; counts: number[][]; quantiles: Record<string, (number | null)[]> } | null;
  evaluations: { name: string; metrics: Metric[]; facts: [string, number][] }[];
  groups: { title: string; count: number; kept: boolean; rows: Row[] }[];
  ranks?: { counts: number[]; edges: number[]; cut: number | null; wrong: number };
}
const EVERY = 4000; // milliseconds between looks at a live run
const some = (values: (number | null)[] | undefined): boolean => !!values?.some((one) => one !== null && one !== 0);
const readable = (name: string): string => name.replaceAll("_", " ");

// Student's t, 97.5%, for 1 to 10 degrees of freedom.
const T = [12.71, 4.3, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];

export class RunsPage {
  readonly element = h("section", { class: "page sheet", "aria-label": "Training runs" });
  private runs: Run[] = [];
  private at = 0;
  private timer = 0;
  private readonly head = h("div", { class: "card-head" });
  private readonly body = h("div", { class: "stack" });
  private together = false;
  private grouped = false;

  async show(): Promise<void> {
    if (!subject.runs.length) { replace(this.element, h("div", { class: "empty" }, h("p", null, "Training runs are shown from their folders:"), h("pre", null, "thresher view RUN [RUN]..."))); return; }
    if (!this.runs.length) {
      replace(this.element, h("p", { class: "waiting-line", role: "status" }, "Reading the run …"));
      this.together = subject.runs.length > 1;
      try {
        this.runs = await Promise.all(subject.runs.map((_, i) => get<Run>("run", { run: i })));
      } catch (error) { replace(this.element, problem(error)); return; }
      replace(this.element, this.head, this.body);
      this.draw();
    }
    this.watch();
  }

  hide(): void { clearTimeout(this.timer); }

  private watch(): void {
    clearTimeout(this.timer);
    if (!this.runs.some((run) => run.unfinished)) return;
    this.timer = window.setTimeout(async () => {
      try {
        const fresh = await Promise.all(this.runs.map((run, i) => (run.unfinished ? get<Run>("run", { run: i, stamp: run.stamp }) : Promise.resolve({ same: true } as Run))));
        let changed = false;
        fresh.forEach((run, i) => { if (!run.same) { this.runs[i] = run; changed = true; } });
        if (changed) { const top = this.element.scrollTop; this.draw(); this.element.scrollTop = top; say("another epoch is finished"); }
      } catch { /* written just now; the next look succeeds */ }
      this.watch();
    }, EVERY);
  }

  private draw(): void {
    const live = this.runs.filter((run) => run.unfinished).length;
    this.head.hidden = this.runs.length < 2 && !live;
    replace(this.head,
      this.runs.length > 1 && labelled("Run", choice([["all", `all ${this.runs.length} together`], ...this.runs.map((run, i): [string, string] => [String(i), run.name])], this.together ? "all" : String(this.at), (value) => { this.together = value === "all"; if (!this.together) this.at = Number(value); this.draw(); })),
      this.together && this.runs.length > 1 && h("label", { class: "check" }, h("input", { type: "checkbox", checked: this.grouped, onchange: () => { this.grouped = !this.grouped; this.draw(); } }), " mean of runs with the same policy, with 95% interval"),
      h("span", { class: "spring" }), live > 0 && h("span", { class: "live" }, h("i", { "aria-hidden": "true" }), `${counted(live, "run")} not finished; updates by itself`));
    if (this.together && this.runs.length > 1) this.drawTogether();
    else this.drawOne(this.runs[this.at] ?? this.runs[0], this.at);
  }

  // One line for each run, or the mean of the runs of each policy with an interval over runs.
  private series(pick: (run: Run) => { xs: number[]; ys: (number | null)[] } | null): Series[] {
    const each = this.runs.map((run) => ({ run, got: pick(run) })).filter((one) => one.got !== null && one.got.ys.some((y) => y !== null)) as { run: Run; got: { xs: number[]; ys: (number | null)[] } }[];
    if (!this.grouped) return each.map(({ run, got }) => ({ name: `${run.name} (${run.policy})`, colour: seriesColour(this.runs.indexOf(run)), ...got }));
    const names = [...new Set(each.map(({ run }) => run.policy))];
    return names.map((policy, i) => {
      const own = each.filter(({ run }) => run.policy === policy), xs = [...new Set(own.flatMap(({ got }) => got.xs))].sort((a, b) => a - b);
      const ys: (number | null)[] = [], low: (number | null)[] = [], high: (number | null)[] = [];
      for (const x of xs) {
        const values = own.map(({ got }) => got.ys[got.xs.indexOf(x)]).filter((one): one is number => one !== null && one !== undefined);
        if (!values.length) { ys.push(null); low.push(null); high.push(null); continue; }
        const mean = values.reduce((a, b) => a + b, 0) / values.length;
        const half = values.length > 1 ? (T[Math.min(values.length - 2, 9)] * Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / (values.length - 1))) / Math.sqrt(values.length) : null;
        ys.push(mean); low.push(half === null ? null : mean - half); high.push(half === null ? null : mean + half);
      }
      return { name: `${policy}, ${counted(own.length, "run")}`, colour: seriesColour(i), xs, ys, band: [low, high] as [(number | null)[], (number | null)[]] };
    });
  }

  private drawTogether(): void {
    const charts: HTMLElement[] = [];
    const column = (name: string, title: string, format = plainNumber): void => {
      const made = this.series((run) => ({ xs: run.epochs, ys: run.columns[name] }));
      if (made.length) charts.push(lines(title, made, { label: "epoch", whole: true }, { format }));
    };
    column("pruned_so_far", "Share of the samples pruned so far", shareNumber);
    column("loss", "Mean loss of the rows trained on");
    const metrics = new Map<string, { of: string; metric: Metric }>();
    for (const run of this.runs) for (const one of run.evaluations) for (const metric of one.metrics) if (!metrics.has(`${one.name}\0${metric.name}`)) metrics.set(`${one.name}\0${metric.name}`, { of: one.name, metric });
    const chart = ({ of, metric }: { of: string; metric: Metric }): HTMLElement => lines(`${readable(metric.name)} on ${of}`, this.series((run) => {
      const found = run.evaluations.find((one) => one.name === of)?.metrics.find((one) => one.name === metric.name);
      return found ? { xs: found.epochs, ys: found.values } : null;
    }), { label: "epoch", whole: true }, { format: metric.share ? shareNumber : plainNumber }, metric.chance !== null ? [{ y: metric.chance, text: `chance ${(metric.share ? shareNumber : plainNumber)(metric.chance)}` }] : []);
    const first = [...metrics.values()].filter((one) => one.metric.first), rest = [...metrics.values()].filter((one) => !one.metric.first);
    replace(this.body,
      h("div", { class: "card" }, h("h2", null, "Runs"), h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table of runs, scrolls sideways" }, h("table", { class: "wide" }, h("caption", { class: "hidden" }, "Runs"),
        h("thead", null, h("tr", null, ["run", "policy", "epochs", "pruned", "last mean loss"].map((text, i) => h("th", { scope: "col", class: i > 1 ? "num" : "" }, text)))),
        h("tbody", null, this.runs.map((run, i) => h("tr", null, h("th", { scope: "row" }, h("button", { type: "button", class: "link", onclick: () => { this.together = false; this.at = i; this.draw(); } }, run.name)), h("td", null, run.policy), h("td", { class: "num" }, `${run.epochs.length}${run.unfinished ? ", not finished" : ""}`), h("td", { class: "num" }, run.epochs.length ? percent(run.columns.pruned_so_far.at(-1) ?? 0, 1) : "-"), h("td", { class: "num" }, run.epochs.length ? plainNumber(run.columns.loss.at(-1) ?? NaN) : "-"))))))),
      h("div", { class: "charts" }, charts, first.map(chart)),
      rest.length > 0 && this.later(`${counted(rest.length, "more metric")}`, () => h("div", { class: "charts" }, rest.map(chart))));
  }

  private later(title: string, make: () => HTMLElement): HTMLElement {
    const box = h("details", { class: "card", ontoggle: () => { if (box.open && box.childElementCount === 1) box.append(make()); } }, h("summary", null, title));
    return box;
  }

  private drawOne(run: Run, at: number): void {
    if (!run.epochs.length) { replace(this.body, h("div", { class: "card" }, h("h2", null, run.name), h("p", { class: "muted" }, "The first epoch is not finished."))); return; }
    const xs = run.epochs, c = run.columns, colour = tone().kept, epochs = { label: "epoch", whole: true };
    const charts: HTMLElement[] = [];
    charts.push(lines("Rows trained on in each epoch", [{ name: "trained on", xs, ys: c.rows, colour }, { name: "all", xs, ys: c.total, colour: tone().none, dashed: true }], epochs, { low: 0 }));
    charts.push(lines("Share of the samples pruned so far", [{ name: "pruned so far", xs, ys: c.pruned_so_far, colour }], epochs, { format: shareNumber }, run.target !== null ? [{ y: run.target, text: `target ${shareNumber(run.target)}` }] : []));
    if (some(c.candidates)) {
      const parts: Series[] = some(c.redundant) || some(c.ill_matched) ? [{ name: "redundant", xs, ys: c.redundant, colour: tone().steps[0] }, { name: "ill-matched", xs, ys: c.ill_matched, colour: tone().steps[1] }] : [{ name: "candidates", xs, ys: c.candidates, colour: tone().steps[0] }];
      charts.push(bars("Candidates for pruning, by the epoch that selected them", xs, parts));
    }
    if (some(c.overlap)) {
      const keep = xs.map((_, i) => i).filter((i) => c.overlap[i] !== null);
      charts.push(lines("Do searches agree? Share of the candidates that were candidates in the search before", [{ name: "repeated", xs: keep.map((i) => xs[i]), ys: keep.map((i) => c.overlap[i]), colour }, { name: "by chance", xs: keep.map((i) => xs[i]), ys: keep.map((i) => run.chance[i]), colour: tone().none, dashed: true }], epochs, { format: shareNumber, low: 0 }));
    }
    charts.push(lines("Mean loss of the rows trained on", [{ name: "mean loss", xs, ys: c.loss, colour }], epochs));
    if (run.losses) {
      const q = run.losses.quantiles;
      charts.push(lines("Losses: median, half of the rows (dark), 90% (outer lines)", [{ name: "median", xs, ys: q["0.5"], colour, band: [q["0.25"], q["0.75"]] }, { name: "5%", xs, ys: q["0.05"], colour: tone().none, dashed: true }, { name: "95%", xs, ys: q["0.95"], colour: tone().none, dashed: true }], epochs));
      charts.push(heat("Distribution of the losses; darker cells have more of the epoch's rows", xs, run.losses.edges, run.losses.counts));
    }
    if (run.ranks) charts.push(stacked("Mean rank of each row's loss: a second hump at the right are mismatched pairs", run.ranks.edges, run.ranks.counts.map((n, i) => (run.ranks!.cut !== null && run.ranks!.edges[i] >= run.ranks!.cut ? 0 : n)), run.ranks.counts.map((n, i) => (run.ranks!.cut !== null && run.ranks!.edges[i] >= run.ranks!.cut ? n : 0)), run.ranks.cut, "mean rank, 0 lowest loss to 1 highest", undefined, undefined, ["others", "probably mismatched"]));
    const metric = (of: string, one: Metric): HTMLElement => lines(`${readable(one.name)} on ${of}`, [{ name: readable(one.name), xs: one.epochs, ys: one.values, colour: tone().steps[3] }], epochs, { format: one.share ? shareNumber : plainNumber }, one.chance !== null ? [{ y: one.chance, text: `chance ${(one.share ? shareNumber : plainNumber)(one.chance)}` }] : []);
    const groups = run.groups.filter((group) => group.rows.length);
    replace(this.body,
      h("div", { class: "card" }, h("h2", null, run.name, run.unfinished && h("small", null, ` ${run.unfinished}`)), h("dl", { class: "facts-list" }, run.facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))))),
      h("div", { class: "charts" }, charts),
      run.evaluations.map((one) => {
        const rest = one.metrics.filter((each) => !each.first);
        return h("section", { class: "stack" }, h("h2", null, "Evaluation on ", h("bdi", null, one.name)), h("div", { class: "charts" }, one.metrics.filter((each) => each.first).map((each) => metric(one.name, each))),
          rest.length > 0 && this.later(counted(rest.length, "more metric"), () => h("div", { class: "charts" }, rest.map((each) => metric(one.name, each)))),
          one.facts.length > 0 && h("p", { class: "muted" }, one.facts.map(([name, value]) => `${readable(name)} ${plainNumber(value)}`).join(" · ")));
      }),
      run.source === null && h("p", { class: "problem" }, `No pictures and captions: ${run.why}`),
      run.source !== null && groups.map((group) => h("div", { class: "card" }, h("h2", null, group.title, " ", h("small", null, counted(group.count, "row"))), strip(group.rows, run.source!, at))),
      h("details", { class: "card" }, h("summary", null, "Every epoch as a table"), h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table of epochs, scrolls sideways" }, h("table", { class: "wide" }, h("caption", { class: "hidden" }, "Epochs"),
        h("thead", null, h("tr", null, h("th", { scope: "col" }, "epoch"), h("th", { scope: "col" }, "phase"), Object.entries(run.titles).filter(([name]) => some(c[name])).map(([, title]) => h("th", { scope: "col", class: "num" }, title)))),
        h("tbody", null, xs.map((epoch, i) => h("tr", null, h("th", { scope: "row" }, number(epoch)), h("td", null, run.phases[i]), Object.keys(run.titles).filter((name) => some(c[name])).map((name) => h("td", { class: "num" }, c[name][i] === null ? "-" : name === "pruned_so_far" || name === "overlap" ? shareNumber(c[name][i]!) : plainNumber(c[name][i]!))))))))));
  }
}
