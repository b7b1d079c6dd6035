// Renders what the Markdown extension "arithmatex" marked as mathematics, with the KaTeX beside this file,
// and makes what is too wide for the screen narrower.
const tooWide = (element) => element.scrollWidth > element.clientWidth + 1;

function showEquation(element) {
  const marked = element.textContent.trim(); // \( inline \) or \[ display \]
  element.dataset.tex = marked.slice(2, -2);
  katex.render(element.dataset.tex, element, { displayMode: marked.startsWith("\\[") });
}

function fitEquation(element) {
  if (!tooWide(element)) return;
  // Display equations have one line. The same symbols in running text may break after an operator,
  // and equations that stood side by side go below each other.
  const tex = "\\displaystyle " + element.dataset.tex.replaceAll("\\qquad", "\\\\");
  katex.render(tex, element, { displayMode: false });
  element.classList.add("broken");
  let size = parseFloat(getComputedStyle(element).fontSize);
  // Text does not shrink in proportion, so its size is tried.
  while (tooWide(element) && size > 6) element.style.fontSize = `${(size -= 0.5)}px`;
}

// Sentences in four columns of a phone have one word a line.
function squeezed(table, columns) {
  const sentences = [...table.querySelectorAll("td:not(:first-child)")].some((cell) => cell.textContent.length > 30);
  return columns > 3 && sentences && document.documentElement.clientWidth < 600;
}

// The browser gives a column of long sentences no more room than one of names, which cannot break. With the room that
// it needs, a table that is too wide becomes a list below.
function widenSentences(table, columns) {
  if (document.documentElement.clientWidth < 600) return;
  for (let i = 0; i < columns; i++) {
    const long = [...table.querySelectorAll(`td:nth-child(${i + 1})`)].some((cell) => cell.textContent.length > 200);
    if (long) table.rows[0].cells[i].style.minWidth = "17em";
  }
}

// A table of many columns gets smaller letters on a phone. If it does not fit even so, each row becomes a list of its
// entries, each behind its heading; sentences do so at once.
function fitTable(table) {
  const headings = [...table.querySelectorAll("th")].map((heading) => heading.textContent.trim());
  const around = table.closest(".md-typeset__scrollwrap") ?? document.documentElement;
  widenSentences(table, headings.length);
  table.toggleAttribute("data-small", headings.length > 5 || tooWide(around));
  if (!tooWide(around) && !squeezed(table, headings.length)) return;
  table.classList.add("stacked");
  for (const row of table.tBodies[0].rows) {
    const number = /^[\d.,]+$/.test(row.cells[0].textContent); // says nothing without its heading
    [...row.cells].forEach((cell, i) => { cell.dataset.heading = i || number ? headings[i] : ""; });
  }
}

// A click on a heading sorts the table by that column, a second one the other way round.
function makeSortable(table) {
  const text = (row, i) => row.cells[i].textContent.trim();
  [...table.querySelectorAll("th")].forEach((heading, i) => {
    let direction = 1;
    heading.title = "Sort by this column";
    heading.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => direction * text(a, i).localeCompare(text(b, i), "en", { numeric: true }));
      table.tBodies[0].append(...rows);
      direction = -direction;
    });
  });
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".arithmatex").forEach(showEquation);
  // Until its fonts are there, an equation has another width.
  document.fonts.ready.then(() => document.querySelectorAll("div.arithmatex").forEach(fitEquation));
});
window.addEventListener("load", () => {
  document.querySelectorAll(".md-typeset table").forEach(fitTable);
  document.querySelectorAll(".md-typeset .sortable table").forEach(makeSortable);
});
