// Elements are made of plain values only: texts are text nodes, never HTML, whatever they contain.

export type Child = Node | string | number | null | undefined | false | Child[];
type Props = Record<string, unknown>;

function fill(element: Element, children: Child[]): void {
  for (const child of children) {
    if (Array.isArray(child)) fill(element, child);
    else if (child instanceof Node) element.append(child);
    else if (child !== null && child !== undefined && child !== false) element.append(String(child));
  }
}

function assign(element: HTMLElement | SVGElement, props: Props): void {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value as EventListener);
    else if (name === "style") for (const [key, one] of Object.entries(value as Record<string, string>)) element.style.setProperty(key, one);
    else if (name === "value" || name === "checked") (element as unknown as Props)[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
}

export function h<K extends keyof HTMLElementTagNameMap>(tag: K, props?: Props | null, ...children: Child[]): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  if (props) assign(element, props);
  fill(element, children);
  return element;
}

export function svg(tag: string, props?: Props | null, ...children: Child[]): SVGElement {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  if (props) assign(element, props);
  fill(element, children);
  return element;
}

// Keeps the focus, which would go to the start of the page with what is removed: the same element has it again, else
// the new control of the same name, else what surrounds them.
export function replace(element: Element, ...children: Child[]): void {
  const held = document.activeElement as HTMLElement | null;
  const inside = held !== null && held !== element && element.contains(held);
  const name = inside && nameOf(held);
  element.replaceChildren();
  fill(element, children);
  if (!inside || element.contains(document.activeElement)) return;
  const controls = [...element.querySelectorAll<HTMLElement>("input, select, button, summary, a")];
  const next = element.contains(held) ? held : controls.find((one) => nameOf(one) === name);
  (next ?? element.closest<HTMLElement>("[tabindex]"))?.focus({ preventScroll: true });
}

function nameOf(control: Element): string {
  const text = control.getAttribute("aria-label") ?? (control as HTMLInputElement).labels?.[0]?.textContent ?? control.textContent;
  return `${control.tagName} ${text}`;
}

let ids = 0;
export const unique = (name: string): string => `${name}-${++ids}`;

// Text from data: its direction is its own and does not reach into the text around it.
export const data = (text: string, props: Props = {}): HTMLElement => h("bdi", { dir: "auto", ...props }, text);

export function labelled(label: string, control: HTMLElement, props: Props = {}): HTMLElement {
  if (!control.id) control.id = unique("field");
  return h("div", { class: "field", ...props }, h("label", { for: control.id }, label), control);
}

export function choice(options: [string, string][], value: string, onchange: (value: string) => void, props: Props = {}): HTMLSelectElement {
  const made = h("select", { ...props, onchange: () => onchange(made.value) },
    options.map(([key, text]) => h("option", { value: key, selected: key === value }, text)));
  return made;
}

export function segments(label: string, options: [string, string][], value: string, onchange: (value: string) => void): HTMLElement {
  const name = unique("segment");
  return h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, label),
    options.map(([key, text]) => {
      const input = h("input", { type: "radio", name, value: key, checked: key === value, onchange: () => onchange(key) });
      return h("label", null, input, h("span", null, text));
    }));
}

export const number = (value: number): string => value.toLocaleString("en-US");

// A number with some decimals, rounded as Python does it, so that the page shows the numbers of reports: of 19.25, half
// way between two, the one with the even digit, 19.2. toFixed alone would give 19.3.
export function fixed(value: number, digits: number): string {
  const rounded = value.toFixed(digits);
  const exact = value.toFixed(digits + 30);
  if (!/^50*$/.test(exact.slice(-30))) return rounded;
  const down = exact.slice(0, digits ? -30 : -31);
  return Number(down.slice(-1)) % 2 ? rounded : down;
}

// A share, as percent() in runtime/format.py has it: a part is never 0%, and an incomplete part never 100%.
export function percent(part: number, whole: number, digits = 1): string {
  if (!whole) return "-";
  const value = part / whole;
  const least = 10 ** -(digits + 2);
  if (value > 0 && value < least) return `<${fixed(100 * least, digits)}%`;
  if (value < 1 && value > 1 - least) return `>${fixed(100 - 100 * least, digits)}%`;
  return `${fixed(100 * value, digits)}%`;
}
export function decimal(value: number | null | undefined, digits = 4): string {
  if (value === null || value === undefined) return "-";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return number(value);
  return Math.abs(value) >= 1e6 || (value !== 0 && Math.abs(value) < 1e-4) ? value.toPrecision(4) : fixed(value, digits);
}
export const counted = (count: number, noun: string): string => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

// A message that is read aloud.
let live: HTMLElement | null = null;
export function say(text: string): void {
  live ??= document.body.appendChild(h("div", { class: "hidden", role: "status", "aria-live": "polite" }));
  live.textContent = text;
}

export function problem(error: unknown): HTMLElement {
  const text = error instanceof Error ? error.message : String(error);
  return h("p", { class: "problem", role: "alert" }, text);
}

export function once<T extends unknown[]>(wait: number, work: (...given: T) => void): (...given: T) => void {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = window.setTimeout(() => work(...given), wait);
  };
}
