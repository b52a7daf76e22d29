// Page of `deskrl record`: shows the live screen, and turns gestures on it into actions, one request each.
const $ = (id) => document.getElementById(id);
const headers = { "X-Deskrl-Token": new URLSearchParams(location.search).get("token") };
const screen = $("screen"), keyboard = $("keyboard"), picture = $("picture"), marks = $("marks");
const DRAG_PIXELS = 6, CLICK_MS = 300, WHEEL_MS = 250, TEXT_MS = 900, NOTCH = 100;
let state = { version: 0, phase: "connecting", screen_size: [1280, 720], screen: 0, steps: [] };
let shown = 0;
let problem = ""; // why the last request was refused, until one is accepted
let changed_ms = 0; // time of the last change of what is being waited for

const mayAct = () => state.phase === "playing" && state.player === "person";
const focus = () => keyboard.focus({ preventScroll: true });

// Requests are sent one after another, so that actions keep their order.
let sending = Promise.resolve();
function post(path, body) {
  sending = sending.then(async () => {
    const request = { method: "POST", headers, body: body && JSON.stringify(body), keepalive: true };
    const response = await fetch(path, request).catch(() => null);
    problem = response?.ok ? "" : response ? `Not executed: ${await response.text()}` : "Not executed: deskrl record does not answer.";
    showHint();
  });
}
function act(action) {
  flush();
  if (!mayAct()) return;
  if ("x" in action) mark(action);
  post("/action", action);
}
function showHint() {
  $("hint").textContent = problem || defaultHint();
  $("hint").classList.toggle("problem", problem !== "");
}
function defaultHint() {
  if (state.phase !== "playing") return "";
  const num_s = Math.floor((Date.now() - changed_ms) / 1000), time = num_s > 1 ? ` ${num_s} s` : "";
  if (state.is_acting) return state.num_waiting ? `Executing, ${state.num_waiting} more to come…${time}` : `Executing…${time}`;
  if (state.player === "policy") return `The policy is choosing its next action…${time}`;
  return "Click, drag, scroll and type on the screen. Each becomes one action.";
}

// A gesture in progress (clicks, notches of the wheel, text) becomes an action after a pause, or before the next gesture.
let gesture = null;
function flush() {
  if (!gesture) return;
  const { action, timer } = gesture;
  clearTimeout(timer);
  gesture = null;
  showPending();
  act(action());
}
function begin(kind, pauseMs, values, action) {
  if (gesture?.kind !== kind) { flush(); gesture = { kind, ...values }; }
  clearTimeout(gesture.timer);
  gesture.action = action;
  gesture.timer = setTimeout(flush, pauseMs);
  return gesture;
}
addEventListener("pagehide", flush);
function showPending() {
  const text = (gesture?.kind === "text" ? gesture.text : "") + composed;
  $("pending").hidden = !text;
  $("pending").textContent = text && `typing ${text}▏`;
}

function point(event) {
  const box = screen.getBoundingClientRect(), [width, height] = state.screen_size;
  const inside = (value, size) => Math.min(Math.max(Math.floor(value), 0), size - 1);
  return {
    x: inside(((event.clientX - box.left) * width) / box.width, width),
    y: inside(((event.clientY - box.top) * height) / box.height, height),
  };
}
const distance = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);
function held(event) {
  return ["ctrl", "shift", "alt"].filter((name) => event[`${name}Key`]).concat(event.metaKey ? ["super"] : []);
}
const withKeys = (action, keys) => (keys.length ? { ...action, keys } : action);

function shape(name, attributes, className) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.classList.add(className);
  marks.append(element);
  return element;
}
function mark({ x, y, end_x, end_y }) {
  const ring = shape("circle", { cx: end_x ?? x, cy: end_y ?? y, r: 22 }, "ring");
  ring.addEventListener("animationend", () => ring.remove());
}

let pressed = null;
screen.addEventListener("mousedown", (event) => event.preventDefault()); // the keyboard keeps the focus
screen.addEventListener("pointerdown", (event) => {
  focus();
  if (state.phase === "playing" && state.player === "policy") {
    problem = "The policy has control. Take over to act yourself.";
    showHint();
  }
  if (!mayAct()) return;
  screen.setPointerCapture(event.pointerId);
  const from = point(event);
  pressed = { from, button: event.button, keys: held(event), path: null };
});
screen.addEventListener("pointermove", (event) => {
  if (!pressed || pressed.button !== 0 || distance(pressed.from, point(event)) < DRAG_PIXELS) return;
  const { x, y } = pressed.from, to = point(event);
  pressed.path ??= shape("line", { x1: x, y1: y }, "path");
  pressed.path.setAttribute("x2", to.x);
  pressed.path.setAttribute("y2", to.y);
});
screen.addEventListener("pointercancel", () => { pressed?.path?.remove(); pressed = null; });
screen.addEventListener("pointerup", (event) => {
  if (!pressed) return;
  const { from, button, keys, path } = pressed, to = point(event);
  pressed = null;
  path?.remove();
  if (button === 1 || button === 2) return act(withKeys({ kind: button === 1 ? "middle_click" : "right_click", ...from }, keys));
  if (button !== 0) return;
  if (distance(from, to) >= DRAG_PIXELS) return act(withKeys({ kind: "drag", ...from, end_x: to.x, end_y: to.y }, keys));
  if ($("move").ariaPressed === "true") {
    $("move").ariaPressed = "false";
    return act({ kind: "move", ...from });
  }
  if (gesture?.kind === "click" && distance(gesture.from, from) >= DRAG_PIXELS) flush();
  const clicks = begin("click", CLICK_MS, { num: 0, from, keys }, () => {
    return withKeys({ kind: ["click", "double_click", "triple_click"][clicks.num - 1], ...clicks.from }, clicks.keys);
  });
  clicks.num += 1;
  if (clicks.num === 3) flush();
});
screen.addEventListener("contextmenu", (event) => event.preventDefault());
screen.addEventListener("wheel", (event) => {
  event.preventDefault();
  if (!mayAct()) return;
  const at = point(event);
  const turned = begin("wheel", WHEEL_MS, { x: 0, y: 0, at, keys: held(event) }, () => {
    const notches = (pixels) => Math.min(Math.max(Math.round(pixels / NOTCH) || Math.sign(pixels), -100), 100);
    return withKeys({ kind: "scroll", ...turned.at, scroll_x: notches(turned.x), scroll_y: notches(turned.y) }, turned.keys);
  });
  const unit = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? NOTCH / 3 : 1;
  turned.x += event.deltaX * unit;
  turned.y += event.deltaY * unit;
}, { passive: false });

// Keys go to a field that nobody sees, in which the browser composes characters (dead keys, input methods).
let composed = "";
const COMPOSING = ["Control", "Shift", "Alt", "Meta", "AltGraph", "Dead", "Compose", "Process", "Unidentified"];
keyboard.addEventListener("keydown", (event) => {
  if (event.isComposing || COMPOSING.includes(event.key) || !mayAct()) return;
  const isCommand = (event.ctrlKey || event.altKey || event.metaKey) && !event.getModifierState("AltGraph");
  if (event.key.length === 1 && !isCommand) return; // it arrives as input
  event.preventDefault();
  const typed = gesture?.kind === "text" ? gesture : null;
  if (typed && event.key === "Enter" && !event.shiftKey && !isCommand) {
    addText("\n");
    flush();
  } else if (typed && event.key === "Backspace" && !isCommand) {
    typed.text = [...typed.text].slice(0, -1).join(""); // whole characters
    if (!typed.text) { clearTimeout(typed.timer); gesture = null; }
    showPending();
  } else {
    const key = event.key === " " ? "space" : event.key;
    act({ kind: "hotkey", keys: [...held(event), key] });
  }
});
keyboard.addEventListener("input", (event) => { if (!event.isComposing) takeText(); });
keyboard.addEventListener("compositionupdate", (event) => {
  composed = mayAct() ? event.data : "";
  if (gesture?.kind === "text") clearTimeout(gesture.timer);
  showPending();
});
keyboard.addEventListener("compositionend", () => { composed = ""; takeText(); });
function takeText() {
  const text = keyboard.value;
  keyboard.value = "";
  if (mayAct() && (text || gesture?.kind === "text")) addText(text);
  showPending();
}
function addText(text) {
  const typed = begin("text", TEXT_MS, { text: "" }, () => ({ kind: "type", text: typed.text }));
  typed.text += text;
}

$("text_form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("text").value) act({ kind: "type", text: $("text").value });
  $("text").value = "";
});
$("keys_form").addEventListener("submit", (event) => {
  event.preventDefault();
  const keys = $("keys").value.split(/(?<=.)\+/).map((key) => key.trim()).filter(Boolean);
  if (keys.length) act({ kind: "hotkey", keys });
  $("keys").value = "";
});
$("move").addEventListener("click", () => { $("move").ariaPressed = String($("move").ariaPressed !== "true"); focus(); });
$("wait").addEventListener("click", () => { act({ kind: "wait", seconds: 1 }); focus(); });
$("finished").addEventListener("click", () => act({ kind: "finished" }));
$("infeasible").addEventListener("click", () => act({ kind: "infeasible" }));
$("hand_over").addEventListener("click", () => { flush(); post("/hand_over"); });
$("take_over").addEventListener("click", () => { post("/take_over"); focus(); });
$("discard").addEventListener("click", () => { if (confirm("Discard this recording?")) post("/discard"); });

const VEILS = { starting: "Starting the desktop…", setting_up: "Setting up the task…", evaluating: "Evaluating the end state…", ended: "" };
function show() {
  const [width, height] = state.screen_size, isPlaying = state.phase === "playing";
  document.documentElement.style.setProperty("--ratio", width / height);
  marks.setAttribute("viewBox", `0 0 ${width} ${height}`);
  document.title = `${state.task_id} · deskrl record`;
  $("task").textContent = state.task_id;
  $("instruction").textContent = state.instruction;
  $("progress").textContent = `${state.steps.length} of at most ${state.max_steps} steps`;
  $("phase").textContent = state.phase.replace("_", " ");
  $("phase").className = `verdict ${state.phase}`;
  $("veil").textContent = VEILS[state.phase] ?? "";
  $("veil").hidden = !$("veil").textContent;
  screen.classList.toggle("locked", !mayAct());
  $("message").hidden = !state.message;
  $("message").textContent = state.message;
  $("control").hidden = !state.has_policy;
  document.querySelectorAll("[data-player]").forEach((it) => it.classList.toggle("current", it.dataset.player === state.player));
  $("hand_over").hidden = state.player === "policy";
  $("take_over").hidden = state.player !== "policy";
  $("control").disabled = !isPlaying;
  $("own").disabled = !mayAct();
  $("controls").hidden = state.phase === "ended";
  showSteps();
  if (state.phase === "ended") showResult();
  showHint();
}
function showSteps() {
  const list = $("steps");
  $("no_steps").hidden = state.steps.length > 0;
  for (const step of state.steps.slice(list.children.length)) {
    const item = document.createElement("li"), action = document.createElement("span"), player = document.createElement("em");
    item.className = step.player;
    action.textContent = step.action;
    player.textContent = step.player === "person" ? (state.has_policy ? "you" : "") : "policy";
    item.append(action, player);
    if (step.thought) item.append(Object.assign(document.createElement("small"), { textContent: step.thought }));
    list.append(item);
    list.scrollTop = list.scrollHeight;
  }
}
function showResult() {
  keyboard.blur();
  problem = "";
  $("result").hidden = false;
  const isDiscarded = !state.folder && !state.fault;
  $("reward").textContent = isDiscarded ? "Discarded" : !state.folder ? "Nothing was saved" : state.reward === null ? "No reward" : `Reward ${+state.reward.toPrecision(3)}`;
  $("reward").className = state.reward ? "good" : "";
  $("outcome").textContent = (state.fault && state.fault[0].toUpperCase() + state.fault.slice(1)) || (state.termination && `The episode ended: ${state.termination.replaceAll("_", " ")}.`);
  $("saved").hidden = !state.folder;
  $("folder").textContent = state.folder;
}
async function showScreen() {
  if (shown === state.screen) return;
  shown = state.screen;
  picture.src = `/screen/${shown}?token=${encodeURIComponent(headers["X-Deskrl-Token"])}`;
  await picture.decode().catch(() => {});
}

async function follow() {
  while (state.phase !== "ended") {
    const response = await fetch(`/state?after=${state.version}`, { headers }).catch(() => null);
    if (response?.ok) {
      const last = state;
      state = await response.json();
      if (["phase", "player", "is_acting"].some((key) => state[key] !== last[key])) changed_ms = Date.now();
      if (state.player !== last.player) problem = "";
      show();
      await showScreen();
    } else {
      $("veil").hidden = false;
      $("veil").textContent = response ? await response.text() : "deskrl record does not answer; see its terminal.";
      await new Promise((resume) => setTimeout(resume, 1000));
    }
  }
}
focus();
setInterval(showHint, 1000);
follow();
