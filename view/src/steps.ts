// The step that dropped each row, -1 for kept ones, of the selection and the cut that are looked at.
import { arrays, asText, type Chain, type Cut, type Slider } from "./api";
import { state } from "./state";

export interface CutHead extends Chain { sliders: Slider[] }

let last: { key: string; made: Promise<{ head: CutHead; steps: Int8Array }> } | null = null;

export function cutOf(selection = state.selection, cut: Cut = state.cut): Promise<{ head: CutHead; steps: Int8Array }> {
  const key = JSON.stringify([selection, cut]);
  if (last?.key === key) return last.made;
  const made = arrays<CutHead>("cut", { selection, cut: asText(cut) }).then(({ head, arrays: got }) => ({ head, steps: got.steps as Int8Array }));
  const mine = { key, made };
  last = mine;
  made.catch(() => { if (last === mine) last = null; });
  return made;
}

export const stepsOf = async (): Promise<Int8Array> => (await cutOf()).steps;
