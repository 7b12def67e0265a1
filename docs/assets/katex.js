// Draws the formulas; without the network they stay as they are written.
function formulas() {
  if (typeof renderMathInElement === "undefined") return;
  renderMathInElement(document.body, {
    delimiters: [{ left: "\\[", right: "\\]", display: true }, { left: "\\(", right: "\\)", display: false }],
  });
}
if (typeof document$ === "undefined") document.addEventListener("DOMContentLoaded", formulas);
else document$.subscribe(formulas);
