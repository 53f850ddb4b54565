"use strict";

// A scan to /predict, and scan and mask shown over each other: volumes by NiiVue, images by a canvas.

// Okabe and Ito's colours, which colour-blind people tell apart.
const COLOURS = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]];
const PLANES = {axial: {type: 0, axis: 2}, coronal: {type: 1, axis: 1}, sagittal: {type: 2, axis: 0}};

const at = (id) => document.getElementById(id);
const colourOf = (classId) => COLOURS[(classId - 1) % COLOURS.length];
const server = fetch("labels").then((answer) => answer.json());
let shown = null; // {draw(opacity)} of what is on the screen
let viewer = null; // NiiVue, made for the first volume
let plane = "axial";
let turn = 0; // counts the scans, so that a late answer does not replace a newer one

function say(text, state) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", state === "refused");
  document.body.dataset.state = state;
}

async function isPng(file) {
  const head = new Uint8Array(await file.slice(0, 4).arrayBuffer());
  return head[0] === 0x89 && head[1] === 0x50 && head[2] === 0x4e && head[3] === 0x47;
}

async function isGzip(file) {
  const head = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  return head[0] === 0x1f && head[1] === 0x8b;
}

// The answer's masks: one of class ids, or where classes overlap one a class, out of a zip without compression.
async function masksOf(content, about) {
  if (!about.files) return [{content, classId: null}];
  const bytes = new Uint8Array(await content.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const files = {};
  for (let place = 0; view.getUint32(place, true) === 0x04034b50;) {
    const [size, name, extra] = [view.getUint32(place + 18, true), view.getUint16(place + 26, true), view.getUint16(place + 28, true)];
    const start = place + 30 + name + extra;
    files[new TextDecoder().decode(bytes.subarray(place + 30, place + 30 + name))] = new Blob([bytes.subarray(start, start + size)]);
    place = start + size;
  }
  return Object.entries(about.files).map(([classId, name]) => ({content: files[name], classId: Number(classId)}));
}

async function segment(file) {
  const own = ++turn;
  const {labels, limits} = await server;
  if (file.size > limits.max_megabytes * 1e6) {
    say(`The file is larger than the ${limits.max_megabytes} MB that this server takes.`, "refused");
    return;
  }
  say("Segmenting …", "busy");
  let answer;
  try {
    answer = await fetch("predict", {method: "POST", body: file, headers: {"Content-Type": "application/octet-stream"}});
  } catch {
    if (own === turn) say("The server cannot be reached, or ended the upload. Is it still running?", "refused");
    return;
  }
  if (!answer.ok) {
    const {error} = await answer.json().catch(() => ({error: `The server answered with status ${answer.status}.`}));
    if (own === turn) say(error, "refused");
    return;
  }
  const content = await answer.blob();
  if (own !== turn) return;
  const about = JSON.parse(answer.headers.get("Samssl-Prediction"));
  const masks = await masksOf(content, about);
  const name = /filename="([^"]*)"/.exec(answer.headers.get("Content-Disposition"))[1];
  tell(labels, about, content, name);
  at("view").hidden = false;
  const flat = await isPng(file);
  for (const id of ["volume", "planes", "slices"]) at(id).hidden = flat;
  at("image").hidden = !flat;
  shown = flat ? await showImage(file, masks) : await showVolume(file, masks, labels);
  shown.draw(Number(at("opacity").value));
  say("", "shown");
}

// Legend, volumes, warnings and the link to the mask.
function tell(labels, about, content, name) {
  at("legend").replaceChildren(...Object.entries(labels).map(([classId, label]) => {
    const [row, called, volume, swatch] = ["tr", "td", "td", "span"].map((tag) => document.createElement(tag));
    swatch.className = "swatch";
    swatch.style.backgroundColor = `rgb(${colourOf(Number(classId))})`;
    called.append(swatch, label);
    const ml = about.volumes_ml[label];
    volume.textContent = ml === undefined ? "–" : ml.toFixed(ml < 10 ? 2 : 0);
    row.append(called, volume);
    return row;
  }));
  at("warnings").replaceChildren(...about.warnings.map((warning) => {
    const line = document.createElement("li");
    line.textContent = warning;
    return line;
  }));
  at("warnings").hidden = !about.warnings.length;
  at("uncertainty").hidden = about.uncertainty === null;
  if (about.uncertainty !== null) {
    at("uncertainty").textContent = `Mean entropy where a class was found: ${about.uncertainty.toFixed(2)} (0 is sure, 1 no idea).`;
  }
  URL.revokeObjectURL(at("save").href);
  at("save").href = URL.createObjectURL(content);
  at("save").download = name;
}

function colourTable(labels, classId) {
  const ids = Object.keys(labels).map(Number);
  const rows = classId === null ? ids.map((id) => [id, ...colourOf(id)]) : [[1, ...colourOf(classId)]];
  const column = (index) => [0, ...rows.map((row) => row[index])];
  return {I: column(0), R: column(1), G: column(2), B: column(3), A: [0, ...rows.map(() => 255)], labels: ["", ...rows.map(() => "")]};
}

async function viewerOf(canvas) {
  if (viewer) return viewer;
  viewer = new niivue.Niivue({
    dragAndDropEnabled: false, show3Dcrosshair: false, crosshairWidth: 0, isRadiologicalConvention: true,
    loadingText: "", showLegend: false, isNearestInterpolation: true, backColor: [0, 0, 0, 1], logLevel: "silent",
  });
  await viewer.attachToCanvas(canvas);
  viewer.onLocationChange = followSlice;
  return viewer;
}

async function showVolume(file, masks, labels) {
  const nv = await viewerOf(at("volume"));
  for (const volume of [...nv.volumes]) nv.removeVolume(volume);
  const ending = await isGzip(file) ? ".nii.gz" : ".nii"; // NiiVue goes by names, and needs none of the file's own
  const load = (content, name) => niivue.NVImage.loadFromFile({file: new File([content], name), name});
  nv.addVolume(await load(file, `scan${ending}`));
  for (const [number, mask] of masks.entries()) {
    const overlay = await load(mask.content, `mask${number}.nii.gz`);
    overlay.setColormapLabel(colourTable(labels, mask.classId));
    nv.addVolume(overlay);
  }
  choosePlane(plane);
  goTo(Math.ceil(slices() / 2));
  return {draw: (opacity) => masks.forEach((_, number) => nv.setOpacity(number + 1, opacity))};
}

const slices = () => viewer.volumes[0].dimsRAS[PLANES[plane].axis + 1];

function choosePlane(name) {
  plane = name;
  for (const button of document.querySelectorAll("[data-plane]")) {
    button.setAttribute("aria-pressed", String(button.dataset.plane === name));
  }
  viewer.setSliceType(PLANES[name].type);
  at("slice").max = String(slices());
  followSlice();
}

function goTo(number) {
  viewer.scene.crosshairPos[PLANES[plane].axis] = (number - 0.5) / slices();
  viewer.drawScene();
  followSlice();
}

// The slider and its words after the slice that is shown, which the mouse wheel changes too.
function followSlice() {
  const number = Math.floor(viewer.scene.crosshairPos[PLANES[plane].axis] * slices()) + 1;
  at("slice").value = String(Math.min(number, slices()));
  at("where").textContent = `Slice ${at("slice").value} of ${slices()}`;
}

async function showImage(file, masks) {
  const image = await createImageBitmap(file);
  const layers = await Promise.all(masks.map(async (mask) => {
    const values = await createImageBitmap(mask.content, {colorSpaceConversion: "none"});
    return painted(values, mask.classId);
  }));
  const canvas = at("image");
  [canvas.width, canvas.height] = [image.width, image.height];
  const pen = canvas.getContext("2d");
  return {
    draw: (opacity) => {
      pen.globalAlpha = 1;
      pen.drawImage(image, 0, 0);
      pen.globalAlpha = opacity;
      for (const layer of layers) pen.drawImage(layer, 0, 0);
    },
  };
}

// A mask in its classes' colours, on nothing.
function painted(values, classId) {
  const canvas = new OffscreenCanvas(values.width, values.height);
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  pen.drawImage(values, 0, 0);
  const pixels = pen.getImageData(0, 0, values.width, values.height);
  for (let place = 0; place < pixels.data.length; place += 4) {
    const found = pixels.data[place];
    if (found) pixels.data.set([...colourOf(classId ?? found), 255], place);
    else pixels.data[place + 3] = 0;
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

function take(file) {
  if (!file) return;
  segment(file).catch((error) => say(`The mask cannot be shown here: ${error.message}`, "refused"));
}

at("file").addEventListener("change", () => {
  take(at("file").files[0]);
  at("file").value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
at("slice").addEventListener("input", () => goTo(Number(at("slice").value)));
at("opacity").addEventListener("input", () => shown && shown.draw(Number(at("opacity").value)));
for (const button of document.querySelectorAll("[data-plane]")) {
  button.addEventListener("click", () => choosePlane(button.dataset.plane));
}
document.body.dataset.state = "idle";
