// An image on a canvas: zoom, position, window and level. What it shows is for the eye; nothing of it is sent.

export class Viewer {
  constructor(canvas, zoom, window, level) {
    this.canvas = canvas;
    this.sliders = { zoom, window, level };
    this.bitmap = null;
    this.centre = [0.5, 0.5]; // of what is shown, as shares of the image
    for (const slider of Object.values(this.sliders)) slider.addEventListener("input", () => this.draw());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("pointermove", (event) => this.#drag(event));
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  show(bitmap) {
    this.bitmap = bitmap;
    this.reset();
  }

  reset() {
    this.sliders.zoom.value = 1;
    this.sliders.window.value = 256;
    this.sliders.level.value = 128;
    this.centre = [0.5, 0.5];
    this.draw();
  }

  draw() {
    const [zoom, width, level] = ["zoom", "window", "level"].map((name) => Number(this.sliders[name].value));
    for (const [name, text] of [["zoom", `${zoom}×`], ["window", width], ["level", level]]) {
      document.getElementById(`${name}-value`).textContent = text;
    }
    this.canvas.classList.toggle("moving", zoom > 1);
    const ratio = globalThis.devicePixelRatio || 1;
    const size = [this.canvas.clientWidth * ratio, this.canvas.clientHeight * ratio].map(Math.round);
    if (!this.bitmap || size[0] === 0 || size[1] === 0) return;
    [this.canvas.width, this.canvas.height] = size;
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    const scale = Math.min(size[0] / this.bitmap.width, size[1] / this.bitmap.height) * zoom;
    this.shown = [this.bitmap.width * scale, this.bitmap.height * scale];
    const corner = [0, 1].map((axis) => {
      const room = size[axis] / this.shown[axis]; // the share of the image that fits
      const half = Math.min(room / 2, 0.5);
      this.centre[axis] = Math.min(Math.max(this.centre[axis], half), 1 - half);
      return size[axis] / 2 - this.centre[axis] * this.shown[axis];
    });
    context.imageSmoothingQuality = "high";
    context.drawImage(this.bitmap, ...corner, ...this.shown);
    if (width !== 256 || level !== 128) this.#window(context, size, width, level);
  }

  // Grey values through a window: below its lower end black, above its upper end white.
  #window(context, size, width, level) {
    const table = Uint8ClampedArray.from({ length: 256 }, (_, value) => ((value - level) / width + 0.5) * 255);
    const pixels = context.getImageData(0, 0, ...size);
    const values = pixels.data;
    for (let i = 0; i < values.length; i += 4) {
      if (values[i + 3] === 0) continue; // beside the image
      values[i] = table[values[i]];
      values[i + 1] = table[values[i + 1]];
      values[i + 2] = table[values[i + 2]];
    }
    context.putImageData(pixels, 0, 0);
  }

  #zoom(by) {
    const slider = this.sliders.zoom;
    slider.value = Number(slider.value) * by;
    this.draw();
  }

  #move(across, down) {
    this.centre = [this.centre[0] + across, this.centre[1] + down];
    this.draw();
  }

  #key(event) {
    const step = 0.1 / Number(this.sliders.zoom.value);
    const act = {
      "+": () => this.#zoom(1.25),
      "=": () => this.#zoom(1.25),
      "-": () => this.#zoom(0.8),
      0: () => this.reset(),
      ArrowLeft: () => this.#move(-step, 0),
      ArrowRight: () => this.#move(step, 0),
      ArrowUp: () => this.#move(0, -step),
      ArrowDown: () => this.#move(0, step),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  }

  #wheel(event) {
    if (!event.ctrlKey) return; // the page scrolls; two fingers or Ctrl zoom
    event.preventDefault();
    this.#zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1);
  }

  #drag(event) {
    if (!event.buttons || !this.shown || Number(this.sliders.zoom.value) === 1) return;
    const ratio = globalThis.devicePixelRatio || 1;
    this.#move((-event.movementX * ratio) / this.shown[0], (-event.movementY * ratio) / this.shown[1]);
  }
}
