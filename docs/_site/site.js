// Renders what the Markdown extension "arithmatex" marked as mathematics, with the KaTeX beside this file,
// and makes what is too wide for the screen narrower.
const tooWide = (element) => element.scrollWidth > element.clientWidth + 1;

function showEquation(element) {
  const marked = element.textContent.trim(); // \( inline \) or \[ display \]
  const tex = marked.slice(2, -2);
  const displayMode = marked.startsWith("\\[");
  katex.render(tex, element, { displayMode });
  if (displayMode && tooWide(element) && tex.includes("\\qquad")) {
    // Equations side by side go below each other.
    const lines = tex.split("\\qquad").join("\\\\[.6em]");
    katex.render(`\\begin{gathered}${lines}\\end{gathered}`, element, { displayMode });
  }
}

// A table of a few columns that does not fit shows each row as a list, each entry under its heading.
function stack(table) {
  const headings = [...table.querySelectorAll("th")].map((heading) => heading.textContent);
  const right = table.getBoundingClientRect().right;
  if (headings.length > 6 || right <= document.documentElement.clientWidth) return;
  table.classList.add("stacked");
  for (const row of table.tBodies[0].rows) {
    [...row.cells].forEach((cell, i) => { cell.dataset.heading = i ? headings[i] : ""; });
  }
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".arithmatex").forEach(showEquation);
});
window.addEventListener("load", () => document.querySelectorAll(".md-typeset table").forEach(stack));
