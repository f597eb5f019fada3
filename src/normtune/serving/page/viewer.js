// Shows an image on a canvas with zoom, position, window and level. These affect only the display; none of it is sent.
// A DICOM image has sliders in the units of its values, and the page asks the server for its pixels in a window.

export class Viewer {
  constructor(canvas, zoom, window, level) {
    this.canvas = canvas;
    this.sliders = { zoom, window, level };
    this.view = null; // {bitmap, range, own, window}; see `views` in page.js
    this.centre = [0.5, 0.5]; // of the visible area, as fractions of the image's width and height
    for (const slider of Object.values(this.sliders)) slider.addEventListener("input", () => this.draw());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("pointermove", (event) => this.#drag(event));
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  show(view) {
    this.view = view;
    const [low, high] = view.range ?? [0, 255];
    const [level, width] = view.own ?? [low, 0];
    const limits = {
      window: [view.range ? 1 : 2, Math.max(high - low + 1, width)],
      level: [Math.min(low, level), Math.max(high, level)],
    };
    for (const [name, [min, max]] of Object.entries(limits)) Object.assign(this.sliders[name], { min, max, step: "any" });
    this.#set(view.window);
  }

  reset() {
    this.#set(this.view?.own);
  }

  // [level, window] of the sliders: whole numbers if the values have a wide range, and exactly the file's where it is.
  get window() {
    const [low, high] = this.view?.range ?? [0, 255];
    return ["level", "window"].map((name, index) => {
      const value = Number(this.sliders[name].value);
      if (value === this.view?.own?.[index]) return value;
      return high - low >= 64 ? Math.round(value) : Number(value.toPrecision(4));
    });
  }

  #set(window) {
    this.sliders.zoom.value = 1;
    [this.sliders.level.value, this.sliders.window.value] = window ?? [128, 256];
    this.centre = [0.5, 0.5];
    this.sliders.level.dispatchEvent(new Event("input")); // draws the view; the page fetches its window
  }

  draw() {
    const zoom = Number(this.sliders.zoom.value);
    const [level, width] = this.window;
    for (const [name, text] of [["zoom", `${zoom}×`], ["window", width], ["level", level]]) {
      document.getElementById(`${name}-value`).textContent = text;
    }
    this.canvas.classList.toggle("moving", zoom > 1);
    const ratio = globalThis.devicePixelRatio || 1;
    const size = [this.canvas.clientWidth * ratio, this.canvas.clientHeight * ratio].map(Math.round);
    const bitmap = this.view?.bitmap;
    if (!bitmap || size[0] === 0 || size[1] === 0) return;
    [this.canvas.width, this.canvas.height] = size;
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    const scale = Math.min(size[0] / bitmap.width, size[1] / bitmap.height) * zoom;
    this.drawnSize = [bitmap.width * scale, bitmap.height * scale];
    const corner = [0, 1].map((axis) => {
      const fraction = size[axis] / this.drawnSize[axis]; // the fraction of the image that fits
      const half = Math.min(fraction / 2, 0.5);
      this.centre[axis] = Math.min(Math.max(this.centre[axis], half), 1 - half);
      return size[axis] / 2 - this.centre[axis] * this.drawnSize[axis];
    });
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, ...corner, ...this.drawnSize);
    if (!this.view.range && (width !== 256 || level !== 128)) this.#window(context, size, width, level);
  }

  // Applies window and level: values below the window become black, values above it white.
  #window(context, size, width, level) {
    const table = Uint8ClampedArray.from({ length: 256 }, (_, value) => ((value - level) / width + 0.5) * 255);
    const pixels = context.getImageData(0, 0, ...size);
    const values = pixels.data;
    for (let i = 0; i < values.length; i += 4) {
      if (values[i + 3] === 0) continue; // outside the image
      values[i] = table[values[i]];
      values[i + 1] = table[values[i + 1]];
      values[i + 2] = table[values[i + 2]];
    }
    context.putImageData(pixels, 0, 0);
  }

  #zoom(factor) {
    const slider = this.sliders.zoom;
    slider.value = Number(slider.value) * factor;
    this.draw();
  }

  #move(across, down) {
    this.centre = [this.centre[0] + across, this.centre[1] + down];
    this.draw();
  }

  #key(event) {
    const step = 0.1 / Number(this.sliders.zoom.value);
    const action = {
      "+": () => this.#zoom(1.25),
      "=": () => this.#zoom(1.25),
      "-": () => this.#zoom(0.8),
      0: () => this.reset(),
      ArrowLeft: () => this.#move(-step, 0),
      ArrowRight: () => this.#move(step, 0),
      ArrowUp: () => this.#move(0, -step),
      ArrowDown: () => this.#move(0, step),
    }[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  }

  #wheel(event) {
    if (!event.ctrlKey) return; // without Ctrl the page scrolls; a pinch on a touchpad sets ctrlKey
    event.preventDefault();
    this.#zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1);
  }

  #drag(event) {
    if (!event.buttons || !this.drawnSize || Number(this.sliders.zoom.value) === 1) return;
    const ratio = globalThis.devicePixelRatio || 1;
    this.#move((-event.movementX * ratio) / this.drawnSize[0], (-event.movementY * ratio) / this.drawnSize[1]);
  }
}
