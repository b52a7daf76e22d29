// Arrow keys step through an episode, a changed filter applies immediately, a list shows how many episodes ended since it was loaded, and
// the live desktops are refreshed.
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
const live = document.querySelector("#live");
const stale = document.querySelector("#stale");
async function refreshLive() {
  for (let shown = ""; !document.querySelector("#over"); ) {
    await new Promise((resume) => setTimeout(resume, 1000));
    const response = await fetch("/live/desktops").catch(() => null);
    stale.hidden = response?.ok === true;
    const html = response?.ok ? await response.text() : shown;
    if (html === shown) continue;
    shown = html;
    const next = document.createElement("div");
    next.innerHTML = html;
    // Images that are loaded before they are shown do not flicker.
    await Promise.all([...next.querySelectorAll("img")].map((image) => { image.loading = "eager"; return image.decode().catch(() => {}); }));
    live.replaceChildren(...next.children);
  }
}
if (live) refreshLive();
