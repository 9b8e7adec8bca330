// The map: every row a point, near the rows that are like it.
import { arrays, asText, get, type Row, type Wanted } from "./api";
import { clusterColour, nameColour, palette, rampColour, stepColour } from "./colours";
import { open } from "./detail";
import { choice, counted, data, decimal, h, labelled, number, once, problem, replace, say } from "./dom";
import { Filters, narrow } from "./filters";
import { Gallery, image } from "./gallery";
import { Scatter, type Corner } from "./scatter";
import { chosen, state, subject, wanted } from "./state";
import { stepsOf } from "./steps";

type Legend = { kind: "scale"; label: string; low: number; high: number; levels: number } | { kind: "names"; label: string; names: string[]; more: number } | { kind: "clusters"; label: string; count: number };
interface Places { note: string; placed: number }

export class MapPage {
  readonly element = h("section", { class: "page map-page", "aria-label": "Map" });
  private scatter: Scatter | null = null;
  private readonly filters = new Filters(false);
  private readonly gallery = new Gallery(0, 132, "Rows of the set");
  private readonly key = h("div");
  private readonly legend = h("details", { class: "legend", open: innerWidth > 760 }, h("summary", null, "Colours"), this.key);
  private readonly note = h("p", { class: "map-note" });
  private readonly stage = h("div", { class: "stage" });
  private readonly tip = h("div", { class: "tip", hidden: true });
  private readonly overlay = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  private by = "fate";
  private lassoing = false;
  private corners: Corner[] = [];
  private hovered = -1;
  private version = 0;
  private legendData: Legend | null = null;
  private readonly lassoButton = h("button", { type: "button", class: "tool", "aria-pressed": "false", title: "Draw around points (L)", onclick: () => this.setLasso(!this.lassoing) }, "Lasso");

  constructor() {
    this.overlay.setAttribute("class", "overlay");
    this.overlay.setAttribute("aria-hidden", "true");
    replace(this.element, this.filters.element, h("div", { class: "map-split" }, this.stage, h("div", { class: "map-side" }, this.gallery.element)));
    this.gallery.onTotal = (total) => this.filters.total(total);
  }

  async show(changed: Set<string>): Promise<void> {
    this.filters.build();
    void this.gallery.show({ ...wanted(), order: state.filter.order ?? "mixed" });
    if (!this.scatter) {
      await this.load();
      return;
    }
    if (changed.has("selection") || changed.has("cut") || changed.has("page")) await this.colour();
    if (changed.size) await this.mark();
  }

  private async load(): Promise<void> {
    if (this.stage.dataset.state === "loading") return;
    this.stage.dataset.state = "loading";
    const began = Date.now();
    const wait = h("div", { class: "waiting-map", role: "status" }, h("p", null, "Placing the rows on the map …"), h("p", { class: "muted" }, "This is done once for a pool, and kept in the cache."));
    replace(this.stage, wait);
    const clock = window.setInterval(() => { wait.firstElementChild!.textContent = `Placing the rows on the map … ${Math.round((Date.now() - began) / 1000)} s`; }, 1000);
    try {
      const { head, arrays: got } = await arrays<Places>("map", {});
      const scatter = new Scatter(got.points.length / 2);
      this.scatter = scatter;
      scatter.setPoints(got.points);
      this.build(scatter);
      this.note.textContent = head.note;
      scatter.setShown(new Uint8Array(scatter.count).fill(1));
      await this.colour();
      await this.mark();
      this.stage.dataset.state = "ready";
    } catch (error) {
      this.stage.dataset.state = "failed";
      replace(this.stage, h("div", { class: "waiting-map" }, problem(error)));
    } finally { clearInterval(clock); }
  }

  private build(scatter: Scatter): void {
    const canvas = scatter.canvas;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `Map of ${counted(scatter.count, "row")}. Arrow keys move, plus and minus zoom, 0 shows all, V takes the rows in view, L draws a lasso.`);
    const options: [string, string][] = [];
    if (chosen()) options.push(["fate", "kept or dropped by"]);
    if (chosen()?.steps.some((step) => step.scored)) options.push(["score", `score: ${[...chosen().steps].reverse().find((step) => step.scored)!.score}`]);
    if (chosen()?.clusters) options.push(["cluster", "cluster"]);
    for (const column of subject.columns) options.push([`column:${column.name}`, column.name]);
    if (!options.length) options.push(["none", "nothing"]);
    if (!chosen()) this.by = options[0][0];
    replace(this.stage, canvas, this.overlay, this.tip,
      h("div", { class: "tools" },
        labelled("Colour", choice(options, this.by, (value) => { this.by = value; void this.colour(); })),
        this.lassoButton,
        h("button", { type: "button", class: "tool", title: "Only the rows in view (V)", onclick: () => this.takeView() }, "Rows in view"),
        h("button", { type: "button", class: "tool icon", "aria-label": "Zoom in", onclick: () => scatter.zoom(1.5) }, "+"),
        h("button", { type: "button", class: "tool icon", "aria-label": "Zoom out", onclick: () => scatter.zoom(1 / 1.5) }, "−"),
        h("button", { type: "button", class: "tool all", title: "Show all (0)", onclick: () => this.fit() }, "Show all")),
      this.legend, this.note);
    new ResizeObserver(() => scatter.resize(this.stage.clientWidth, this.stage.clientHeight)).observe(this.stage);
    scatter.resize(this.stage.clientWidth, this.stage.clientHeight);
    this.fit();
    scatter.onView = () => this.drawLasso();
    this.pointer(scatter);
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const keys: Record<string, () => void> = {
        ArrowLeft: () => scatter.pan(60, 0), ArrowRight: () => scatter.pan(-60, 0), ArrowUp: () => scatter.pan(0, 60), ArrowDown: () => scatter.pan(0, -60),
        "+": () => scatter.zoom(1.4), "=": () => scatter.zoom(1.4), "-": () => scatter.zoom(1 / 1.4), "0": () => this.fit(),
        l: () => this.setLasso(!this.lassoing), v: () => this.takeView(), Escape: () => { this.setLasso(false); narrow({ polygon: undefined }); },
        Enter: () => { const row = scatter.nearest(canvas.clientWidth / 2, canvas.clientHeight / 2, 80); if (row >= 0) open(row, { source: 0, back: () => canvas.focus() }); },
      };
      const work = keys[event.key];
      if (work) { event.preventDefault(); event.stopPropagation(); work(); }
    });
  }

  private fit(): void {
    const scatter = this.scatter!, box: [number, number, number, number] = [1, 1, -1, -1], every = Math.max(1, Math.floor(scatter.count / 20000));
    for (let row = 0; row < scatter.count; row += every) {
      const place = scatter.placeOf(row);
      if (!place) continue;
      for (const axis of [0, 1] as const) { box[axis] = Math.min(box[axis], place[axis]); box[axis + 2] = Math.max(box[axis + 2], place[axis]); }
    }
    scatter.fit(box[0] < box[2] ? box : undefined);
  }

  private setLasso(on: boolean): void {
    this.lassoing = on;
    this.corners = [];
    this.lassoButton.setAttribute("aria-pressed", String(on));
    this.stage.classList.toggle("lassoing", on);
    this.drawLasso();
    if (on) say("Draw around the points with the pointer, or press V for the rows in view");
  }

  private takeView(): void {
    const s = this.scatter!, w = s.canvas.clientWidth, b = s.canvas.clientHeight;
    this.take([s.toMap(0, 0), s.toMap(w, 0), s.toMap(w, b), s.toMap(0, b)]);
  }

  private take(corners: Corner[]): void {
    const every = Math.max(1, Math.ceil(corners.length / 200));
    narrow({ polygon: corners.filter((_, i) => i % every === 0).map(([x, y]) => [Number(x.toFixed(5)), Number(y.toFixed(5))]) });
  }

  private pointer(scatter: Scatter): void {
    const canvas = scatter.canvas, held = new Map<number, Corner>();
    let moved = false, pinch = 0;
    const at = (event: PointerEvent | WheelEvent): Corner => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      held.set(event.pointerId, at(event));
      moved = false;
      if (this.lassoing) this.corners = [scatter.toMap(...at(event))];
    });
    canvas.addEventListener("pointermove", (event) => {
      const now = at(event), before = held.get(event.pointerId);
      if (!before) { this.hover(scatter, now); return; }
      this.tip.hidden = true;
      if (Math.hypot(now[0] - before[0], now[1] - before[1]) > 3) moved = true;
      if (!moved) return;
      if (this.lassoing) { this.corners.push(scatter.toMap(...now)); this.drawLasso(); return; }
      held.set(event.pointerId, now);
      if (held.size === 2) {
        const [a, b] = [...held.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
        if (pinch) scatter.zoom(apart / pinch, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
        pinch = apart;
      } else scatter.pan(now[0] - before[0], now[1] - before[1]);
    });
    const end = (event: PointerEvent): void => {
      if (!held.delete(event.pointerId)) return;
      pinch = 0;
      if (this.lassoing && this.corners.length > 3) { const corners = this.corners; this.setLasso(false); this.take(corners); return; }
      if (!moved && event.type === "pointerup") {
        const row = scatter.nearest(...at(event));
        if (row >= 0) open(row, { source: 0, back: () => canvas.focus() });
      }
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; this.hovered = -1; });
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); scatter.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.03 : 0.0015)), ...at(event)); }, { passive: false });
    canvas.addEventListener("dblclick", (event) => { const box = canvas.getBoundingClientRect(); scatter.zoom(2, event.clientX - box.left, event.clientY - box.top); });
  }

  private readonly fetchTip = once(90, async (row: number) => {
    try {
      const got = await get<{ rows: Row[] }>("listed", { rows: row, selection: chosen() ? state.selection : null, cut: asText(state.cut) });
      if (row !== this.hovered || !this.scatter) return;
      const one = got.rows[0], place = this.scatter.placeOf(row);
      if (!place) return;
      const [x, y] = this.scatter.toScreen(...place);
      replace(this.tip, image(0, one), h("div", null, data(one.caption.slice(0, 110) || one.key), one.step !== undefined && h("small", null, h("i", { class: `dot ${one.step < 0 ? "kept" : "dropped"}` }), one.step < 0 ? "kept" : one.reason ?? "dropped")));
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth, high = this.tip.offsetHeight;
      this.tip.style.left = `${Math.min(Math.max(6, x + 14), this.stage.clientWidth - wide - 6)}px`;
      this.tip.style.top = `${y + 14 + high > this.stage.clientHeight ? Math.max(6, y - high - 14) : y + 14}px`;
    } catch { /* the next point will say */ }
  });

  private hover(scatter: Scatter, at: Corner): void {
    if (this.lassoing) return;
    const row = scatter.nearest(...at);
    if (row === this.hovered) return;
    this.hovered = row;
    this.tip.hidden = true;
    scatter.canvas.style.cursor = row >= 0 ? "pointer" : "";
    if (row >= 0) this.fetchTip(row);
  }

  private drawLasso(): void {
    const s = this.scatter;
    if (!s) return;
    const corners = this.corners.length ? this.corners : ((state.filter.polygon as Corner[] | undefined) ?? []);
    this.overlay.replaceChildren();
    if (corners.length < 2) return;
    const shape = document.createElementNS("http://www.w3.org/2000/svg", "polygon");
    shape.setAttribute("points", corners.map(([x, y]) => s.toScreen(x, y).map((v) => v.toFixed(1)).join(",")).join(" "));
    this.overlay.append(shape);
  }

  async colour(): Promise<void> {
    const scatter = this.scatter;
    if (!scatter) return;
    const version = ++this.version;
    if (this.by === "none") { scatter.setCodes(new Uint8Array(scatter.count), palette(() => nameColour(0))); return; }
    if (this.by === "fate") {
      const steps = await stepsOf();
      if (version !== this.version) return;
      const codes = new Uint8Array(scatter.count);
      for (let i = 0; i < codes.length; i++) codes[i] = steps[i] + 1;
      scatter.setCodes(codes, palette((code) => stepColour(code - 1)));
      const counts = new Array<number>(chosen().steps.length + 1).fill(0);
      for (let i = 0; i < codes.length; i++) counts[codes[i]]++;
      replace(this.key, h("ul", null, ["kept", ...chosen().steps.map((step, i) => `dropped by ${i + 1}. ${step.method}`)].map((text, i) =>
        h("li", null, h("button", { type: "button", class: "legend-item", title: "Show only these", onclick: () => narrow(i === 0 ? { kept: true, step: undefined } : { step: i - 1, kept: undefined }) },
          h("i", { class: "swatch", style: { background: stepColour(i - 1) } }), text, h("small", null, number(counts[i])))))));
      return;
    }
    try {
      const { head, arrays: got } = await arrays<Legend>("colours", { by: this.by, selection: chosen() ? state.selection : null, cut: asText(state.cut) });
      if (version !== this.version) return;
      this.legendData = head;
      scatter.setCodes(got.codes, this.paletteOf(head));
      replace(this.key, this.legendOf(head));
    } catch (error) { replace(this.key, problem(error)); }
  }

  private paletteOf(head: Legend): Uint8Array {
    if (head.kind === "scale") return palette((code) => rampColour(Math.min(1, code / (head.levels - 1))));
    if (head.kind === "names") return palette((code) => (code < head.names.length ? nameColour(code) : null));
    return palette(clusterColour);
  }

  private legendOf(head: Legend): HTMLElement {
    if (head.kind === "scale") return h("div", { class: "ramp" }, h("span", null, decimal(head.low, 3)), h("i", { class: "ramp-bar", style: { background: `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(rampColour).join(",")})` } }), h("span", null, decimal(head.high, 3)), h("small", null, head.label));
    if (head.kind === "clusters") return h("small", null, `${counted(head.count, "cluster")}; neighbours may look alike`);
    const column = head.label;
    return h("ul", null, head.names.map((name, i) => h("li", null, h("button", { type: "button", class: "legend-item", title: "Show only these", onclick: () => narrow({ column, value: name === "(empty)" ? "" : name }) }, h("i", { class: "swatch", style: { background: nameColour(i) } }), h("bdi", null, name)))), head.more > 0 && h("li", { class: "muted" }, `${number(head.more)} more`));
  }

  // The rows of the set are drawn on top, the others faint.
  private async mark(): Promise<void> {
    const scatter = this.scatter;
    if (!scatter) return;
    const set: Wanted = wanted();
    const { order: _, scored: __, ...narrowing } = state.filter;
    this.drawLasso();
    const shown = new Uint8Array(scatter.count).fill(1);
    if (Object.keys(narrowing).length) {
      try {
        const { arrays: got } = await arrays<{ total: number }>("members", { set: asText({ ...set, order: undefined }) });
        const bits: Uint8Array = got.bits;
        for (let i = 0; i < shown.length; i++) if ((bits[i >> 3] >> (i & 7)) & 1) shown[i] = 3;
      } catch { return; }
    }
    for (let i = 0; i < shown.length; i++) if (scatter.placeOf(i) === null) shown[i] = 0;
    scatter.setShown(shown);
  }

  repaint(): void {
    if (this.legendData && this.by !== "fate") void this.colour();
    else void this.colour();
  }
  focusSearch(): void { this.filters.focus(); }
}
