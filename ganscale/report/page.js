"use strict";
// The slider over the sample pictures, and values read off the curves. Without it the page shows
// the last picture and the newest values.

const data = document.getElementById("frames");
if (data) {
  const { positions, labels, runs } = JSON.parse(data.textContent);
  const slider = document.getElementById("position");
  const play = document.getElementById("play");
  // The newest pictures are in the page and not in the data.
  const newest = runs.map((_, run) => document.getElementById(`frame-${run}`)?.src);
  let timer = 0;

  const show = () => {
    const index = Number(slider.value);
    document.getElementById("shown").textContent = labels[index];
    slider.setAttribute("aria-valuetext", labels[index]);
    runs.forEach((frames, run) => {
      const image = document.getElementById(`frame-${run}`);
      if (!image) return;
      // The newest picture up to the position; before a run's first one, that one.
      const past = frames.filter((frame) => frame.nimg <= positions[index]);
      const frame = past.length ? past[past.length - 1] : frames[0];
      const label = labels[positions.indexOf(frame.nimg)];
      image.src = frame.url || newest[run];
      image.alt = `Samples of ${image.dataset.run} at ${label}`;
      document.getElementById(`at-${run}`).textContent = label;
      const values = document.querySelectorAll(`#values-${run} dd`);
      values.forEach((value, i) => { value.textContent = frame.values[i]; });
    });
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (slider.value === slider.max) { slider.value = 0; show(); }
    play.textContent = "Stop";
    play.setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 500);
  });
  play.hidden = positions.length < 2;
  // A browser may have kept the slider's place of an earlier visit.
  slider.value = slider.max;
}

const SVG = "http://www.w3.org/2000/svg";

const readable = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(3);
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
};

const pointsOf = (path) => {
  const numbers = path.getAttribute("d").match(/-?\d+(\.\d+)?/g) || [];
  const points = [];
  for (let i = 0; i + 1 < numbers.length; i += 2) points.push([+numbers[i], +numbers[i + 1]]);
  return points;
};

for (const figure of document.querySelectorAll(".plot")) {
  const svg = figure.querySelector(".drawing");
  const [left, right, bottom, top] = figure.dataset.box.split(" ").map(Number);
  const [x0, x1, y0, y1] = figure.dataset.limits.split(" ").map(Number);
  const values = [...figure.querySelectorAll(".legend b")];
  const lines = values.map((_, index) => {
    const path = svg.querySelector(`[id="${figure.dataset.ident}-${index}"] path`);
    return path ? { points: pointsOf(path), color: getComputedStyle(path).stroke } : { points: [] };
  });
  const stops = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
  // The drawing's coordinates are rounded to a tenth of a point of some 340.
  const digits = Math.max(0, Math.floor(-Math.log10((x1 - x0) / 2000)));
  let marks = null;
  let at = -1;

  const clear = () => {
    if (marks) marks.remove();
    marks = null;
    at = -1;
    figure.querySelector(".where").textContent = "";
    values.forEach((value) => { value.textContent = value.dataset.last; });
  };
  const add = (name, attributes) => {
    const element = marks.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  };
  const read = (index) => {
    clear();
    at = index;
    const x = stops[index];
    marks = svg.appendChild(document.createElementNS(SVG, "g"));
    add("line", { x1: x, x2: x, y1: bottom, y2: top, class: "cursor" });
    lines.forEach((line, i) => {
      if (!line.points.length) return;
      const near = line.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const height = y0 + ((bottom - near[1]) / (bottom - top)) * (y1 - y0);
      values[i].textContent = readable(figure.dataset.log === "1" ? 10 ** height : height);
      add("circle", { cx: near[0], cy: near[1], r: 3, fill: line.color, class: "dot" });
    });
    const kimg = x0 + ((x - left) / (right - left)) * (x1 - x0);
    const place = Math.max(0, kimg).toFixed(digits);
    figure.querySelector(".where").textContent = `at ${readable(Number(place))} kimg`;
  };
  if (stops.length) {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      read(stops.reduce((best, stop, i) => (Math.abs(stop - x) < Math.abs(stops[best] - x) ? i : best), 0));
    });
    svg.addEventListener("pointerleave", clear);
    figure.addEventListener("blur", clear);
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.target !== figure) return;
      event.preventDefault();
      const from = at < 0 ? (step > 0 ? -1 : stops.length) : at;
      read(Math.min(stops.length - 1, Math.max(0, from + step)));
    });
  }
  const enlarge = figure.querySelector(".enlarge");
  enlarge.hidden = false;
  enlarge.addEventListener("click", () => {
    const large = figure.classList.toggle("large");
    enlarge.textContent = large ? "Shrink" : "Enlarge";
    enlarge.setAttribute("aria-pressed", String(large));
  });
}
