// Colours of steps, clusters, names and scales; those of steps differ in lightness too.

const LIGHT = { kept: "#1f7fa6", none: "#9aa3ab", steps: ["#e08a2c", "#c2413b", "#7b5ea7", "#8a8f3c", "#c4709a", "#6b7680", "#a0673a", "#4e9a78"] };
const DARK = { kept: "#58b4d8", none: "#5d6872", steps: ["#f0a95a", "#e8756b", "#a992d6", "#b9bd6a", "#dc97bb", "#95a1ac", "#c9935f", "#7cc2a2"] };
const NAMES = ["#2f7fb5", "#e0862c", "#3d9a5f", "#c7453f", "#8c6bb8", "#8a6248", "#d16fae", "#6f7b85", "#a8a832", "#3aa5b5", "#5865c8", "#b56a1d", "#7fb06a", "#e2837b", "#b89ad6", "#b08f78", "#efa6d3", "#a4afb8", "#d0cf74", "#8bcfd9", "#9aa3ea", "#e6b071", "#b3d6a5", "#f0b6b1"];
const RAMP: [number, string][] = [[0, "#3b2f77"], [0.25, "#2f6f9f"], [0.5, "#2fa08a"], [0.75, "#9ac43f"], [1, "#f2d33c"]];

export const isDark = (): boolean => {
  const set = document.documentElement.dataset.theme;
  return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
export const tone = () => (isDark() ? DARK : LIGHT);
export const stepColour = (step: number): string => (step < 0 ? tone().kept : tone().steps[step % 8]);
export const seriesColour = (i: number): string => [tone().kept, ...tone().steps][i % 9];
export const nameColour = (i: number): string => NAMES[i % NAMES.length];

function rgb(hex: string): [number, number, number] {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

export function rampColour(at: number): string {
  const i = Math.max(1, RAMP.findIndex(([where]) => where >= at));
  const [a, from] = RAMP[i - 1], [b, to] = RAMP[i], t = (at - a) / (b - a);
  const mixed = rgb(from).map((one, k) => Math.round(one + t * (rgb(to)[k] - one)));
  return `#${mixed.map((one) => one.toString(16).padStart(2, "0")).join("")}`;
}

// 256 colours as RGBA; the last one is for rows without a colour.
export function palette(colour: (code: number) => string | null): Uint8Array {
  const made = new Uint8Array(1024);
  for (let code = 0; code < 256; code++) {
    const hex = code === 255 ? null : colour(code);
    made.set([...rgb(hex ?? tone().none), hex ? 255 : 150], 4 * code);
  }
  return made;
}
export const clusterColour = (code: number): string => {
  const hue = (code * 137.508) % 360, light = isDark() ? [0.66, 0.55, 0.75][code % 3] : [0.5, 0.38, 0.6][code % 3];
  const f = (n: number): string => {
    const k = (n + hue / 30) % 12, a = 0.55 * Math.min(light, 1 - light);
    return Math.round(255 * (light - a * Math.max(-1, Math.min(k - 3, 9 - k, 1)))).toString(16).padStart(2, "0");
  };
  return `#${f(0)}${f(8)}${f(4)}`;
};
