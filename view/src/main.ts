// The frame of the page: what is looked at, the pages, keys, light and dark.
import { get, type Subject } from "./api";
import { ClustersPage } from "./clusters";
import { ComparePage } from "./compare";
import { CutPage, cutText } from "./cut";
import { close, isOpen, makePanel } from "./detail";
import { choice, counted, h, labelled, number, percent, problem, replace } from "./dom";
import { Filters } from "./filters";
import { Gallery } from "./gallery";
import { LostPage } from "./lost";
import { meter } from "./charts";
import { MapPage } from "./map";
import { RunsPage } from "./runs";
import { chosen, onChange, readAddress, setSubject, state, update, wanted } from "./state";
import { cutOf } from "./steps";

interface Page { element: HTMLElement; show(changed: Set<string>): Promise<void> | void; hide?(): void }

class RowsPage implements Page {
  private readonly filters = new Filters();
  private readonly gallery = new Gallery();
  readonly element = h("section", { class: "page rows-page", "aria-label": "Rows" }, this.filters.element, this.gallery.element);
  constructor() { this.gallery.onTotal = (total) => this.filters.total(total); }
  async show(): Promise<void> {
    this.filters.build();
    await this.gallery.show(wanted());
  }
  focusSearch(): void { this.filters.focus(); }
  focusRows(): void { this.gallery.focus(); }
}

const KEYS: [string, string][] = [
  ["1 – 7", "the pages, in their order"], ["/", "search"], ["g", "the rows"], ["arrow keys, Home, End, Page Up, Page Down", "walk over the rows; on the map, move it"],
  ["Enter", "explain the row"], ["← →", "the row before, the row after, while one is explained"], ["Escape", "close"],
  ["+  −  0", "on the map: zoom in, zoom out, all"], ["l", "on the map: draw a lasso"], ["v", "on the map: the rows in view"], ["t", "light or dark"], ["?", "these keys"],
];

async function start(): Promise<void> {
  const app = document.getElementById("app")!;
  let given: Subject;
  try { given = await get<Subject>("subject"); } catch (error) { replace(app, h("main", { class: "page" }, problem(error))); return; }
  setSubject(given);
  document.title = `${given.title} · Thresher`;

  const makers: [string, string, boolean, () => Page][] = [
    ["rows", "Rows", given.sources.length > 0, () => new RowsPage()],
    ["map", "Map", given.sources[0]?.vectors ?? false, () => new MapPage()],
    ["cut", "Cut", given.selections.length > 0, () => new CutPage()],
    ["clusters", "Clusters", given.selections.some((one) => one.clusters), () => new ClustersPage()],
    ["lost", "What did I lose?", given.selections.length > 0, () => new LostPage()],
    ["compare", "Compare", given.selections.length > 1, () => new ComparePage()],
    ["runs", "Training", given.runs.length > 0, () => new RunsPage()],
  ];
  const only = given.runs.length > 0 && given.selections.length === 0;
  const shown = makers.filter(([, , there]) => there);
  if (only) shown.sort((a, b) => Number(b[0] === "runs") - Number(a[0] === "runs"));
  const pages = new Map<string, Page>();
  const tabs = new Map<string, HTMLAnchorElement>();
  const main = h("main", { id: "main", tabindex: "-1" });
  const about = h("div", { class: "about" });
  const nav = h("nav", { "aria-label": "Pages" }, shown.map(([key, title]) => {
    const tab = h("a", { href: `#${key}`, onclick: (event: MouseEvent) => { if (event.ctrlKey || event.metaKey || event.shiftKey) return; event.preventDefault(); update({ page: key, filter: key === "rows" || key === "map" ? state.filter : {} }); } }, title);
    tabs.set(key, tab);
    return tab;
  }));

  const themeButton = h("button", { type: "button", class: "quiet icon", title: "Light or dark (t)", onclick: () => turn() }, h("span", { "aria-hidden": "true" }, "◐"), h("span", { class: "hidden" }, "Light or dark"));
  const help = h("dialog", { class: "help", "aria-label": "Keys" }, h("h2", null, "Keys"), h("dl", null, KEYS.map(([key, what]) => [h("dt", null, h("kbd", null, key)), h("dd", null, what)])), h("button", { type: "button", class: "primary", onclick: () => help.close() }, "Close"));
  const helpButton = h("button", { type: "button", class: "quiet icon", title: "Keys (?)", onclick: () => help.showModal() }, h("span", { "aria-hidden": "true" }, "?"), h("span", { class: "hidden" }, "Keys"));
  function turn(): void {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("thresher-theme", document.documentElement.dataset.theme); } catch { /* not kept */ }
    repaint();
  }
  function repaint(): void { const map = pages.get("map"); if (map instanceof MapPage) map.repaint(); }
  try { const kept = localStorage.getItem("thresher-theme"); if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept; } catch { /* as the system has it */ }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

  const brand = h("a", { class: "brand", href: "#rows", onclick: (event: Event) => { event.preventDefault(); update({ page: shown[0][0], filter: {} }); } }, h("img", { src: "static/icon.svg", alt: "", width: "26", height: "26" }), h("span", null, "Thresher"));
  replace(app, h("a", { class: "skip", href: "#main", onclick: (event: Event) => { event.preventDefault(); main.focus(); } }, "To the content"),
    h("header", null, brand, about, h("span", { class: "spring" }), nav, h("div", { class: "header-tools" }, helpButton, themeButton)),
    h("div", { class: "frame" }, main, makePanel()), help);

  async function describe(): Promise<void> {
    const selection = chosen();
    if (!selection) { replace(about, h("span", { class: "what" }, h("bdi", null, given.title)), given.sources.length > 0 && h("span", { class: "muted" }, counted(given.sources[0].rows, "row"))); return; }
    let kept = selection.kept;
    if (state.cut) { try { kept = (await cutOf()).head.kept; } catch { /* the page of the cut says it */ } }
    const picker = given.selections.length > 1 ? labelled("Selection", choice(given.selections.map((one, i): [string, string] => [String(i), one.name]), String(state.selection), (value) => update({ selection: Number(value), cut: null, filter: {} })), { class: "field hide-label" }) : h("span", { class: "what" }, h("bdi", null, selection.name));
    replace(about, picker, meter(kept, selection.rows, `${percent(kept, selection.rows)} kept`), h("span", { class: "muted kept-count" }, `${number(kept)} of ${number(selection.rows)} kept`),
      state.cut && h("button", { type: "button", class: "chip", onclick: () => update({ cut: null }), "aria-label": `Undo the cut ${cutText(state.cut)}` }, cutText(state.cut), h("span", { "aria-hidden": "true" }, "×")));
  }

  let current = "";
  async function draw(changed: Set<string>): Promise<void> {
    const [, , , make] = shown.find(([key]) => key === state.page) ?? shown[0];
    if (changed.has("page") || changed.has("filter") || changed.has("selection")) if (isOpen() && changed.has("page")) close();
    let page = pages.get(state.page);
    if (!page) { page = make(); pages.set(state.page, page); }
    if (current !== state.page) {
      pages.get(current)?.hide?.();
      current = state.page;
      replace(main, page.element);
      changed = new Set([...changed, "page"]);
      for (const [key, tab] of tabs) { if (key === state.page) tab.setAttribute("aria-current", "page"); else tab.removeAttribute("aria-current"); }
      tabs.get(state.page)?.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    void describe();
    await page.show(changed);
  }
  onChange((changed) => void draw(changed as Set<string>));
  const names = shown.map(([key]) => key);
  window.addEventListener("popstate", () => readAddress(names));
  window.addEventListener("hashchange", () => readAddress(names));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const target = event.target as HTMLElement;
    if (event.key === "Escape" && isOpen()) { close(); return; }
    if (target.matches("input, select, textarea")) { if (event.key === "Escape") target.blur(); return; }
    const page = pages.get(state.page);
    if (/^[1-9]$/.test(event.key)) { const next = shown[Number(event.key) - 1]; if (next) { event.preventDefault(); tabs.get(next[0])?.click(); main.focus({ preventScroll: true }); } }
    else if (event.key === "/" && (page instanceof RowsPage || page instanceof MapPage)) { event.preventDefault(); page.focusSearch(); }
    else if (event.key === "g" && page instanceof RowsPage) { event.preventDefault(); page.focusRows(); }
    else if (event.key === "t") turn();
    else if (event.key === "?") help.showModal();
  });

  readAddress(names);
  if (!current) await draw(new Set(["page"]));
}

void start();
