// The web page: uploads images to /v1/files and sends questions to /v1/chat/completions, one request per chosen model.
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer($("canvas"), $("zoom"), $("window"), $("level"));
// the study's images in their order: {id, bitmap, size}, where size is a text; of DICOM also the smallest and largest
// value (range) and as [level, window] the file's window (own), that of the bitmap, and the one that models see (sent)
const views = [];
let asked; // the last question; null for a report
const given = []; // the answers so far, for "Save all answers"
let running = null; // AbortController of the requests in progress

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function showStatus(id, text, isError = false) {
  $(id).textContent = text;
  $(id).classList.toggle("fault", isError);
}

// --- requests to the server ------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    $("entry").hidden = false;
    throw new Error(key ? "The server does not accept this key." : "Enter your API key first.");
  }
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `the server answered with status ${response.status}.`;
  throw new Error(message[0].toUpperCase() + message.slice(1));
}

async function loadPage() {
  try {
    const models = (await (await call("v1/models")).json()).data;
    $("entry").hidden = true;
    showStatus("ask-status", "");
    showModels(models);
    await showReviews((await (await call("v1/reviews")).json()).data);
  } catch (error) {
    showStatus("ask-status", error.message, true);
  }
}

function showModels(models) {
  $("base").textContent = models.find((model) => model.kind === "base")?.id ?? "";
  $("models").replaceChildren(
    ...models.map((model) => {
      const box = make("input", { type: "checkbox", name: "model", value: model.id });
      box.checked = model.kind === "base";
      const task = model.data?.task === "report" ? " (reports)" : "";
      const about = model.recipe
        ? `${model.recipe}, trained on ${model.data?.name ?? "unnamed data"}${task}`
        : "the base without an adapter";
      return make("label", {}, box, make("span", {}, make("strong", {}, model.id), about));
    }),
  );
  $("filter").hidden = models.length < 16;
}

async function showReviews(names) {
  $("reviews").hidden = names.length === 0;
  if (names.length && sessionStorage.getItem("key")) await call("v1/session", { method: "POST" });
  $("review-list").replaceChildren(
    ...names.map((name) =>
      make("li", {}, make("a", { href: `reviews/${encodeURIComponent(name)}`, target: "_blank" }, name)),
    ),
  );
}

$("filter").addEventListener("input", () => {
  const text = $("filter").value.trim().toLowerCase();
  for (const label of $("models").children) {
    const box = label.querySelector("input");
    label.hidden = !box.checked && !box.value.toLowerCase().includes(text);
  }
});

$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  loadPage();
});

// --- images ---------------------------------------------------------------------------------------------------

async function openImages(files) {
  if (!files.length) return;
  deleteViews();
  showStatus("image-status", files.length === 1 ? "Reading the image…" : `Reading ${files.length} images…`);
  try {
    for (const file of files) {
      const form = new FormData();
      form.append("purpose", "vision");
      form.append("file", file, "image"); // not file.name, which may contain a patient's name
      const upload = await (await call("v1/files", { method: "POST", body: form })).json();
      const png = await (await call(`v1/files/${upload.id}/content`)).blob();
      const size = `${upload.width} × ${upload.height}`;
      const own = upload.window;
      views.push({ id: upload.id, bitmap: await createImageBitmap(png), size, range: upload.value_range, own, window: own, sent: own });
    }
    showViews();
  } catch (error) {
    deleteViews();
    showStatus("image-status", error.message, true);
  }
}

function deleteViews() {
  asked = undefined;
  for (const view of views.splice(0)) {
    view.bitmap.close();
    call(`v1/files/${view.id}`, { method: "DELETE" }).catch(() => {});
  }
  showViews();
}

function showViews() {
  const hasViews = views.length > 0;
  $("stage").classList.toggle("full", hasViews);
  for (const id of ["canvas", "controls", "display-note"]) $(id).hidden = !hasViews;
  $("example").hidden = hasViews;
  $("controls").open = matchMedia("(min-width: 40rem)").matches; // on a phone they would push the answer off the screen
  $("views").hidden = views.length < 2;
  $("views").replaceChildren(
    ...views.map((_, index) => {
      const button = make("button", { type: "button", "aria-pressed": "false" }, `View ${index + 1}`);
      button.addEventListener("click", () => showView(index));
      return button;
    }),
  );
  if (hasViews) showView(0);
}

function showView(index) {
  const view = views[index];
  [...$("views").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  const label = views.length > 1 ? `View ${index + 1} of ${views.length}, ` : "Image, ";
  $("canvas").setAttribute("aria-label", `${label}${view.size} pixels`);
  showStatus("image-status", `${label}${view.size} pixels`.replace("Image, ", ""));
  viewer.show(view);
}

// --- window and level of DICOM images ---------------------------------------------------------------------------

const isSame = (first, second) => String(first) === String(second);

function showWindow() {
  const view = viewer.view;
  $("apply").hidden = !view.range || isSame(viewer.window, view.sent);
  $("apply").textContent = asked === undefined ? "Apply: models see this window" : "Apply and ask again";
  const about = isSame(view.sent, view.own) ? ", as its file says" : "";
  $("display-note").textContent = view.range
    ? `The models see this image with window ${round(view.sent[1])} and level ${round(view.sent[0])}${about}. Zoom changes only what you see.`
    : "Zoom, window and level change only what you see. The models receive the original image.";
}

function round(value) {
  return Number(value.toPrecision(6));
}

// Fetches the pixels of the window that the sliders show. While one fetch runs, further moves wait for its end.
async function drawWindow(view) {
  if (!view) return;
  showWindow();
  if (!view.range || view.isLoading) return;
  view.isLoading = true;
  try {
    for (;;) {
      const chosen = viewer.window;
      if (viewer.view !== view || isSame(chosen, view.window)) return;
      const query = chosen.map((value) => `window=${value}`).join("&");
      const png = await (await call(`v1/files/${view.id}/content?${query}`)).blob();
      const old = view.bitmap;
      [view.bitmap, view.window] = [await createImageBitmap(png), chosen];
      old.close();
      if (viewer.view === view) viewer.draw();
    }
  } catch (error) {
    showStatus("image-status", error.message, true);
  } finally {
    view.isLoading = false;
  }
}

for (const id of ["window", "level"]) $(id).addEventListener("input", () => drawWindow(viewer.view));
$("apply").addEventListener("click", () => {
  const view = viewer.view;
  view.sent = viewer.window;
  showWindow();
  if (asked !== undefined) ask(asked);
});

$("file").addEventListener("change", () => {
  openImages([...$("file").files]);
  $("file").value = "";
});
$("example").addEventListener("click", async () => openImages([await (await call("example.png")).blob()]));
$("another").addEventListener("click", () => $("file").click());
$("reset").addEventListener("click", () => viewer.reset());
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("stage").classList.remove("over");
  });
}
document.addEventListener("drop", (event) => openImages([...(event.dataTransfer?.files ?? [])]));
document.addEventListener("paste", (event) => openImages([...(event.clipboardData?.files ?? [])]));

// --- questions ------------------------------------------------------------------------------------------------

async function ask(question) {
  const models = [...document.querySelectorAll("[name=model]:checked")].map((box) => box.value);
  const missing = [
    [!views.length, "Choose an image first.", "file"],
    [!models.length, "Choose a model first.", "models"],
    [question === "", "Write a question, or ask for a report.", "question"],
  ].find(([isMissing]) => isMissing);
  if (missing) {
    showStatus("ask-status", missing[1], true);
    $(missing[2]).focus();
    return;
  }
  running?.abort();
  const controller = (running = new AbortController());
  setBusy(true);
  asked = question;
  showWindow();
  showStatus("ask-status", models.length === 1 ? "Waiting for the answer…" : `Waiting for ${models.length} answers…`);
  const { block, cards } = answerBlock(question, models);
  $("answers").prepend(block);
  block.scrollIntoView({ block: "nearest" });
  const answers = await Promise.all(models.map((model, i) => answer(model, question, cards[i], controller.signal)));
  const texts = answers.filter((text) => text !== null);
  block.querySelector("p").textContent = question === null ? "" : agreement(texts);
  if (running === controller) {
    setBusy(false);
    const done = texts.length === 1 ? "Answered." : `${texts.length} answers.`;
    showStatus("ask-status", controller.signal.aborted ? "Stopped." : done);
  }
}

function setBusy(isBusy) {
  $("stop").hidden = !isBusy;
  $("ask-button").disabled = $("report").disabled = isBusy;
}

function answerBlock(question, models) {
  const cards = models.map((model) => {
    const text = make("p", { class: "text waiting" });
    const facts = make("p", { class: "facts" });
    const copy = make("button", { type: "button", class: "copy", "aria-label": `Copy the answer of ${model}` }, "Copy");
    copy.hidden = !navigator.clipboard; // browsers offer it on https and localhost only
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text.textContent);
      copy.textContent = "Copied";
    });
    return { item: make("li", { class: "card" }, make("h4", {}, model), text, facts, copy), text, facts };
  });
  const list = make("ul", {}, ...cards.map((card) => card.item));
  const heading = make("h3", {}, question ?? "Report");
  const classes = question === null ? "asked reports" : "asked";
  return { block: make("article", { class: classes }, heading, make("p", { class: "small" }), list), cards };
}

async function answer(model, question, card, signal) {
  const content = views.map((view) => {
    const window = isSame(view.sent, view.own) ? {} : { window: view.sent };
    return { type: "image_url", image_url: { url: view.id, ...window } };
  });
  if (question !== null) content.push({ type: "text", text: question });
  const body = { model, stream: true, messages: [{ role: "user", content }] };
  let text = "";
  try {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(body), signal };
    for await (const event of events(await call("v1/chat/completions", options))) {
      if (event.error) throw new Error(event.error.message);
      text += event.choices[0]?.delta.content ?? event.choices[0]?.delta.refusal ?? "";
      card.text.textContent = text;
      if (event.normtune) {
        showFacts(card, event.normtune, event.choices[0].finish_reason);
        given.push({ model, question, answer: text, finish_reason: event.choices[0].finish_reason, ...event.normtune });
      }
    }
    $("export").hidden = given.length === 0;
    if (!text.trim()) card.text.textContent = "(empty answer)";
    return text;
  } catch (error) {
    const stopped = error.name === "AbortError";
    card.text.textContent = stopped ? "Stopped." : error.message;
    card.text.classList.toggle("fault", !stopped);
    return null;
  } finally {
    card.text.classList.remove("waiting");
  }
}

// Yields the JSON of each server-sent event. A chunk of the response may end in the middle of an event.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

function showFacts(card, facts, reason) {
  const words = [];
  if (facts.confidence !== null) {
    const share = Math.round(facts.confidence * 100);
    card.facts.append(bar(share));
    words.push(`confidence ${share}%`);
  }
  if (reason === "length") words.push("cut off at the token limit");
  if (facts.question_tokens_cut) words.push(`the last ${facts.question_tokens_cut} tokens of the question were not read`);
  const windows = facts.windows.filter((window) => window !== null);
  words.push(...windows.map(([level, width]) => `window ${round(width)}, level ${round(level)}`));
  words.push(`${facts.seconds.toFixed(facts.seconds < 10 ? 2 : 0)} s`);
  card.facts.append(make("span", {}, words.join(" · ")));
}

// A horizontal bar: share is in percent.
function bar(share) {
  const part = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const svg = part("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(part("rect", { class: "track", width: 100, height: 6 }));
  svg.append(part("rect", { class: "fill", width: share, height: 6 }));
  return svg;
}

function agreement(answers) {
  if (answers.length < 2) return "";
  const normalise = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trim();
  const distinct = new Set(answers.map(normalise)).size;
  if (distinct === 1) return answers.length === 2 ? "Both answers are the same." : `All ${answers.length} answers are the same.`;
  return answers.length === 2 ? "The two answers differ." : `${distinct} different answers among ${answers.length}.`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask($("question").value.trim());
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("report").addEventListener("click", () => ask(null));
$("export").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([JSON.stringify(given, null, 2)], { type: "application/json" }));
  make("a", { href: url, download: "answers.json" }).click();
  URL.revokeObjectURL(url);
});
$("stop").addEventListener("click", () => running?.abort());

loadPage();
