// The form of a new video: pictures in an order, what they become, and what it costs. Without it the form still works.
const form = $("#make"), input = $("#pictures"), list = $("#pictures-list");
let pictures = []; // in their order
let own = new Map(); // sentences of single pictures

function isChain() { return pictures.length > 1 && form.elements.as.value === "chain"; }
function hold() { // what the browser sends is the pictures in their order
  const files = new DataTransfer();
  pictures.forEach(picture => files.items.add(picture));
  input.files = files.files;
}
function add(files) {
  const found = [...files].filter(file => file.type.startsWith("image/") || /\.(heic|heif|avif)$/i.test(file.name));
  const refused = [...files].find(file => !found.includes(file));
  pictures.push(...found);
  wrong("pictures", refused ? `${refused.name} is no picture.` : "");
  show();
}
function show() {
  const chain = isChain(), many = pictures.length > 1;
  list.replaceChildren(...pictures.map((picture, at) => card(picture, at, chain, many)));
  list.hidden = !pictures.length;
  list.className = chain ? "chain" : many ? "batch" : "single";
  $("#as").hidden = !many;
  $("#as-each").textContent = `${pictures.length} videos`;
  $("#as-words").textContent = chain ? "From picture to picture, in one video." : "One video for each picture.";
  $("#zone").classList.toggle("small-zone", pictures.length > 0);
  $("#zone-word").textContent = pictures.length ? "More pictures" : "Drop a picture here";
  $("#zone-more").textContent = pictures.length ? "Many videos, or one chain." : "or choose one, or paste it; many at once are fine";
  $("#end-slot").hidden = many;
  $("#prompt-more").hidden = !many || chain;
  $("#each-step").hidden = !chain;
  $("#count").value = chain ? 1 : Math.max(pictures.length, 1);
  $("#clips").value = chain ? pictures.length - 1 : 1;
  $("#go").textContent = many && !chain ? `Make ${pictures.length} videos` : "Make video";
  hold();
  measure();
  htmx.trigger("#cost", "again");
}
function card(picture, at, chain, many) {
  const li = document.createElement("li"), image = new Image(), url = URL.createObjectURL(picture);
  image.src = url;
  image.alt = picture.name;
  image.onerror = () => { // some kinds are read here and not by browsers
    if (/\.(heic|heif)$/i.test(picture.name)) { image.alt = `${picture.name}, which this browser cannot show`; return; }
    li.classList.add("bad");
    wrong("pictures", `${picture.name} cannot be read: is it whole? Save it again as PNG or JPEG.`);
  };
  if (chain) {
    const time = document.createElement("span");
    time.className = "t";
    time.dataset.at = at;
    li.append(time, grip(picture, at));
  }
  li.append(image);
  if (many) {
    const name = document.createElement("span");
    name.className = "name small dim";
    name.textContent = picture.name;
    if (chain) li.append(name);
    else {
      const text = Object.assign(document.createElement("input"), {type: "text", name: "own", value: own.get(picture) || "", placeholder: "The sentence for all"});
      text.setAttribute("aria-label", `Sentence for ${picture.name}`);
      text.oninput = () => own.set(picture, text.value);
      li.append(text);
    }
  }
  const remove = document.createElement("button");
  Object.assign(remove, {type: "button", className: "icon remove", title: "Remove", innerHTML: '<svg aria-hidden="true"><use href="#i-x"/></svg>'});
  remove.setAttribute("aria-label", `Remove ${picture.name}`);
  remove.onclick = () => { pictures = pictures.filter(other => other !== picture); URL.revokeObjectURL(url); wrong("pictures", ""); show(); ($(".remove", list) || input).focus(); };
  li.append(remove);
  li.picture = picture;
  return li;
}
function grip(picture, at) {
  const button = document.createElement("button");
  Object.assign(button, {type: "button", className: "grip", title: "Drag, or press Space and use the arrows", innerHTML: '<svg aria-hidden="true"><use href="#i-grip"/></svg>'});
  button.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-label", `Move ${picture.name}, place ${at + 1} of ${pictures.length}`);
  return button;
}
list.addEventListener("ordered", () => { pictures = $$("li", list).map(li => li.picture); show(); });

function measure() { // the true length, and where the steps of a chain begin
  const range = $("#sections"), count = +range.value, each = +range.dataset.section;
  const steps = isChain() ? pictures.length - 1 : 1, text = `${round(count * each * steps + 1 / 30)} s, ${count * steps} section${count * steps > 1 ? "s" : ""}`;
  range.style.setProperty("--v", `${(count - 1) / (range.max - 1) * 100}%`);
  range.setAttribute("aria-valuetext", text);
  $("#length").textContent = text;
  $$(".t", list).forEach(time => { time.textContent = `${round(time.dataset.at * count * each)} s`; });
}
function round(value) { return value.toFixed(1).replace(/\.0$/, ""); }

function wrong(field, words) { // a word at the field
  const place = $(`[data-err="${field}"]`) || $('[data-err="form"]');
  place.hidden = !words;
  $("span", place).textContent = words;
  const at = document.getElementById(field);
  if (at) words ? at.setAttribute("aria-invalid", "true") : at.removeAttribute("aria-invalid");
  if (!words) return;
  place.closest("details")?.setAttribute("open", "");
  (at && at.type !== "file" ? at : place).scrollIntoView({block: "center", behavior: calm ? "auto" : "smooth"});
  if (at) at.focus({preventScroll: true});
}
document.addEventListener("wrong", event => wrong(event.detail.field, event.detail.words));
document.addEventListener("made", event => {
  $("#number").value = event.detail.number;
  pictures = [];
  own = new Map();
  $("#prompt").value = "";
  $("#end").value = "";
  $("#end-picture").hidden = true;
  $("#like")?.remove();
  show();
  input.focus();
});
form.addEventListener("htmx:configRequest", event => { if (event.target === form) $$("[data-err]", form).forEach(place => wrong(place.dataset.err, "")); });
form.addEventListener("submit", event => { // what needs no server to be seen
  if (!pictures.length && !$("#like")) wrong("pictures", "Give a picture first: it is what the video begins with.");
  else if (!$("#prompt").value.trim() && (isChain() || !pictures.length || pictures.some(picture => !own.get(picture)?.trim()))) wrong("prompt", "Say what moves, in a sentence. Then I can start.");
  else return;
  event.preventDefault();
  event.stopImmediatePropagation();
}, {capture: true});
$("#prompt").addEventListener("input", () => wrong("prompt", ""));

input.addEventListener("change", () => { const chosen = [...input.files]; $("#like")?.remove(); add(chosen); });
form.addEventListener("change", event => { if (event.target.name === "as") show(); });
$("#sections").addEventListener("input", measure);
$("#model").addEventListener("change", event => { $("#model-words").textContent = event.target.selectedOptions[0].dataset.words; });
$("#end").addEventListener("change", event => {
  const [picture] = event.target.files, shown = $("#end-picture");
  shown.hidden = !picture;
  if (picture) shown.src = URL.createObjectURL(picture);
  $("#end-word").textContent = picture ? picture.name : "End frame";
  wrong("end", "");
});
$$("[data-try]").forEach(button => button.addEventListener("click", () => { $("#prompt").value = button.dataset.try; wrong("prompt", ""); $("#prompt").focus(); }));
$("#dice").hidden = false;
$("#dice").addEventListener("click", () => { $("#seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; });
const moreLoras = $("#more-loras");
if (moreLoras) {
  moreLoras.hidden = false;
  moreLoras.addEventListener("click", () => { const row = $("#loras").lastElementChild.cloneNode(true); $("select", row).value = ""; $("input", row).value = 1; $("#loras").append(row); $("select", row).focus(); });
}

// ---- pictures come from anywhere on the page
let deep = 0;
const holdsFiles = event => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", event => { if (holdsFiles(event)) { deep++; $("#drop").hidden = false; } });
addEventListener("dragleave", event => { if (holdsFiles(event) && --deep <= 0) { deep = 0; $("#drop").hidden = true; } });
addEventListener("dragover", event => { if (holdsFiles(event)) event.preventDefault(); });
addEventListener("drop", event => { if (!holdsFiles(event)) return; event.preventDefault(); deep = 0; $("#drop").hidden = true; $("#like")?.remove(); add(event.dataTransfer.files); });
addEventListener("paste", event => {
  const files = [...(event.clipboardData?.files || [])];
  if (files.length) { event.preventDefault(); $("#like")?.remove(); add(files); }
});

// ---- where the new video would lie on the night line
document.addEventListener("htmx:afterSwap", event => { if (event.target.id === "cost") ghost(); });
document.addEventListener("settled", event => { if (event.target.id === "slim") ghost(); });
function ghost() {
  const line = $("#slim .line"), takes = +$("#cost-words")?.dataset.takes, total = +$("#slim").dataset.takes;
  $$(".ghost", line || document).forEach(old => old.remove());
  if (!line || !takes || !total) return;
  const share = total / (total + takes);
  $$(".seg", line).forEach(seg => ["a", "b"].forEach(side => {
    seg.dataset[side] ??= getComputedStyle(seg).getPropertyValue(`--${side}`);
    seg.style.setProperty(`--${side}`, seg.dataset[side] * share);
  }));
  const mine = document.createElement("li");
  mine.className = "seg ghost";
  mine.style.setProperty("--a", share * 100);
  mine.style.setProperty("--b", 100);
  line.append(mine);
}
measure();
