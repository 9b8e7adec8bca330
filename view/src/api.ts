// What the server answers. Every address is relative to the page, whose path holds the token.

export interface Step { method: string; short: string; rows_in: number; rows_out: number; reasons: string[]; score: string; cut: number | null; scored: boolean; notes: string[] }
export interface Slider { name: string; help: string; value: string; low: number; high: number; at: number; scale: "linear" | "log"; is_share: boolean }
export interface Chain { rows: number; kept: number; uses: number; steps: Step[] }
export interface Chosen extends Chain { name: string; clusters: boolean; sliders: Slider[] }
export interface Source { name: string; rows: number; pictures: boolean; captions: boolean; keys: boolean; vectors: boolean }
export interface Column { name: string; kind: "number" | "text" | "flag" }
export interface Subject { title: string; sources: Source[]; columns: Column[]; selections: Chosen[]; runs: { name: string; source: number | null }[]; out: string | null }
export interface Twin { row: number; key: string; caption: string; kept: boolean }
export interface Row { row: number; key: string; caption: string; step?: number; score?: number | null; cluster?: number; reason?: string; uses?: number; twin?: Twin; text?: string }
export interface Page { total: number; start: number; rows: Row[] }
export type Cut = [string, string] | null;
export type Wanted = {
  selection?: number; cut?: Cut; kept?: boolean; step?: number; scored?: number; low?: number; high?: number; cluster?: number; clustered?: number;
  search?: string; column?: string; value?: string; least?: number; most?: number; polygon?: [number, number][]; alone?: number; moved?: "in" | "out"; order?: string;
};

type Values = Record<string, string | number | null | undefined>;

function address(name: string, values: Values): string {
  const given = new URLSearchParams();
  for (const [key, value] of Object.entries(values)) if (value !== null && value !== undefined && value !== "") given.set(key, String(value));
  const text = given.toString();
  return `api/${name}${text ? `?${text}` : ""}`;
}

async function checked(response: Response): Promise<Response> {
  if (response.ok) return response;
  const text = await response.text();
  let said = text.trim();
  try { said = JSON.parse(text).error ?? said; } catch { /* plain text */ }
  throw new Error(said || `the server answered ${response.status}`);
}

async function reached(url: string, how: RequestInit): Promise<Response> {
  try { return await fetch(url, how); } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Error("the server does not answer; start thresher view again");
  }
}

export async function get<T>(name: string, values: Values = {}, signal?: AbortSignal): Promise<T> {
  return (await checked(await reached(address(name, values), { signal }))).json();
}

const KINDS: Record<string, new (buffer: ArrayBuffer, offset: number, length: number) => ArrayLike<number>> = {
  i1: Int8Array, u1: Uint8Array, u2: Uint16Array, f4: Float32Array, i4: Int32Array,
};

// A header and arrays, as app.packed writes them.
export async function arrays<H>(name: string, values: Values, signal?: AbortSignal): Promise<{ head: H; arrays: Record<string, any> }> {
  const buffer = await (await checked(await reached(address(name, values), { signal }))).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const made: Record<string, any> = {};
  let offset = 4 + length;
  for (const { name: one, dtype, length: count } of head.arrays) {
    const Kind = KINDS[dtype];
    made[one] = new Kind(buffer, offset, count);
    const bytes = count * Number(dtype.slice(1));
    offset += bytes + ((8 - (bytes % 8)) % 8);
  }
  return { head, arrays: made };
}

export async function save(given: object): Promise<{ path: string; kept: number; rows: number }> {
  const body = JSON.stringify(given);
  return (await checked(await reached("save", { method: "POST", headers: { "content-type": "application/json" }, body }))).json();
}

export const picture = (source: number, row: number, side: 192 | 640 = 192): string => `picture/${source}/${row}/${side}`;
export const asText = (value: object | null | undefined): string | null => (value ? JSON.stringify(value) : null);
