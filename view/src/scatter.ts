// Millions of points on a canvas: 4 bytes of place and 2 of colour each, drawn by WebGL 2, or by the processor without it.

export interface View { x: number; y: number; scale: number } // the middle, and pixels per unit
export type Corner = [number, number];

const VERTEX = `#version 300 es
in vec2 place; in float colour; in float shown;
uniform vec2 middle; uniform vec2 zoom; uniform float size; uniform float layer;
uniform sampler2D palette;
out vec4 tint;
void main() {
  vec2 at = (place * 2.0 - 1.0 - middle) * zoom;
  float here = mod(shown, 2.0) > 0.5 ? 1.0 : 0.0;
  float marked = shown > 1.5 ? 1.0 : 0.0;
  bool draws = here > 0.5 && marked == layer;
  gl_Position = draws ? vec4(at, 0.0, 1.0) : vec4(2.0, 2.0, 2.0, 1.0);
  gl_PointSize = size * (layer > 0.5 ? 1.5 : 1.0);
  tint = texelFetch(palette, ivec2(int(colour * 255.0 + 0.5), 0), 0);
}`;
const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 tint; uniform float opacity; uniform highp float size; out vec4 result;
void main() {
  float edge = size < 3.0 ? 1.0 : 1.0 - smoothstep(0.38, 0.5, distance(gl_PointCoord, vec2(0.5)));
  float alpha = tint.a * opacity * edge;
  result = vec4(tint.rgb * alpha, alpha);
}`;

export class Scatter {
  readonly canvas = document.createElement("canvas");
  view: View = { x: 0, y: 0, scale: 200 };
  frame = 0; // milliseconds that the last drawing took to hand over
  software = false;
  private readonly gl: WebGL2RenderingContext | null;
  private program: WebGLProgram | null = null;
  private readonly buffers: WebGLBuffer[] = [];
  private readonly uniforms = new Map<string, WebGLUniformLocation | null>();
  private palette: Uint8Array = new Uint8Array(1024);
  private codes: Uint8Array = new Uint8Array();
  private shown: Uint8Array = new Uint8Array();
  private points: Uint16Array = new Uint16Array();
  private queued = false;
  private cells: { start: Uint32Array; order: Uint32Array; side: number } | null = null;
  private marked = false;
  onView: () => void = () => undefined;

  constructor(readonly count: number) {
    this.gl = this.canvas.getContext("webgl2", { antialias: false, alpha: true, premultipliedAlpha: true, powerPreference: "high-performance" });
    if (this.gl) this.prepare(this.gl);
    this.canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    this.canvas.addEventListener("webglcontextrestored", () => { if (this.gl) { this.prepare(this.gl); this.setPoints(this.points); this.setCodes(this.codes, this.palette); this.setShown(this.shown); } });
  }

  private prepare(gl: WebGL2RenderingContext): void {
    const info = gl.getExtension("WEBGL_debug_renderer_info");
    this.software = !!info && /swiftshader|llvmpipe|software/i.test(String(gl.getParameter(info.UNMASKED_RENDERER_WEBGL)));
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]] as const) {
      const shader = gl.createShader(kind)!;
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    ["place", "colour", "shown"].forEach((name, i) => gl.bindAttribLocation(program, i, name));
    gl.linkProgram(program);
    this.program = program;
    for (const name of ["middle", "zoom", "size", "layer", "opacity"]) this.uniforms.set(name, gl.getUniformLocation(program, name));
    this.buffers.length = 0;
    for (let i = 0; i < 3; i++) this.buffers.push(gl.createBuffer()!);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  }

  private fill(slot: number, data: Uint16Array | Uint8Array, size: number, type: number): void {
    const gl = this.gl!;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[slot]);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(slot);
    gl.vertexAttribPointer(slot, size, type, slot !== 2, 0, 0);
  }

  setPoints(points: Uint16Array): void {
    this.points = points;
    this.cells = null;
    if (this.gl) this.fill(0, points, 2, this.gl.UNSIGNED_SHORT);
    this.draw();
  }

  // A colour of the palette (256 x RGBA) for each point.
  setCodes(codes: Uint8Array, palette: Uint8Array): void {
    this.codes = codes;
    this.palette = palette;
    if (this.gl) {
      this.fill(1, codes, 1, this.gl.UNSIGNED_BYTE);
      this.gl.texImage2D(this.gl.TEXTURE_2D, 0, this.gl.RGBA, 256, 1, 0, this.gl.RGBA, this.gl.UNSIGNED_BYTE, palette);
    }
    this.draw();
  }

  // 0: not drawn, 1: drawn, 3: drawn on top because it is in the set.
  setShown(shown: Uint8Array): void {
    this.shown = shown;
    this.marked = shown.includes(3);
    if (this.gl) this.fill(2, shown, 1, this.gl.UNSIGNED_BYTE);
    this.draw();
  }

  resize(width: number, height: number): void {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    this.canvas.width = Math.max(1, Math.round(width * ratio));
    this.canvas.height = Math.max(1, Math.round(height * ratio));
    this.draw();
  }

  fit(box: [number, number, number, number] = [-1, -1, 1, 1]): void {
    const width = this.canvas.clientWidth || 400, height = this.canvas.clientHeight || 400;
    const scale = 0.94 * Math.min(width / Math.max(box[2] - box[0], 1e-3), height / Math.max(box[3] - box[1], 1e-3));
    this.view = { x: (box[0] + box[2]) / 2, y: (box[1] + box[3]) / 2, scale: Math.min(scale, 2e5) };
    this.draw();
  }

  toMap(px: number, py: number): Corner {
    return [this.view.x + (px - this.canvas.clientWidth / 2) / this.view.scale, this.view.y - (py - this.canvas.clientHeight / 2) / this.view.scale];
  }

  toScreen(x: number, y: number): Corner {
    return [(x - this.view.x) * this.view.scale + this.canvas.clientWidth / 2, this.canvas.clientHeight / 2 - (y - this.view.y) * this.view.scale];
  }

  pan(dx: number, dy: number): void {
    this.view = { ...this.view, x: this.view.x - dx / this.view.scale, y: this.view.y + dy / this.view.scale };
    this.draw();
  }

  zoom(factor: number, px = this.canvas.clientWidth / 2, py = this.canvas.clientHeight / 2): void {
    const [x, y] = this.toMap(px, py);
    const scale = Math.min(2e5, Math.max(40, this.view.scale * factor));
    this.view = { scale, x: x - (px - this.canvas.clientWidth / 2) / scale, y: y + (py - this.canvas.clientHeight / 2) / scale };
    this.draw();
  }

  placeOf(row: number): Corner | null {
    const x = this.points[2 * row], y = this.points[2 * row + 1];
    return x === 65535 ? null : [(x / 65535) * 2 - 1, (y / 65535) * 2 - 1];
  }

  draw(): void {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => { this.queued = false; const from = performance.now(); this.paint(); this.frame = performance.now() - from; this.onView(); });
  }

  get size(): number {
    const ratio = this.canvas.width / Math.max(this.canvas.clientWidth, 1);
    const spread = (this.canvas.clientWidth * this.canvas.clientHeight) / Math.max(this.count, 1);
    const base = Math.min(this.canvas.clientWidth > 1500 ? 7 : 5, Math.max(1.1, 0.55 * Math.sqrt(spread)));
    const zoomed = Math.sqrt(this.view.scale / Math.max(1, Math.min(this.canvas.clientWidth, this.canvas.clientHeight) / 2));
    return ratio * Math.min(12, base * Math.max(1, zoomed));
  }

  private paint(): void {
    if (!this.canvas.width || this.codes.length !== this.count || this.shown.length !== this.count) return;
    if (!this.gl) { this.paintPixels(); return; }
    const gl = this.gl, program = this.program!;
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(program);
    const at = (name: string) => this.uniforms.get(name) ?? null;
    gl.uniform2f(at("middle"), this.view.x, this.view.y);
    gl.uniform2f(at("zoom"), (2 * this.view.scale) / this.canvas.clientWidth, (2 * this.view.scale) / this.canvas.clientHeight);
    gl.uniform1f(at("size"), this.size);
    for (const layer of this.marked ? [0, 1] : [0]) {
      gl.uniform1f(at("layer"), layer);
      gl.uniform1f(at("opacity"), this.marked && layer === 0 ? 0.18 : this.count > 300_000 ? 0.6 : 0.85);
      gl.drawArrays(gl.POINTS, 0, this.count);
    }
  }

  private paintPixels(): void {
    const context = this.canvas.getContext("2d");
    if (!context) return;
    const { width, height } = this.canvas, image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer), colours = new Uint32Array(this.palette.buffer, this.palette.byteOffset, 256);
    const ratio = width / Math.max(this.canvas.clientWidth, 1), scale = this.view.scale * ratio, wide = Math.max(1, Math.round(this.size));
    for (const layer of this.marked ? [1, 3] : [1]) for (let i = 0; i < this.count; i++) {
      if (this.shown[i] !== layer) continue;
      const px = Math.round((this.points[2 * i] / 32767.5 - 1 - this.view.x) * scale + width / 2);
      const py = Math.round(height / 2 - (this.points[2 * i + 1] / 32767.5 - 1 - this.view.y) * scale);
      let colour = colours[this.codes[i]];
      if (this.marked && layer === 1) colour = (colour & 0xffffff) | 0x30000000;
      for (let dy = 0; dy < wide; dy++) for (let dx = 0; dx < wide; dx++) {
        const x = px + dx, y = py + dy;
        if (x >= 0 && y >= 0 && x < width && y < height) pixels[y * width + x] = colour;
      }
    }
    context.putImageData(image, 0, 0);
  }

  // Points sorted into a grid, to find the one below the pointer.
  private grid(): { start: Uint32Array; order: Uint32Array; side: number } {
    if (this.cells) return this.cells;
    const side = Math.min(512, Math.max(16, Math.round(Math.sqrt(this.count / 4)))), start = new Uint32Array(side * side + 1);
    const cell = (i: number): number => Math.min(side - 1, ((this.points[2 * i] * side) / 65536) | 0) + side * Math.min(side - 1, ((this.points[2 * i + 1] * side) / 65536) | 0);
    for (let i = 0; i < this.count; i++) start[cell(i) + 1]++;
    for (let j = 0; j < side * side; j++) start[j + 1] += start[j];
    const order = new Uint32Array(this.count), next = start.slice();
    for (let i = 0; i < this.count; i++) order[next[cell(i)]++] = i;
    this.cells = { start, order, side };
    return this.cells;
  }

  nearest(px: number, py: number, within = 12): number {
    const { start, order, side } = this.grid(), [x, y] = this.toMap(px, py), reach = within / this.view.scale;
    const low = (v: number): number => Math.max(0, Math.floor(((v - reach + 1) / 2) * side)), high = (v: number): number => Math.min(side - 1, Math.floor(((v + reach + 1) / 2) * side));
    let best = -1, least = reach * reach;
    for (let row = low(y); row <= high(y); row++) for (let column = low(x); column <= high(x); column++) {
      const j = row * side + column;
      for (let k = start[j]; k < start[j + 1]; k++) {
        const i = order[k];
        if (!this.shown[i]) continue;
        const dx = this.points[2 * i] / 32767.5 - 1 - x, dy = this.points[2 * i + 1] / 32767.5 - 1 - y, d = dx * dx + dy * dy;
        if (d < least) { least = d; best = i; }
      }
    }
    return best;
  }
}
