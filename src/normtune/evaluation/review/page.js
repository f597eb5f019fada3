"use strict";
(() => {
  const form = document.querySelector(".filters");
  const list = document.getElementById("list");
  const status = document.getElementById("status");
  const none = document.getElementById("none");
  const written = (item) => [...item.querySelectorAll("h3, .id, .text")].map((part) => part.textContent);
  const rows = [...list.children].map((item, place) => ({
    item, place, ...JSON.parse(item.dataset.facts), words: written(item).join("\n").toLowerCase(),
  }));

  // an outcome is a word and a run's number; rights are counted over the runs
  const fits = {
    right: (row, run) => row.value[run] === 1,
    wrong: (row, run) => row.value[run] !== 1,
    "only-right": (row, run) => row.value[run] === 1 && row.value.filter((value) => value === 1).length === 1,
    "only-wrong": (row, run) => row.value[run] !== 1 && row.value.filter((value) => value !== 1).length === 1,
    gain: (row, run) => row.value[run] > row.value[0],
    loss: (row, run) => row.value[run] < row.value[0],
    some: (row) => row.value.some((value) => value !== 1),
    all: (row, which) => row.value.every((value) => (value === 1) === (which === "right")),
  };
  const measured = {
    score: (row, run) => row.score[run],
    value: (row, run) => row.value[run],
    gain: (row, run) => row.value[run] - row.value[0],
  };

  function narrow() {
    const text = form.elements.text.value.trim().toLowerCase();
    const [outcome, run] = (form.elements.outcome?.value || "").split(" ");
    const strata = [...form.querySelectorAll("[data-field]")].filter((select) => select.value);
    let left = 0;
    for (const row of rows) {
      const shown = (!text || row.words.includes(text))
        && (!outcome || fits[outcome](row, run))
        && strata.every((select) => (row.strata[select.dataset.field] || []).includes(select.value));
      row.item.hidden = !shown;
      left += shown;
    }
    status.textContent = left === rows.length ? `${left} rows` : `${left} of ${rows.length} rows`;
    none.hidden = left > 0;
  }

  function order() {
    const [way, what, run] = (form.elements.order?.value || "").split(" ");
    const sign = way === "down" ? -1 : 1;
    const found = [...rows].sort((a, b) => {
      if (!what) return a.place - b.place;
      const [first, second] = [measured[what](a, run), measured[what](b, run)];
      if (first === null || second === null) return (first === null) - (second === null) || a.place - b.place;
      return sign * (first - second) || a.place - b.place;
    });
    list.append(...found.map((row) => row.item));
  }

  form.hidden = false;
  form.addEventListener("input", (event) => {
    if (event.target.name === "order") order();
    else narrow();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { narrow(); order(); }));
  narrow(); // a browser may have kept the form as it was left
  order();

  const dialog = document.querySelector("dialog");
  const large = dialog.querySelector(".large");
  list.addEventListener("click", (event) => {
    const picture = event.target.closest(".picture");
    if (!picture) return;
    large.replaceChildren(picture.firstElementChild.cloneNode(true));
    dialog.showModal();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
})();
