// One row: its image and caption, what each step decided, and the rows that it repeats up to the one that stayed.
import { asText, get, type Row } from "./api";
import { image } from "./gallery";
import { counted, data, decimal, h, number, percent, problem, replace, say } from "./dom";
import { state, subject } from "./state";

interface Place { source: number; run?: number; walk?: (by: number) => Promise<Row | null>; back?: () => void }
interface Cluster { number: number; size?: number; kept?: number; quota?: number; name?: string }
interface Verdict {
  method: string; package: string; verdict: string; reason: string; score?: number; meaning?: string; cut?: number | null;
  cluster?: Cluster; group?: { first: number; size: number }; reference?: { pool: string; row: number; key?: string; caption?: string };
  history?: History;
}
interface History { candidate: number; last: number | null; kinds: string[]; loss: number | null; seen: number | null }
interface Said {
  row: number; key: string; caption: string; kept?: boolean; uses?: number; steps?: Verdict[]; chain?: { row: number; key: string; caption: string; kept: boolean }[];
  policy?: string; epochs?: number; searches?: number; history?: History; mismatch?: { rank: number | null; chance: number | null };
}

let panel: HTMLElement | null = null;
let place: Place = { source: 0 };
let version = 0;

export const isOpen = (): boolean => panel !== null && !panel.hidden;

export function makePanel(): HTMLElement {
  panel = h("aside", { class: "detail", "aria-label": "One row", hidden: true, tabindex: "-1" });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    else if ((event.target as HTMLElement).matches("input, select, textarea")) return;
    else if (event.key === "ArrowRight" || event.key === "j") { event.preventDefault(); void step(1); }
    else if (event.key === "ArrowLeft" || event.key === "k") { event.preventDefault(); void step(-1); }
  });
  return panel;
}

async function step(by: number): Promise<void> {
  const row = await place.walk?.(by);
  if (row) void show(row.row);
  else if (place.walk) say(by > 0 ? "the last row of the set" : "the first row of the set");
}

export function close(): void {
  if (!panel || panel.hidden) return;
  panel.hidden = true;
  document.body.classList.remove("with-detail");
  version++;
  place.back?.();
}

export function open(row: number, at: Place): void {
  place = at;
  if (!panel) return;
  panel.hidden = false;
  document.body.classList.add("with-detail");
  void show(row).then(() => panel?.focus({ preventScroll: true }));
}

async function show(row: number): Promise<void> {
  const mine = ++version;
  try {
    const given = place.run !== undefined ? { row, run: place.run } : { row, selection: subject.selections.length && place.source === 0 ? state.selection : null, cut: place.source === 0 ? asText(state.cut) : null };
    const said = await get<Said>("explanation", given);
    if (mine === version && panel) draw(said);
  } catch (error) {
    if (mine === version && panel) replace(panel, bar(`row ${row}`), problem(error));
  }
}

function bar(title: string): HTMLElement {
  return h("div", { class: "detail-bar" },
    h("span", { class: "muted" }, title),
    h("span", { class: "spring" }),
    place.walk && h("button", { class: "quiet", type: "button", onclick: () => void step(-1), "aria-label": "Previous row of the set", title: "Previous (left arrow)" }, "‹"),
    place.walk && h("button", { class: "quiet", type: "button", onclick: () => void step(1), "aria-label": "Next row of the set", title: "Next (right arrow)" }, "›"),
    h("button", { class: "quiet", type: "button", onclick: close, "aria-label": "Close", title: "Close (Escape)" }, "×"));
}

function caption(said: Said): HTMLElement {
  const box = h("p", { class: "whole-caption" }, said.caption ? data(said.caption.replace(/\.\.\. \([\d,]+ characters\)$/, "…")) : h("span", { class: "muted" }, "no caption"));
  if (said.caption.length < 300) return box;
  const all = h("button", { class: "link", type: "button", onclick: async () => {
    all.setAttribute("disabled", "");
    try {
      const whole = await get<{ caption: string }>("caption", { row: said.row, source: place.source || null });
      const text = h("div", { class: "long", tabindex: "0", role: "region", "aria-label": "The whole caption" }, data(whole.caption));
      wrap.replaceChildren(text, h("p", { class: "muted" }, counted([...whole.caption].length, "character")));
      text.focus();
    } catch (error) { wrap.append(problem(error)); }
  } }, "Show all");
  box.classList.add("cut");
  const wrap = h("div", null, box, all);
  return wrap;
}

const history = (one: History): string => {
  const seen = one.seen === null ? "never trained on" : `last trained on in epoch ${one.seen}, loss ${decimal(one.loss)}`;
  return one.candidate ? `a candidate for pruning ${one.candidate}×, last in epoch ${one.last} as ${one.kinds.join(" and ")}; ${seen}` : `never a candidate for pruning; ${seen}`;
};

function verdict(one: Verdict, i: number): HTMLElement {
  const dropped = one.verdict === "dropped";
  const lines: (HTMLElement | string)[] = [];
  if (one.score !== undefined && one.score !== null && !one.history) lines.push(`${one.meaning}: ${decimal(one.score)}${one.cut === null || one.cut === undefined ? "" : ` (cut at ${decimal(one.cut)})`}`);
  if (one.history && !one.reason) lines.push(history(one.history));
  if (one.group && one.group.size > 1) lines.push(`in a group of ${counted(one.group.size, "duplicate")}; the first is row ${number(one.group.first)}`);
  if (one.cluster) {
    const c = one.cluster;
    const kept = c.size !== undefined && c.kept !== undefined ? `: ${number(c.kept)} of ${counted(c.size, "row")} kept, ${percent(c.kept, c.size)}` : "";
    lines.push(`cluster ${c.number}${c.name ? ` (${c.name})` : ""}${kept}${c.quota !== undefined ? `, quota ${number(c.quota)}` : ""}`);
  }
  if (one.reference) lines.push(h("span", null, `repeats row ${number(one.reference.row)} of ${one.reference.pool} `, one.reference.caption ? data(one.reference.caption) : ""));
  return h("li", { class: dropped ? "dropped" : "kept" },
    h("div", { class: "verdict" }, h("b", null, `${i + 1}. ${one.method}`), one.package && h("small", null, one.package), h("span", { class: `badge ${one.verdict}` }, one.verdict)),
    one.reason && h("p", null, one.reason),
    lines.map((line) => h("p", { class: "muted" }, line)));
}

function draw(said: Said): void {
  if (!panel) return;
  const fate = said.kept === undefined || (!said.steps?.length && !said.history) ? null : said.kept ? "kept" : "dropped";
  const uses = said.uses && said.uses > 1 ? `, used ${said.uses}×` : "";
  replace(panel,
    bar(`row ${number(said.row)}`),
    h("div", { class: "big" }, image(place.source, said, 640)),
    caption(said),
    h("p", { class: "muted key" }, "key ", data(said.key, { class: "code" })),
    fate && h("p", { class: `fate ${fate}` }, h("i", { class: `dot ${fate}`, "aria-hidden": "true" }), h("b", null, `${fate}${uses}`)),
    said.history && said.policy && h("section", null, h("h3", null, `Training with ${said.policy}`), h("p", null, history(said.history)),
      said.mismatch && said.mismatch.rank !== null && h("p", null, `mean rank of its loss ${decimal(said.mismatch.rank, 3)}${said.mismatch.chance === null ? "" : `; probability of a mismatched pair ${percent(said.mismatch.chance, 1)}`}`),
      h("p", { class: "muted" }, `${counted(said.epochs ?? 0, "epoch")}, ${number(said.searches ?? 0)} of them selected candidates`)),
    said.chain && said.chain.length > 0 && h("section", null, h("h3", null, said.chain.length > 1 ? "Repeats, up to the row that stayed" : "Repeats"),
      h("ol", { class: "chain" }, said.chain.map((one) => h("li", null,
        h("button", { class: "link-tile", type: "button", onclick: () => void show(one.row) },
          image(place.source, one), h("span", null, one.caption ? data(one.caption) : data(one.key), h("small", { class: one.kept ? "kept" : "dropped" }, one.kept ? "kept" : "dropped"))))))),
    said.steps && said.steps.length > 0 && h("section", null, h("h3", null, "Why"), h("ol", { class: "verdicts" }, said.steps.map(verdict))));
  panel.scrollTop = 0;
  say(`row ${said.row}${fate ? `, ${fate}` : ""}: ${said.caption.slice(0, 120)}`);
}
