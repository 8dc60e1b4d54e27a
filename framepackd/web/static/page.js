// What the page does by itself. Everything else is forms and links, which work without it.
const $ = (query, at = document) => at.querySelector(query);
const $$ = (query, at = document) => [...at.querySelectorAll(query)];
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

// ---- words at the foot of the page
let saidTimer;
function say(words) {
  const toast = $("#toast");
  toast.textContent = words;
  clearTimeout(saidTimer);
  saidTimer = setTimeout(() => { toast.textContent = ""; }, 6000);
}
if ($("#toast")?.textContent) say($("#toast").textContent);
document.addEventListener("say", event => say(event.detail.words)); // a header of the server's answers
document.addEventListener("htmx:responseError", ({detail: {xhr}}) => { // what is too large is refused in plain text
  if (xhr.getResponseHeader("content-type")?.startsWith("text/plain")) say(xhr.responseText);
});
document.addEventListener("htmx:sendError", () => say("The page's server does not answer. Nothing was changed."));

// ---- what changes by itself: one stream, each event a fragment that replaces the one of its id
const later = new Map(); // fragments that wait until nobody is at the old ones
function isBusy(part) {
  if ($(".lift, .ask.asking", part) || part.matches(".ask.asking")) return true;
  const at = document.activeElement;
  return part.contains(at) && at.matches("input:not([type=hidden]), textarea, select") && at.value !== at.defaultValue;
}
function isChanged(box) { return box.type === "file" ? box.files.length > 0 : box.value !== box.defaultValue; }
function keepInput(old, fresh) { // what was typed or chosen and is not sent yet
  for (const box of $$("input:not([type=hidden]), textarea", old).filter(box => box.id && isChanged(box))) {
    const same = fresh.querySelector(`#${CSS.escape(box.id)}`);
    if (same && box.type === "file") same.files = box.files;
    else if (same) same.value = box.value;
  }
}
async function place(html) {
  const parsed = document.createElement("template");
  parsed.innerHTML = html;
  const fresh = parsed.content.firstElementChild;
  const old = fresh && document.getElementById(fresh.id);
  if (!old || old.dataset.v === fresh.dataset.v) return;
  if (isBusy(old)) { later.set(fresh.id, html); return; }
  later.delete(fresh.id);
  if (fresh.id.startsWith("preview-") && goOn(old, fresh)) return;
  if (fresh.id.startsWith("stage-")) await Promise.all($$("img", fresh).map(image => image.decode().catch(() => {})));
  if (!old.isConnected) return;
  const held = old.contains(document.activeElement) ? document.activeElement.id : "";
  keepInput(old, fresh);
  old.replaceWith(fresh);
  htmx.process(fresh);
  settle(fresh);
  if (held) document.getElementById(held)?.focus({preventScroll: true});
}
function goOn(old, fresh) { // a longer video takes the place of the shorter one and keeps playing
  const before = $("video", old), after = $("video", fresh);
  if (!before || !after) return false;
  $(".chip", old).textContent = $(".chip", fresh).textContent;
  old.dataset.v = fresh.dataset.v;
  if (before.getAttribute("src") !== after.getAttribute("src")) {
    const playing = !before.paused;
    before.src = after.getAttribute("src");
    if (playing) before.play().catch(() => {});
  }
  return true;
}
function placeLater() { const waiting = [...later.values()]; later.clear(); waiting.forEach(place); }
function settle(part) {
  mark();
  part.dispatchEvent(new Event("settled", {bubbles: true}));
  if (!calm) $$("video[data-auto]", part).forEach(video => video.play().catch(() => {}));
}
function mark() { // which page this is
  const page = document.body.dataset.page.replace(/^result$/, "results");
  $$(".nav a").forEach(link => link.dataset.page === page ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current"));
}
const heard = new Set(["head", "line", "slim", "now", "queue", "needs", "fresh"]);
let stream, resting;
function listen() {
  if (stream) return;
  stream = new EventSource("/page/events");
  heard.forEach(name => stream.addEventListener(name, hear));
}
function hearOf(id) { // the stage's own events carry the id of its job
  ["stage", "preview"].map(what => `${what}-${id}`).filter(name => !heard.has(name)).forEach(name => { heard.add(name); stream?.addEventListener(name, hear); });
}
document.addEventListener("visibilitychange", () => { // browsers keep six connections: a tab that nobody looks at gives its own up
  clearTimeout(resting);
  if (document.hidden) resting = setTimeout(() => { stream?.close(); stream = undefined; }, 20000);
  else listen();
});
let inOrder = Promise.resolve();
function hear(event) {
  if ($("#hello") && /class="(seg|need|tile|job)[ "]/.test(event.data)) { location.reload(); return; } // there is something to see now
  inOrder = inOrder.then(() => event.type === "fresh" && tellOfNew(event.data) || place(event.data)).then(() => {
    if (event.type === "now") $$(".stage").forEach(stage => hearOf(stage.id.slice("job-".length)));
  }).catch(console.error);
}
function tellOfNew(html) { // results never move under a finger: a button says that there are new ones
  const button = $("#new-results");
  if (!button) return false;
  const parsed = document.createElement("template");
  parsed.innerHTML = html;
  button.hidden = parsed.content.firstElementChild.dataset.newest === button.dataset.newest;
  return true;
}
listen();
$$(".stage").forEach(stage => hearOf(stage.id.slice("job-".length)));

// ---- asking where the click was
function ask(link, open) {
  const form = document.getElementById(link.getAttribute("aria-controls"));
  form.classList.toggle("asking", open);
  link.setAttribute("aria-expanded", open);
  if (open) $("button", form).focus(); else { link.focus(); placeLater(); }
}
addEventListener("click", event => {
  const link = event.target.closest("a, button");
  if (!link) return;
  if (link.matches(".asks")) { event.preventDefault(); ask(link, link.getAttribute("aria-expanded") !== "true"); }
  if (link.matches("[data-close]")) { event.preventDefault(); ask($(`[aria-controls="${link.closest(".ask").id}"]`), false); }
  if (link.matches("#theme")) turn();
  if (link.matches("[data-copy]")) navigator.clipboard.writeText(document.getElementById(link.dataset.copy).textContent).then(() => say("Copied."));
  if (link.closest(".seg")) light(event, link);
});
document.addEventListener("htmx:afterRequest", event => {
  if (event.detail.successful) event.target.closest(".ask")?.classList.remove("asking");
  if (event.detail.successful) event.target.closest("#needs form")?.reset();
  placeLater();
});
addEventListener("focusout", () => setTimeout(placeLater, 100));
if (isSecureContext) $$("[data-copy]").forEach(button => { button.hidden = false; });

function turn() {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("color-scheme") === "dark"
    || !document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  document.cookie = `theme=${dark ? "light" : "dark"};path=/;max-age=31536000;samesite=lax`;
}

// ---- the night line and the cards light up together; Enter goes to the card
function light(event, link) {
  const card = document.getElementById(`job-${link.closest(".seg").dataset.id}`);
  if (!card) return; // another page has it
  event.preventDefault();
  card.scrollIntoView({block: "center", behavior: calm ? "auto" : "smooth"});
  ($(".grip", card) || $(".asks", card) || card).focus({preventScroll: true});
}
["pointerover", "focusin"].forEach(name => addEventListener(name, event => {
  const at = event.target.closest?.(".seg, .job");
  $$(".lit").forEach(lit => lit.classList.remove("lit"));
  if (at?.dataset.id) $$(`[data-id="${at.dataset.id}"]`).forEach(same => same.classList.add("lit"));
}));

// ---- the order of the queue, by pointer and by keyboard
let held, before, moved;
function number(list) {
  const cards = $$(":scope > li", list);
  cards.forEach((card, at) => {
    const grip = $(".grip", card);
    grip.setAttribute("aria-label", grip.getAttribute("aria-label").replace(/place .*/, `place ${at + 1} of ${cards.length}`));
  });
}
function place_of(card) { return $(".grip", card).getAttribute("aria-label").split(", place ")[1]; }
function put(card) { // tell the server where it lies now
  const list = card.parentNode;
  number(list);
  card.classList.remove("lift");
  if (!list.matches("[data-queue]")) { list.dispatchEvent(new CustomEvent("ordered", {bubbles: true})); return; }
  if (card.nextElementSibling === before) { placeLater(); return; }
  const values = {...Object.fromEntries(new FormData($("#moving"))), job: card.dataset.id, before: card.nextElementSibling?.dataset.id || ""};
  if (!values.before && Number($("#queue").dataset.more)) { say("The end of the list is not the end of the queue: nothing was moved."); placeLater(); return; }
  htmx.ajax("POST", "/page/do/move", {values, swap: "none", source: $("#moving")});
}
addEventListener("pointerdown", event => {
  const grip = event.target.closest(".grip");
  if (!grip || event.button) return;
  event.preventDefault();
  grip.focus();
  held = grip.closest("li");
  before = held.nextElementSibling;
  moved = false;
  held.classList.add("lift");
  grip.setPointerCapture(event.pointerId);
});
addEventListener("pointermove", event => {
  if (!held) return;
  const over = document.elementsFromPoint(event.clientX, event.clientY).map(at => at.closest?.("li")).find(li => li && li !== held && li.parentNode === held.parentNode);
  if (!over) return;
  moved = true;
  over.parentNode.insertBefore(held, held.compareDocumentPosition(over) & Node.DOCUMENT_POSITION_FOLLOWING ? over.nextSibling : over);
});
["pointerup", "pointercancel"].forEach(name => addEventListener(name, () => {
  if (!held) return;
  const card = held;
  held = undefined;
  if (moved) put(card); else { card.classList.remove("lift"); placeLater(); }
}));
addEventListener("keydown", event => {
  const grip = event.target.closest?.(".grip");
  if (grip) { lift(event, grip); return; }
  const seg = event.target.closest?.(".seg");
  if (seg && /^Arrow(Left|Right)$/.test(event.key)) { step(event, seg); return; }
  if (event.key === "Escape") {
    const open = $(".ask.asking");
    if (open) ask($(`[aria-controls="${open.id}"]`), false);
    else if ($("[data-back]")) location.href = $("[data-back]").href;
  }
  if (event.target.closest?.("input, textarea, select, video, [contenteditable]") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); $("[data-find]") ? $("[data-find]").focus() : location.assign("/results#find"); }
  if (event.key === "n") location.assign("/make");
  const way = {ArrowLeft: "[data-newer]", ArrowRight: "[data-older]"}[event.key];
  if (way && $(way)) location.href = $(way).href;
});
function lift(event, grip) {
  const card = grip.closest("li"), list = card.parentNode, up = grip.getAttribute("aria-pressed") === "true";
  if (event.key === " " || event.key === "Enter") {
    event.preventDefault();
    grip.setAttribute("aria-pressed", !up);
    card.classList.toggle("lift", !up);
    if (up) { say(`Put down, place ${place_of(card)}.`); put(card); return; }
    before = card.nextElementSibling;
    say("Lifted. Arrows move it, Space puts it down, Escape puts it back.");
  }
  if (!up) return;
  if (event.key === "Escape") {
    event.preventDefault();
    event.stopPropagation();
    list.insertBefore(card, before);
    number(list);
    grip.setAttribute("aria-pressed", false);
    card.classList.remove("lift");
    grip.focus();
    say("Back where it was.");
    placeLater();
  }
  if (event.key.startsWith("Arrow")) {
    event.preventDefault();
    const back = event.key === "ArrowUp" || event.key === "ArrowLeft";
    const other = back ? card.previousElementSibling : card.nextElementSibling;
    if (!other) return;
    list.insertBefore(card, back ? other : other.nextSibling);
    number(list);
    grip.focus();
    say(`Place ${place_of(card)}.`);
  }
}
function step(event, seg) { // one stop for Tab, arrows within
  event.preventDefault();
  const all = $$(".seg a", seg.parentNode), to = all[all.indexOf(event.target) + (event.key === "ArrowRight" ? 1 : -1)];
  if (!to) return;
  event.target.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

// ---- tiles play on hover and on focus, one at a time; nothing moves by itself where motion is not wanted
function play(tile) {
  if (calm || tile.classList.contains("playing") || $("video", tile)) return;
  const video = Object.assign(document.createElement("video"), {muted: true, loop: true, playsInline: true, src: tile.dataset.clip});
  video.setAttribute("aria-hidden", "true");
  video.addEventListener("playing", () => {
    tile.classList.add("playing");
    $(".bar", tile).style.animationDuration = `${video.duration}s`;
  }, {once: true});
  $("a", tile).prepend(video);
  $("img", tile)?.after(video);
  video.play().catch(() => {});
}
function stop(tile) { tile.classList.remove("playing"); $("video", tile)?.remove(); }
["mouseover", "focusin"].forEach(name => addEventListener(name, event => {
  const tile = event.target.closest?.(".tile[data-clip]");
  $$(".tile").filter(other => other !== tile && $("video", other)).forEach(stop);
  if (tile && (name === "focusin" || matchMedia("(hover: hover)").matches)) play(tile);
}));

settle(document);
