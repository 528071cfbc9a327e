"use strict";
// Tooltips under the pointer. They repeat what the drawings, captions and tables contain.
for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script.readings");
  if (!source) continue;
  const readings = JSON.parse(source.textContent);
  const plots = figure.querySelector(".plots");
  const box = document.createElement("div");
  box.className = "readout";
  box.hidden = true;
  box.setAttribute("aria-hidden", "true");
  plots.append(box);

  const nearest = (places, wanted) => {
    let low = 0, high = places.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (places[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && wanted - places[low - 1] < places[low] - wanted ? low - 1 : low;
  };

  for (const svg of plots.querySelectorAll("svg.plot")) {
    const at = (name) => Number(svg.dataset[name]);
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", at("top"));
    cross.setAttribute("y2", at("bottom"));
    cross.style.display = "none";
    svg.append(cross);

    const hide = () => { box.hidden = true; cross.style.display = "none"; };
    const show = (event) => {
      const frame = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / frame.width;
      const share = ((event.clientX - frame.left) * scale - at("left")) / (at("right") - at("left"));
      if (share < -0.02 || share > 1.02) return hide();
      const wanted = at("first") + share * (at("last") - at("first"));
      const lines = readings.lines.filter((line) => line.x.length);
      const dense = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
      const place = dense.x[nearest(dense.x, wanted)];
      const x = at("left") + (place - at("first")) / (at("last") - at("first")) * (at("right") - at("left"));
      cross.setAttribute("x1", x);
      cross.setAttribute("x2", x);
      cross.style.display = "";
      box.replaceChildren();
      const head = document.createElement("b");
      head.textContent = readings.label + " " + Math.round(place).toLocaleString("en");
      box.append(head);
      const near = (at("last") - at("first")) / 40;
      for (const line of lines) {
        const i = nearest(line.x, place);
        if (Math.abs(line.x[i] - place) > near) continue;
        const row = document.createElement("span");
        row.className = "s" + line.colour;
        row.textContent = line.name + " " + line.words[i];
        box.append(row);
      }
      box.hidden = false;
      const left = x / scale, width = box.offsetWidth;
      box.style.left = (left + 12 + width > frame.width ? Math.max(0, left - 12 - width) : left + 12) + "px";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
}
