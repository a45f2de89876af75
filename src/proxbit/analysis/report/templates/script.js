"use strict";
// Values under the pointer, or under the arrow keys. Without it the page shows all the same.
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg.plot");
  const readout = figure.querySelector(".readout");
  const cursor = svg.querySelector(".cursor");
  const dots = svg.querySelectorAll(".dot");
  const curves = JSON.parse(svg.dataset.curves);
  const percent = svg.dataset.percent === "yes";
  const places = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
  const before = readout.textContent;
  let at = -1;
  const hide = () => {
    at = -1;
    readout.textContent = before;
    for (const mark of [cursor, ...dots]) mark.style.visibility = "hidden";
  };
  const show = (index) => {
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = places[at];
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    let epoch = 0;
    const parts = [];
    curves.forEach((curve, k) => {
      const near = curve.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const here = Math.abs(near[0] - x) < 8;
      dots[k].style.visibility = here ? "visible" : "hidden";
      if (!here) return;
      if (near[0] === x) epoch = near[2];
      dots[k].setAttribute("cx", near[0]);
      dots[k].setAttribute("cy", near[1]);
      parts.push(curve.name + " " + (percent ? number.format(100 * near[3]) + " %" : number.format(near[3])));
    });
    readout.textContent = "epoch " + number.format(epoch) + ": " + parts.join(", ");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(places.reduce((best, place, i) => (Math.abs(place - x) < Math.abs(places[best] - x) ? i : best), 0));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(at < 0 ? (move > 0 ? 0 : places.length - 1) : at + move);
  });
}
