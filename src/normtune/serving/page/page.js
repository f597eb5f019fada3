// The page's script: images go to /v1/files, questions to /v1/chat/completions, one for each chosen model.
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer($("canvas"), $("zoom"), $("window"), $("level"));
const views = []; // {id, name, bitmap}: the study's images, in their order
let running = null; // AbortController of the questions at work

function make(name, attributes = {}, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

function say(where, text, fault = false) {
  $(where).textContent = text;
  $(where).classList.toggle("fault", fault);
}

// --- the server -----------------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("entry").hidden = false;
    throw new Error(key ? "That key is not known here." : "Give your API key first.");
  }
  const told = await answer.json().catch(() => ({}));
  const message = told.error?.message ?? `the server answered with status ${answer.status}.`;
  throw new Error(message[0].toUpperCase() + message.slice(1));
}

async function begin() {
  try {
    const models = (await (await call("v1/models")).json()).data;
    $("entry").hidden = true;
    say("ask-status", "");
    showModels(models);
    await showReviews((await (await call("v1/reviews")).json()).data);
  } catch (error) {
    say("ask-status", error.message, true);
  }
}

function showModels(models) {
  $("base").textContent = models.find((one) => one.kind === "base")?.id ?? "";
  const adapters = models.filter((one) => one.kind === "adapter");
  $("models").replaceChildren(
    ...models.map((one) => {
      const box = make("input", { type: "checkbox", name: "model", value: one.id });
      box.checked = one === (adapters[0] ?? models[0]);
      const tag = one.kind === "base" ? "base" : one.data?.task === "report" ? "reports" : "";
      const about = one.recipe ? `${one.recipe}, trained on ${one.data?.name ?? "unnamed data"}` : "";
      return make("label", { title: about }, box, one.id, ...(tag ? [make("span", {}, tag)] : []));
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
  const wanted = $("filter").value.trim().toLowerCase();
  for (const label of $("models").children) {
    const box = label.querySelector("input");
    label.hidden = !box.checked && !box.value.toLowerCase().includes(wanted);
  }
});

$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  begin();
});

// --- images ---------------------------------------------------------------------------------------------------

async function open(files) {
  if (!files.length) return;
  forgetViews();
  say("image-status", files.length === 1 ? "Reading the image…" : `Reading ${files.length} images…`);
  try {
    for (const file of files) {
      const form = new FormData();
      form.append("purpose", "vision");
      form.append("file", file, "image"); // its own name may be a patient's
      const held = await (await call("v1/files", { method: "POST", body: form })).json();
      const png = await (await call(`v1/files/${held.id}/content`)).blob();
      views.push({ id: held.id, bitmap: await createImageBitmap(png), size: `${held.width} × ${held.height}` });
    }
    showViews();
  } catch (error) {
    forgetViews();
    say("image-status", error.message, true);
  }
}

function forgetViews() {
  for (const one of views.splice(0)) {
    one.bitmap.close();
    call(`v1/files/${one.id}`, { method: "DELETE" }).catch(() => {});
  }
  showViews();
}

function showViews() {
  const there = views.length > 0;
  $("stage").classList.toggle("full", there);
  for (const id of ["canvas", "controls", "display-note"]) $(id).hidden = !there;
  $("views").hidden = views.length < 2;
  $("views").replaceChildren(
    ...views.map((_, index) => {
      const button = make("button", { type: "button", "aria-pressed": "false" }, `View ${index + 1}`);
      button.addEventListener("click", () => show(index));
      return button;
    }),
  );
  if (there) show(0);
}

function show(index) {
  const view = views[index];
  [...$("views").children].forEach((one, i) => one.setAttribute("aria-pressed", String(i === index)));
  const which = views.length > 1 ? `View ${index + 1} of ${views.length}, ` : "Image, ";
  $("canvas").setAttribute("aria-label", `${which}${view.size} pixels`);
  say("image-status", `${which}${view.size} pixels`.replace("Image, ", ""));
  viewer.show(view.bitmap);
}

$("file").addEventListener("change", () => {
  open([...$("file").files]);
  $("file").value = "";
});
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
document.addEventListener("drop", (event) => open([...(event.dataTransfer?.files ?? [])]));
document.addEventListener("paste", (event) => open([...(event.clipboardData?.files ?? [])]));

// --- questions ------------------------------------------------------------------------------------------------

async function ask(question) {
  const models = [...document.querySelectorAll("[name=model]:checked")].map((box) => box.value);
  const missing = [
    [!views.length, "Choose an image first.", "file"],
    [!models.length, "Choose a model first.", "models"],
    [question === "", "Write a question, or ask for a report.", "question"],
  ].find(([is]) => is);
  if (missing) {
    say("ask-status", missing[1], true);
    $(missing[2]).focus();
    return;
  }
  running?.abort();
  const own = (running = new AbortController());
  busy(true);
  say("ask-status", models.length === 1 ? "Waiting for the answer…" : `Waiting for ${models.length} answers…`);
  const { block, cards } = answerBlock(question, models);
  $("answers").prepend(block);
  const answers = await Promise.all(models.map((model, i) => answer(model, question, cards[i], own.signal)));
  const told = answers.filter((text) => text !== null);
  block.querySelector("p").textContent = question === null ? "" : agreement(told);
  if (running === own) {
    busy(false);
    say("ask-status", own.signal.aborted ? "Stopped." : told.length === 1 ? "Answered." : `${told.length} answers.`);
  }
}

function busy(is) {
  $("stop").hidden = !is;
  $("ask-button").disabled = $("report").disabled = is;
}

function answerBlock(question, models) {
  const cards = models.map((model) => {
    const text = make("p", { class: "text waiting" });
    const facts = make("p", { class: "facts" });
    return { item: make("li", { class: "card" }, make("h4", {}, model), text, facts), text, facts };
  });
  const list = make("ul", {}, ...cards.map((one) => one.item));
  const head = make("h3", {}, question ?? "Report");
  const kind = question === null ? "asked reports" : "asked";
  return { block: make("article", { class: kind }, head, make("p", { class: "small" }), list), cards };
}

async function answer(model, question, card, signal) {
  const content = views.map((one) => ({ type: "image_url", image_url: { url: one.id } }));
  if (question !== null) content.push({ type: "text", text: question });
  const body = { model, stream: true, messages: [{ role: "user", content }] };
  let text = "";
  try {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(body), signal };
    for await (const event of events(await call("v1/chat/completions", options))) {
      if (event.error) throw new Error(event.error.message);
      text += event.choices[0]?.delta.content ?? "";
      card.text.textContent = text;
      if (event.normtune) showFacts(card, event.normtune, event.choices[0].finish_reason);
    }
    if (!text.trim()) card.text.textContent = "(no words)";
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

// The JSON of each server-sent event.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

function showFacts(card, own, reason) {
  const words = [];
  if (own.confidence !== null) {
    const share = Math.round(own.confidence * 100);
    card.facts.append(bar(share));
    words.push(`confidence ${share}%`);
  }
  if (reason === "length") words.push("cut at its limit");
  words.push(`${own.seconds.toFixed(own.seconds < 10 ? 2 : 0)} s`);
  card.facts.append(make("span", {}, words.join(" · ")));
}

function bar(share) {
  const part = (name, attributes) => {
    const found = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    return found;
  };
  const svg = part("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(part("rect", { class: "track", width: 100, height: 6 }));
  svg.append(part("rect", { class: "fill", width: share, height: 6 }));
  return svg;
}

function agreement(answers) {
  if (answers.length < 2) return "";
  const plain = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trim();
  const kinds = new Set(answers.map(plain)).size;
  if (kinds === 1) return answers.length === 2 ? "Both answers are the same." : `All ${answers.length} answers are the same.`;
  return answers.length === 2 ? "The two answers differ." : `${kinds} different answers among ${answers.length}.`;
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
$("stop").addEventListener("click", () => running?.abort());

begin();
