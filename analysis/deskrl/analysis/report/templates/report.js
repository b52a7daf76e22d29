// Enlarges a screenshot. The left and right arrow keys step through its episode; a click or Escape closes it.
const dialog = document.querySelector("dialog");
let shown = null;
function show(frame) {
  shown = frame;
  dialog.replaceChildren(...[...frame.children].map((child) => child.cloneNode(true)));
  if (!dialog.open) dialog.showModal();
}
document.querySelectorAll(".frames .screen").forEach((screen) => {
  screen.addEventListener("click", () => show(screen.parentElement));
});
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", (event) => {
  const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (next && shown[next]) show(shown[next]);
});
