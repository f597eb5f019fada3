// Shows an image on a canvas with zoom, position, window and level. These affect only the display; none of it is sent.

export class Viewer {
  constructor(canvas, zoom, window, level) {
    this.canvas = canvas;
    this.sliders = { zoom, window, level };
    this.bitmap = null;
    this.centre = [0.5, 0.5]; // of the visible area, as fractions of the image's width and height
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
    this.drawnSize = [this.bitmap.width * scale, this.bitmap.height * scale];
    const corner = [0, 1].map((axis) => {
      const fraction = size[axis] / this.drawnSize[axis]; // the fraction of the image that fits
      const half = Math.min(fraction / 2, 0.5);
      this.centre[axis] = Math.min(Math.max(this.centre[axis], half), 1 - half);
      return size[axis] / 2 - this.centre[axis] * this.drawnSize[axis];
    });
    context.imageSmoothingQuality = "high";
    context.drawImage(this.bitmap, ...corner, ...this.drawnSize);
    if (width !== 256 || level !== 128) this.#window(context, size, width, level);
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
