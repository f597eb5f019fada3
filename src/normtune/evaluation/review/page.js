"use strict";
(() => {
  const form = document.querySelector(".filters");
  const list = document.getElementById("list");
  const status = document.getElementById("status");
  const none = document.getElementById("none");
  const textsOf = (item) => [...item.querySelectorAll("h3, .id, .text")].map((part) => part.textContent);
  // Each row: its element, its position in the dataset, its facts (strata, value, score) and its text.
  const rows = [...list.children].map((item, position) => ({
    item, position, ...JSON.parse(item.dataset.facts), words: textsOf(item).join("\n").toLowerCase(),
  }));

  // An outcome's key is one of these words and the index of a run; value 1 means a right answer.
  const matchesOutcome = {
    right: (row, run) => row.value[run] === 1,
    wrong: (row, run) => row.value[run] !== 1,
    "only-right": (row, run) => row.value[run] === 1 && row.value.filter((value) => value === 1).length === 1,
    "only-wrong": (row, run) => row.value[run] !== 1 && row.value.filter((value) => value !== 1).length === 1,
    gain: (row, run) => row.value[run] > row.value[0],
    loss: (row, run) => row.value[run] < row.value[0],
    some: (row) => row.value.some((value) => value !== 1),
    all: (row, which) => row.value.every((value) => (value === 1) === (which === "right")),
  };
  // The quantities that rows can be sorted by.
  const quantity = {
    score: (row, run) => row.score[run],
    value: (row, run) => row.value[run],
    gain: (row, run) => row.value[run] - row.value[0],
  };

  function filterRows() {
    const text = form.elements.text.value.trim().toLowerCase();
    const [outcome, run] = (form.elements.outcome?.value || "").split(" ");
    const strata = [...form.querySelectorAll("[data-field]")].filter((select) => select.value);
    let matching = 0;
    for (const row of rows) {
      const matches = (!text || row.words.includes(text))
        && (!outcome || matchesOutcome[outcome](row, run))
        && strata.every((select) => (row.strata[select.dataset.field] || []).includes(select.value));
      row.item.hidden = !matches;
      matching += matches;
    }
    status.textContent = matching === rows.length ? `${matching} rows` : `${matching} of ${rows.length} rows`;
    none.hidden = matching > 0;
  }

  function sortRows() {
    const [direction, name, run] = (form.elements.order?.value || "").split(" ");
    const sign = direction === "down" ? -1 : 1;
    const sorted = [...rows].sort((a, b) => {
      if (!name) return a.position - b.position;
      const [first, second] = [quantity[name](a, run), quantity[name](b, run)];
      // Rows without the quantity come last in either direction.
      if (first === null || second === null) return (first === null) - (second === null) || a.position - b.position;
      return sign * (first - second) || a.position - b.position;
    });
    list.append(...sorted.map((row) => row.item));
  }

  form.hidden = false; // without a script the filters would do nothing
  form.addEventListener("input", (event) => {
    if (event.target.name === "order") sortRows();
    else filterRows();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { filterRows(); sortRows(); }));
  filterRows(); // a browser may have restored the values of the form
  sortRows();

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
