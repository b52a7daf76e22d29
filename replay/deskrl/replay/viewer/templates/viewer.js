// Left and right arrow step through an episode; a changed filter applies at once; a list says when newer episodes ended.
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
document.querySelector(".film .current")?.scrollIntoView({ block: "nearest", inline: "center" });
const fresh = document.querySelector(".fresh");
if (fresh) {
  setInterval(async () => {
    const pulse = await fetch("/pulse").catch(() => null);
    const num = pulse?.ok ? Number(await pulse.text()) - Number(fresh.dataset.newest) : 0;
    fresh.hidden = num <= 0;
    fresh.textContent = `${num} more have ended since`;
  }, 3000);
}
