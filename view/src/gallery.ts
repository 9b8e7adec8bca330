// An endless gallery: only the rows in sight are in the page, whatever the size of the set.
import { asText, get, picture, type Page, type Row, type Wanted } from "./api";
import { data, decimal, h, number, problem, replace, say } from "./dom";
import { open } from "./detail";
import { chosen, subject } from "./state";

const PAGE = 60; // rows of a request
const TALLEST = 8_000_000; // pixels of an element that every browser can scroll
const GAP = 12;

const hasPictures = (source: number): boolean => Boolean(subject.sources[source]?.pictures);

export function image(source: number, row: { row: number; caption: string }, side: 192 | 640 = 192): HTMLElement {
  if (!hasPictures(source)) return h("div", { class: "picture none", "aria-hidden": "true" });
  const made = h("img", { class: "picture", src: picture(source, row.row, side), alt: row.caption || `row ${row.row}`, loading: "lazy", decoding: "async", draggable: "false" });
  made.addEventListener("error", () => made.replaceWith(h("div", { class: "picture none", role: "img", "aria-label": "no image" }, "no image")), { once: true });
  return made;
}

export const fate = (step: number | undefined): string => step === undefined ? "" : step < 0 ? "kept" : `dropped by ${chosen()?.steps[step]?.method ?? "a step"}`;

export function tile(row: Row, source: number, props: Record<string, unknown> = {}): HTMLElement {
  const where = row.step === undefined ? "" : row.step < 0 ? "kept" : "dropped";
  const twin = row.twin;
  const facts = [row.step === undefined ? "" : row.step < 0 ? (row.uses ? `kept, used ${row.uses}×` : "kept") : chosen().steps[row.step].method];
  if (row.text) facts.push(row.text);
  else if (row.score !== null && row.score !== undefined) facts.push(decimal(Math.abs(row.score) < 0.0005 ? 0 : row.score, 3));
  const words = (one: { caption: string; key: string }): HTMLElement => (one.caption ? data(one.caption) : data(one.key, { class: "muted" }));
  if (!hasPictures(source)) {
    return h("button", { class: `tile words ${where}`, type: "button", title: row.reason ?? "", ...props },
      h("span", { class: twin ? "caption short" : "caption" }, words(row)),
      twin && h("span", { class: "caption short muted" }, "= ", words(twin)),
      h("span", { class: "facts" }, where && h("i", { class: `dot ${where}`, "aria-hidden": "true" }), facts.filter(Boolean).join(" · ")));
  }
  return h("button", { class: `tile ${where}`, type: "button", title: row.reason ?? "", ...props },
    h("span", { class: twin ? "pictures two" : "pictures" },
      image(source, row),
      twin && h("span", { class: "repeats", "aria-hidden": "true" }, "="),
      twin && image(source, twin)),
    h("span", { class: "caption" }, words(row)),
    h("span", { class: "facts" }, where && h("i", { class: `dot ${where}`, "aria-hidden": "true" }), facts.filter(Boolean).join(" · ")));
}

export class Gallery {
  readonly element: HTMLElement;
  total = 0;
  private readonly scroll: HTMLElement;
  private readonly space: HTMLElement;
  private readonly pages = new Map<number, Row[] | "asked">();
  private wanted: Wanted = {};
  private version = 0;
  private abort = new AbortController();
  private columns = 1;
  private height = 250;
  private width = 200;
  private offset = 0;
  private before = 0;
  private active = 0;
  private drawn = "";
  onTotal: (total: number) => void = () => undefined;

  constructor(private readonly source = 0, private readonly least = 160, label = "Rows") {
    this.space = h("div", { class: "space", role: "list", "aria-label": label });
    this.scroll = h("div", { class: "scroll", tabindex: "-1", onscroll: () => this.scrolled() }, this.space);
    this.element = h("div", { class: "gallery" }, this.scroll);
    this.scroll.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.resized()).observe(this.scroll);
  }

  async show(wanted: Wanted): Promise<void> {
    const same = JSON.stringify(wanted) === JSON.stringify(this.wanted) && this.version > 0;
    if (same) return;
    this.wanted = wanted;
    this.abort.abort();
    this.abort = new AbortController();
    const version = ++this.version;
    this.element.setAttribute("aria-busy", "true");
    try {
      const first = await this.ask(0);
      if (version !== this.version) return;
      this.pages.clear();
      this.pages.set(0, first.rows);
      this.total = first.total;
      this.active = 0;
      this.before = this.offset = 0;
      this.scroll.scrollTop = 0;
      this.drawn = "";
      this.onTotal(this.total);
      if (!this.total) replace(this.space, h("p", { class: "empty" }, "No rows. Widen the filters."));
      this.resized(true);
    } catch (error) {
      if (version !== this.version || (error as Error).name === "AbortError") return;
      this.total = 0;
      this.pages.clear();
      this.space.style.height = "auto";
      replace(this.space, problem(error));
      this.onTotal(0);
    } finally {
      if (version === this.version) this.element.removeAttribute("aria-busy");
    }
  }

  private ask(page: number): Promise<Page> {
    return get<Page>("rows", { set: asText(this.wanted), start: page * PAGE, count: PAGE, source: this.source || null }, this.abort.signal);
  }

  private async need(page: number): Promise<void> {
    if (this.pages.has(page)) return;
    this.pages.set(page, "asked");
    const version = this.version;
    try {
      const got = await this.ask(page);
      if (version !== this.version) return;
      this.pages.set(page, got.rows);
      if (this.pages.size > 40) this.pages.delete([...this.pages.keys()].find((one) => Math.abs(one - page) > 4) ?? -1);
    } catch {
      if (version === this.version) this.pages.delete(page);
      return;
    }
    this.draw(true);
  }

  private at(index: number): Row | undefined {
    const rows = this.pages.get(Math.floor(index / PAGE));
    return Array.isArray(rows) ? rows[index % PAGE] : undefined;
  }

  private get tall(): number { return Math.ceil(this.total / this.columns) * this.height + GAP; }

  private resized(force = false): void {
    const width = this.scroll.clientWidth - 2 * GAP;
    if (width <= 0 || !this.total) return;
    const columns = Math.max(1, Math.floor((width + GAP) / (this.least + GAP)));
    const changed = columns !== this.columns || force;
    const first = Math.floor((this.scroll.scrollTop + this.offset) / this.height) * this.columns;
    this.columns = columns;
    this.width = (width - (columns - 1) * GAP) / columns;
    this.height = (hasPictures(this.source) ? Math.round(Math.min(this.width, 236) * 0.8 + 78) : 124) + GAP;
    this.space.style.height = `${Math.min(this.tall, TALLEST)}px`;
    if (changed && !force) this.reveal(first);
    this.draw(true);
  }

  // A set that is taller than a browser can scroll is moved in parts, each as tall as it is.
  private scrolled(): void {
    const real = this.tall, shown = Math.min(real, TALLEST), view = this.scroll.clientHeight;
    if (real > shown) {
      const top = this.scroll.scrollTop;
      if (Math.abs(top - this.before) > view) {
        const goal = Math.min(real - view, Math.max(0, (top / (shown - view)) * (real - view)));
        this.offset = goal - top;
      } else if ((top <= 0 && this.offset > 0) || (top >= shown - view && top + this.offset < real - view)) {
        const goal = top + this.offset;
        const middle = Math.min(shown - view, Math.max(0, (goal / (real - view)) * (shown - view)));
        this.offset = goal - middle;
        this.scroll.scrollTop = middle;
      }
      this.before = this.scroll.scrollTop;
    } else this.offset = 0;
    this.draw();
  }

  private draw(force = false): void {
    if (!this.total) return;
    const view = this.scroll.clientHeight || 600, top = this.scroll.scrollTop + this.offset;
    const first = Math.max(0, Math.floor(top / this.height) - 1) * this.columns;
    const last = Math.min(this.total, (Math.ceil((top + view) / this.height) + 1) * this.columns);
    for (let page = Math.floor(first / PAGE); page <= Math.floor(Math.max(first, last - 1) / PAGE); page++) void this.need(page);
    const now = `${first}-${last}-${this.offset}-${this.columns}-${this.width}`;
    if (now === this.drawn && !force) return;
    this.drawn = now;
    const focused = this.space.contains(document.activeElement);
    const old = new Map([...this.space.children].map((one) => [(one as HTMLElement).dataset.key, one as HTMLElement]));
    const items: HTMLElement[] = [];
    for (let index = first; index < last; index++) {
      const row = this.at(index);
      const key = `${this.version}-${index}-${row ? row.row : "wait"}`;
      let item = old.get(key);
      if (!item) {
        item = h("div", { class: "item", role: "listitem", "aria-setsize": this.total, "aria-posinset": index + 1 },
          row ? tile(row, this.source, { tabindex: index === this.active ? "0" : "-1", onclick: () => this.open(index), onfocus: () => this.activate(index) }) : h("div", { class: "tile waiting" }));
        item.dataset.key = key;
        item.dataset.index = String(index);
      }
      const column = index % this.columns, line = Math.floor(index / this.columns);
      item.style.width = `${this.width}px`;
      item.style.height = `${this.height - GAP}px`;
      item.style.transform = `translate(${GAP + column * (this.width + GAP)}px, ${GAP + line * this.height - this.offset}px)`;
      items.push(item);
    }
    const same = items.length === this.space.children.length && items.every((one, i) => one === this.space.children[i]);
    if (!same) this.space.replaceChildren(...items);
    if (!items.some((one) => Number(one.dataset.index) === this.active)) items[0]?.querySelector("button")?.setAttribute("tabindex", "0");
    if (focused && !this.space.contains(document.activeElement)) this.button(this.active)?.focus({ preventScroll: true });
  }

  private button(index: number): HTMLElement | null { return this.space.querySelector(`[data-index="${index}"] button`); }

  private activate(index: number): void {
    for (const one of this.space.querySelectorAll('button[tabindex="0"]')) one.setAttribute("tabindex", "-1");
    this.active = index;
    this.button(index)?.setAttribute("tabindex", "0");
  }

  private reveal(index: number): void {
    const line = Math.floor(index / this.columns) * this.height, view = this.scroll.clientHeight;
    const top = this.scroll.scrollTop + this.offset;
    const goal = line < top ? line : line + this.height + GAP > top + view ? line + this.height + GAP - view : top;
    if (goal === top) return;
    const shown = Math.min(this.tall, TALLEST);
    if (this.tall > shown && (goal - this.offset < 0 || goal - this.offset > shown - view)) {
      const middle = (goal / (this.tall - view)) * (shown - view);
      this.offset = goal - middle;
    }
    this.before = goal - this.offset;
    this.scroll.scrollTop = goal - this.offset;
    this.draw(true);
  }

  focus(index = this.active): void {
    this.activate(index);
    this.reveal(index);
    this.draw(true);
    this.button(index)?.focus({ preventScroll: true });
  }

  private key(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(this.scroll.clientHeight / this.height)) * this.columns;
    const moves: Record<string, number> = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, PageDown: page, PageUp: -page, Home: -this.total, End: this.total };
    const move = moves[event.key];
    if (move === undefined || !this.total) return;
    event.preventDefault();
    const next = Math.min(this.total - 1, Math.max(0, this.active + move));
    this.active = next;
    this.reveal(next);
    this.draw(true);
    const button = this.button(next);
    if (button) this.focus(next);
    else { // its page is not here yet
      this.scroll.focus({ preventScroll: true });
      void this.need(Math.floor(next / PAGE)).then(() => { if (this.active === next) this.focus(next); });
    }
    say(`${number(next + 1)} of ${number(this.total)}`);
  }

  private async open(index: number): Promise<void> {
    this.activate(index);
    const walk = async (by: number): Promise<Row | null> => {
      const next = this.active + by;
      if (next < 0 || next >= this.total) return null;
      if (!this.at(next)) { await this.need(Math.floor(next / PAGE)); }
      this.activate(next);
      this.reveal(next);
      return this.at(next) ?? null;
    };
    const row = this.at(index);
    if (row) open(row.row, { source: this.source, walk, back: () => this.focus() });
  }
}

// A strip of a few rows with a way to all of them.
export function strip(rows: Row[], source: number, run?: number): HTMLElement {
  return h("div", { class: "strip", role: "list" }, rows.map((row) => h("div", { role: "listitem" },
    tile(row, source, { onclick: (event: Event) => open(row.row, { source, run, back: () => (event.currentTarget as HTMLElement)?.focus() }) }))));
}
