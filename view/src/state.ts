// What is looked at now. It is part of the address, so that going back works and an address can be shared.
import type { Cut, Subject, Wanted } from "./api";

export type Filter = Omit<Wanted, "selection" | "cut">;
export interface State { page: string; selection: number; cut: Cut; filter: Filter }

export let subject: Subject;
export const setSubject = (given: Subject): void => { subject = given; };

export let state: State = { page: "rows", selection: 0, cut: null, filter: {} };
const listeners = new Set<(changed: Set<keyof State>) => void>();
export const onChange = (listener: (changed: Set<keyof State>) => void): void => { listeners.add(listener); };

function written(): string {
  const rest: Record<string, unknown> = {};
  if (state.selection) rest.s = state.selection;
  if (state.cut) rest.c = state.cut;
  if (Object.keys(state.filter).length) rest.f = state.filter;
  return `#${state.page}${Object.keys(rest).length ? `=${encodeURIComponent(JSON.stringify(rest))}` : ""}`;
}

function emit(before: State): void {
  const changed = new Set<keyof State>();
  for (const name of ["page", "selection", "cut", "filter"] as const)
    if (JSON.stringify(before[name]) !== JSON.stringify(state[name])) changed.add(name);
  if (changed.size) for (const listener of listeners) listener(changed);
}

export function update(change: Partial<State>, how: "push" | "replace" = "push"): void {
  const before = state;
  state = { ...state, ...change };
  const next = written();
  if (next !== location.hash) history[how === "push" ? "pushState" : "replaceState"](null, "", next);
  emit(before);
}

export function readAddress(pages: string[]): void {
  const [page, rest] = location.hash.slice(1).split("=");
  let given: any = {};
  try { given = rest ? JSON.parse(decodeURIComponent(rest)) : {}; } catch { /* not an address of this page */ }
  const before = state;
  const selection = Number.isInteger(given.s) && given.s >= 0 && given.s < subject.selections.length ? given.s : 0;
  state = {
    page: pages.includes(page) ? page : pages[0],
    selection,
    cut: Array.isArray(given.c) && given.c.length === 2 ? given.c : null,
    filter: given.f && typeof given.f === "object" ? given.f : {},
  };
  emit(before);
}

export const wanted = (filter: Filter = state.filter): Wanted => subject.selections.length ? { ...filter, selection: state.selection, ...(state.cut ? { cut: state.cut } : {}) } : { ...filter };
export const chosen = () => subject.selections[state.selection];
