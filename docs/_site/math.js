// Renders what the Markdown extension "arithmatex" marked as mathematics, with the KaTeX beside this file.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const marked = element.textContent.trim(); // \( inline \) or \[ display \]
    katex.render(marked.slice(2, -2), element, {
      displayMode: marked.startsWith("\\["),
      throwOnError: true,
    });
  }
});
