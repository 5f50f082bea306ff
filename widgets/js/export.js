// Saving what a view shows, for the views whose Python class names this file in `parts`: a menu, files made in the
// browser, and a pen that takes a canvas context's calls and writes SVG.

/**
 * @param {string} name
 * @param {string} type
 * @param {string | Blob} content
 */
function saveFile(name, type, content) {
  const link = node("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/**
 * A "Save" button with a menu of [name, action] entries.
 * @param {Element} parent
 * @param {[string, () => void][]} entries
 */
function saveMenu(parent, entries) {
  const button = node("button", "wb-button", parent, "Save ▾");
  button.type = "button";
  button.setAttribute("aria-haspopup", "menu");
  const menu = node("div", "wb-menu", parent);
  menu.setAttribute("role", "menu");
  menu.setAttribute("aria-label", "Save");
  menu.popover = "auto"; // the browser closes it on Escape and on a click elsewhere
  const items = entries.map(([name, action]) => {
    const item = node("button", "", menu, name);
    item.type = "button";
    item.setAttribute("role", "menuitem");
    item.addEventListener("click", () => {
      menu.hidePopover();
      action();
    });
    return item;
  });
  button.addEventListener("click", () => {
    menu.togglePopover();
    if (!menu.matches(":popover-open")) return;
    const at = button.getBoundingClientRect();
    const below = at.bottom + 4 + menu.offsetHeight < innerHeight;
    menu.style.left = `${Math.max(4, Math.min(at.left, innerWidth - menu.offsetWidth - 4))}px`;
    menu.style.top = `${below ? at.bottom + 4 : at.top - 4 - menu.offsetHeight}px`;
    items[0].focus();
  });
  menu.addEventListener("keydown", (event) => {
    const step = event.key === "ArrowDown" ? 1 : event.key === "ArrowUp" ? -1 : 0;
    if (event.key === "Escape") button.focus();
    event.stopPropagation();
    if (!step) return;
    event.preventDefault();
    const at = items.indexOf(/** @type {HTMLButtonElement} */ (event.target));
    items[(at + step + items.length) % items.length].focus();
  });
  return button;
}

/**
 * Draw with `compose(pen, width, height)` at twice the screen's resolution and save it as PNG.
 * @param {string} name
 * @param {number} width
 * @param {number} height
 * @param {string} surface
 * @param {Compose} compose
 */
function savePng(name, width, height, surface, compose) {
  const canvas = document.createElement("canvas");
  canvas.width = width * 2;
  canvas.height = height * 2;
  const pen = context2d(canvas);
  pen.scale(2, 2);
  pen.fillStyle = surface;
  pen.fillRect(0, 0, width, height);
  compose(pen, width, height);
  canvas.toBlob((blob) => blob && saveFile(`${name}.png`, "image/png", blob));
}

/**
 * The same as SVG: text stays text, a map of cells becomes one embedded picture.
 * @param {string} name
 * @param {number} width
 * @param {number} height
 * @param {string} surface
 * @param {Compose} compose
 */
function saveSvg(name, width, height, surface, compose) {
  const pen = new SvgPen();
  pen.fillStyle = surface;
  pen.fillRect(0, 0, width, height);
  compose(/** @type {Pen} */ (/** @type {unknown} */ (pen)), width, height);
  const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">`;
  saveFile(`${name}.svg`, "image/svg+xml", `${head}${pen.parts.join("")}</svg>\n`);
}

/** @param {string} label */
const fileName = (label) =>
  label
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 80) || "view";
/** @param {string} text */
const csvCell = (text) => (/[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);

// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const NOT_XML = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g;

/** Takes the calls of a canvas context that views draw with, and writes SVG. */
class SvgPen {
  /** @type {string[]} */
  parts = [];
  fillStyle = "#000000";
  strokeStyle = "#000000";
  lineWidth = 1;
  /** @type {"left" | "center" | "right"} */
  textAlign = "left";
  #font = "12px system-ui, sans-serif";
  /** @type {number[]} */
  #dash = [];
  #moves = "";
  /** @type {string[]} */
  #stack = [];
  #ruler = context2d(document.createElement("canvas"));

  get font() {
    return this.#font;
  }
  set font(value) {
    this.#font = this.#ruler.font = value;
  }
  /** @param {string} text */
  measureText(text) {
    return this.#ruler.measureText(text);
  }
  /** @param {number[]} dash */
  setLineDash(dash) {
    this.#dash = dash;
  }
  save() {
    this.#stack.push(this.#moves);
  }
  restore() {
    this.#moves = this.#stack.pop() ?? "";
  }
  /**
   * @param {number} x
   * @param {number} y
   */
  translate(x, y) {
    this.#moves += `translate(${x} ${y})`;
  }
  /** @param {number} angle */
  rotate(angle) {
    this.#moves += `rotate(${(angle * 180) / Math.PI})`;
  }
  /**
   * @param {string} tag
   * @param {Record<string, string | number>} attributes
   */
  #add(tag, attributes, content = "") {
    const written = Object.entries(attributes).map(
      ([key, value]) => ` ${key}="${typeof value === "number" ? +value.toFixed(2) : value}"`,
    );
    const element = `<${tag}${written.join("")}>${content}</${tag}>`;
    this.parts.push(this.#moves ? `<g transform="${this.#moves}">${element}</g>` : element);
  }
  /**
   * @param {number} x
   * @param {number} y
   * @param {number} width
   * @param {number} height
   */
  fillRect(x, y, width, height) {
    this.#add("rect", { x, y, width, height, fill: this.fillStyle });
  }
  /**
   * @param {number} x
   * @param {number} y
   * @param {number} width
   * @param {number} height
   */
  strokeRect(x, y, width, height) {
    /** @type {Record<string, string>} */
    const dash = this.#dash.length ? { "stroke-dasharray": this.#dash.join(" ") } : {};
    this.#add("rect", {
      x,
      y,
      width,
      height,
      fill: "none",
      stroke: this.strokeStyle,
      "stroke-width": this.lineWidth,
      ...dash,
    });
  }
  /**
   * @param {string} text
   * @param {number} x
   * @param {number} y
   */
  fillText(text, x, y) {
    const anchor = { left: "start", center: "middle", right: "end" }[this.textAlign];
    // Quotes within an attribute would end it; control characters are no XML.
    const safe = String(text).replace(NOT_XML, "·").replace(/&/g, "&amp;").replace(/</g, "&lt;");
    this.#add(
      "text",
      {
        x,
        y,
        fill: this.fillStyle,
        "text-anchor": anchor,
        "dominant-baseline": "central",
        "xml:space": "preserve",
        style: `font:${this.#font.replace(/"/g, "'")}`,
      },
      safe,
    );
  }
  /**
   * @param {HTMLCanvasElement} image
   * @param {number} sx
   * @param {number} sy
   * @param {number} sw
   * @param {number} sh
   * @param {number} dx
   * @param {number} dy
   * @param {number} dw
   * @param {number} dh
   */
  drawImage(image, sx, sy, sw, sh, dx, dy, dw, dh) {
    const [x, y] = [Math.floor(sx), Math.floor(sy)];
    const piece = document.createElement("canvas"); // only what is seen of the image goes into the file
    piece.width = Math.ceil(sx + sw) - x;
    piece.height = Math.ceil(sy + sh) - y;
    context2d(piece).drawImage(image, -x, -y);
    const picture = `<image width="${piece.width}" height="${piece.height}" style="image-rendering:pixelated" href="${piece.toDataURL()}"/>`;
    this.#add(
      "svg",
      { x: dx, y: dy, width: dw, height: dh, viewBox: `${sx - x} ${sy - y} ${sw} ${sh}`, preserveAspectRatio: "none" },
      picture,
    );
  }
}
