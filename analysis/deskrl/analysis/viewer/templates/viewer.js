// Arrow keys step through an episode, a changed filter applies immediately, and a list shows how many episodes ended since it was loaded.
document.documentElement.classList.add("scripted");
document.querySelectorAll(".filters [name]").forEach((field) => {
  field.addEventListener("change", () => {
    field.form.querySelectorAll("[name]").forEach((other) => { other.disabled = !other.value; });
    field.form.submit();
  });
});
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select, input")) return;
  const relation = { ArrowRight: "next", ArrowLeft: "prev" }[event.key];
  const link = relation && document.querySelector(`link[rel="${relation}"]`);
  if (link) location.assign(link.href);
});
// Only the film is scrolled: scrollIntoView would scroll the page too, away from the title and the screenshot.
const current = document.querySelector(".film .current");
if (current) {
  const film = current.parentElement;
  film.scrollLeft += current.getBoundingClientRect().left - film.getBoundingClientRect().left - (film.clientWidth - current.clientWidth) / 2;
}
const fresh = document.querySelector(".fresh");
if (fresh) {
  setInterval(async () => {
    const pulse = await fetch("/pulse").catch(() => null);
    const num = pulse?.ok ? Number(await pulse.text()) - Number(fresh.dataset.newest) : 0;
    fresh.hidden = num <= 0;
    fresh.textContent = `${num} new episode${num > 1 ? "s" : ""}`;
  }, 3000);
}
