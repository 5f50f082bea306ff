// Saving what a view shows, for the views whose Python class names this file in `parts`: a menu, files made in the
// browser, and a pen that takes a canvas context's calls and writes SVG.

function saveFile(name, type, content) {
  const link = node("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A "Save" button with a menu of [name, action] entries. */
function saveMenu(parent, entries) {
  const button = node("button", "wb-button", parent, "Save ▾");
  button.type = "button";
  button.setAttribute("aria-haspopup", "menu");
  const menu = node("div", "wb-menu", parent);
  menu.setAttribute("role", "menu");
  menu.setAttribute("aria-label", "Save");
  menu.popover = "auto"; // the browser closes it on Escape and on a click elsewhere
  for (const [name, action] of entries) {
    const entry = node("button", "", menu, name);
    entry.type = "button";
    entry.setAttribute("role", "menuitem");
    entry.addEventListener("click", () => {
      menu.hidePopover();
      action();
    });
  }
  button.addEventListener("click", () => {
    menu.togglePopover();
    if (!menu.matches(":popover-open")) return;
    const at = button.getBoundingClientRect();
    const below = at.bottom + 4 + menu.offsetHeight < innerHeight;
    menu.style.left = `${Math.max(4, Math.min(at.left, innerWidth - menu.offsetWidth - 4))}px`;
    menu.style.top = `${below ? at.bottom + 4 : at.top - 4 - menu.offsetHeight}px`;
    menu.firstChild.focus();
  });
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") button.focus();
    event.stopPropagation();
    if (!step) return;
    event.preventDefault();
    const all = [...menu.children];
    all[(all.indexOf(event.target) + step + all.length) % all.length].focus();
  });
  return button;
}

/** Draw with `compose(pen, width, height)` at twice the screen's resolution and save it as PNG. */
function savePng(name, width, height, surface, compose) {
  const canvas = document.createElement("canvas");
  canvas.width = width * 2;
  canvas.height = height * 2;
  const pen = canvas.getContext("2d");
  pen.scale(2, 2);
  pen.fillStyle = surface;
  pen.fillRect(0, 0, width, height);
  compose(pen, width, height);
  canvas.toBlob((blob) => saveFile(`${name}.png`, "image/png", blob));
}

/** The same as SVG: text stays text, a map of cells becomes one embedded picture. */
function saveSvg(name, width, height, surface, compose) {
  const pen = new SvgPen();
  pen.fillStyle = surface;
  pen.fillRect(0, 0, width, height);
  compose(pen, width, height);
  const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">`;
  saveFile(`${name}.svg`, "image/svg+xml", `${head}${pen.parts.join("")}</svg>\n`);
}

const fileName = (label) => label.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 80) || "view";
const csvCell = (text) => (/[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);

class SvgPen {
  parts = [];
  fillStyle = "#000000";
  strokeStyle = "#000000";
  lineWidth = 1;
  textAlign = "left";
  #font = "11px system-ui, sans-serif";
  #dash = [];
  #moves = "";
  #stack = [];
  #ruler = document.createElement("canvas").getContext("2d");

  get font() {
    return this.#font;
  }
  set font(value) {
    this.#font = this.#ruler.font = value;
  }
  measureText(text) {
    return this.#ruler.measureText(text);
  }
  setLineDash(dash) {
    this.#dash = dash;
  }
  save() {
    this.#stack.push(this.#moves);
  }
  restore() {
    this.#moves = this.#stack.pop();
  }
  translate(x, y) {
    this.#moves += `translate(${x} ${y})`;
  }
  rotate(angle) {
    this.#moves += `rotate(${(angle * 180) / Math.PI})`;
  }
  #add(tag, attributes, content = "") {
    const written = Object.entries(attributes).map(([key, value]) => ` ${key}="${typeof value === "number" ? +value.toFixed(2) : value}"`);
    const made = `<${tag}${written.join("")}>${content}</${tag}>`;
    this.parts.push(this.#moves ? `<g transform="${this.#moves}">${made}</g>` : made);
  }
  fillRect(x, y, width, height) {
    this.#add("rect", { x, y, width, height, fill: this.fillStyle });
  }
  strokeRect(x, y, width, height) {
    const dash = this.#dash.length ? { "stroke-dasharray": this.#dash.join(" ") } : {};
    this.#add("rect", { x, y, width, height, fill: "none", stroke: this.strokeStyle, "stroke-width": this.lineWidth, ...dash });
  }
  fillText(text, x, y) {
    const anchor = { left: "start", center: "middle", right: "end" }[this.textAlign];
    // Quotes within an attribute would end it; control characters are no XML.
    const safe = String(text).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "·").replace(/&/g, "&amp;").replace(/</g, "&lt;");
    this.#add("text", { x, y, fill: this.fillStyle, "text-anchor": anchor, "dominant-baseline": "central", "xml:space": "preserve", style: `font:${this.#font.replace(/"/g, "'")}` }, safe);
  }
  drawImage(image, sx, sy, sw, sh, dx, dy, dw, dh) {
    const [x, y] = [Math.floor(sx), Math.floor(sy)];
    const piece = document.createElement("canvas"); // only what is seen of the image goes into the file
    piece.width = Math.ceil(sx + sw) - x;
    piece.height = Math.ceil(sy + sh) - y;
    piece.getContext("2d").drawImage(image, -x, -y);
    const picture = `<image width="${piece.width}" height="${piece.height}" style="image-rendering:pixelated" href="${piece.toDataURL()}"/>`;
    this.#add("svg", { x: dx, y: dy, width: dw, height: dh, viewBox: `${sx - x} ${sy - y} ${sw} ${sh}`, preserveAspectRatio: "none" }, picture);
  }
}
