// Builds the page into src/thresher/viewer/static: the same source gives the same bytes.
// "node build.mjs --out DIR" writes elsewhere, to compare.
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const at = process.argv.indexOf("--out");
const out = at > 0 ? process.argv[at + 1] : join(here, "..", "src", "thresher", "viewer", "static");
mkdirSync(out, { recursive: true });

await build({
  absWorkingDir: here,
  entryPoints: { app: "src/main.ts", "app-style": "src/style.css" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "esm",
  target: ["es2022"],
  charset: "ascii",
  legalComments: "none",
  logLevel: "warning",
});
for (const name of ["index.html", "icon.svg"]) writeFileSync(join(out, name), readFileSync(join(here, "src", name)));

// What the files were built from; a test compares it with the source without needing node.
const names = ["build.mjs", "package-lock.json", "package.json", "tsconfig.json"];
names.push(...readdirSync(join(here, "src")).map((name) => `src/${name}`));
const hash = createHash("sha256");
for (const name of names.sort()) hash.update(`${name}\0`).update(readFileSync(join(here, name))).update("\0");
writeFileSync(join(out, "source.txt"), `${hash.digest("hex")}\n`);
