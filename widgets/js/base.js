// Shared by all views. Python puts this text (and THEMES, the colours) before each view's own: see workbench_widgets/views/view.py.
// Only model.get, set, save_changes, on and off are used: what both anywidget and Panel have.

const DTYPES = [Uint8Array, Int32Array, Float32Array];

/**
 * An array from the bytes that wire.py packs.
 * @param {Packed} view
 * @returns {{ shape: number[], data: Numbers }}
 */
function unpack(view) {
  if (!view || view.byteLength < 16) return { shape: [0], data: new Uint8Array(0) };
  const Type = DTYPES[view.getUint8(0)];
  const shape = [4, 8, 12].slice(0, view.getUint8(1)).map((at) => view.getUint32(at, true));
  const from = view.byteOffset + 16;
  const bytes = view.buffer.slice(from, view.byteOffset + view.byteLength); // a copy: values must start at a multiple of four
  return { shape, data: new Type(/** @type {ArrayBuffer} */ (bytes)) };
}

/**
 * An element within `parent`, with a class and a text where they are given.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} [className]
 * @param {ParentNode | null} [parent]
 * @param {string} [text]
 * @returns {HTMLElementTagNameMap[Tag]}
 */
function node(tag, className, parent, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function hostIsDark() {
  const { body, documentElement } = document;
  if (body.dataset.jpThemeLight !== undefined) return body.dataset.jpThemeLight === "false"; // JupyterLab
  if (body.dataset.vscodeThemeKind) return /dark|high-contrast$/.test(body.dataset.vscodeThemeKind);
  if (documentElement.getAttribute("theme")) return documentElement.getAttribute("theme") === "dark"; // Colab
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/**
 * The frame of every view: a root element, repainting once a frame after any change of data, size or theme, a tooltip and a
 * line for screen readers. `build(view)` makes the content and returns paint(dirty), where `dirty` holds the names of the
 * fields that changed, and "size", "theme".
 * @template Fields
 * @param {Host} host
 * @param {string} label
 * @param {(keyof Fields & string)[]} fields
 * @param {(view: View<Fields>) => Paint} build
 */
function mount({ model, el }, label, fields, build) {
  const root = node("section", "wb-view", el);
  root.setAttribute("aria-label", label);
  /** @type {Set<string>} */
  const dirty = new Set([...fields, "size", "theme"]);
  let frame = 0;
  /** @type {Paint} */
  let paint = () => {};
  /** @type {View<Fields>} */
  const view = {
    model,
    root,
    get: (name) => model.get(String(name)),
    commit(name, value) {
      model.set(String(name), value);
      model.save_changes();
      view.touch(String(name)); // hosts differ in whether they report a change to the one who made it
    },
    touch(name) {
      dirty.add(name);
      if (!frame) frame = requestAnimationFrame(refresh);
    },
    theme: THEMES.light,
    ...makeTooltip(root),
  };

  function refresh() {
    frame = 0;
    const wanted = model.get("dark");
    const dark = wanted ?? hostIsDark();
    view.theme = dark ? THEMES.dark : THEMES.light;
    root.classList.toggle("wb-dark", dark);
    root.classList.toggle("wb-own-surface", wanted !== null && wanted !== undefined);
    const now = new Set(dirty);
    dirty.clear();
    const began = performance.now();
    if (root.clientWidth > 0) paint(now);
    else for (const name of now) dirty.add(name); // hidden (a closed tab): the observer calls again when it shows
    root.dataset.paintMs = (performance.now() - began).toFixed(1);
  }

  /** @type {[string, () => void][]} */
  const handlers = [...fields, "dark"].map((name) => [
    `change:${name}`,
    () => view.touch(name === "dark" ? "theme" : name),
  ]);
  for (const [event, handler] of handlers) model.on(event, handler);
  let width = -1;
  const sizes = new ResizeObserver(() => {
    if (root.clientWidth !== width) {
      width = root.clientWidth;
      view.touch("size");
    }
  });
  sizes.observe(root);
  const themes = new MutationObserver(() => view.touch("theme"));
  themes.observe(document.body, {
    attributes: true,
    attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"],
  });
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const onPrefers = () => view.touch("theme");
  prefers.addEventListener("change", onPrefers);
  paint = build(view);
  view.touch("size");

  return () => {
    cancelAnimationFrame(frame);
    sizes.disconnect();
    themes.disconnect();
    prefers.removeEventListener("change", onPrefers);
    for (const [event, handler] of handlers) model.off(event, handler);
    root.remove();
  };
}

/**
 * @param {HTMLElement} root
 * @returns {Tooltip}
 */
function makeTooltip(root) {
  const tip = node("div", "wb-tip", root);
  tip.setAttribute("role", "tooltip");
  tip.popover = "manual"; // the top layer: no scrolling box of a host cuts it off
  const live = node("div", "wb-live", root);
  live.setAttribute("aria-live", "polite");
  return {
    tip(x, y, lines) {
      tip.replaceChildren(...lines.map((line, i) => node("div", i ? "" : "wb-tip-head", null, line)));
      if (!tip.matches(":popover-open")) tip.showPopover();
      const box = tip.getBoundingClientRect();
      const left = x + 14 + box.width > innerWidth ? x - box.width - 10 : x + 14;
      const top = y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${Math.max(4, top)}px`;
    },
    untip() {
      if (tip.matches(":popover-open")) tip.hidePopover();
    },
    say(text) {
      live.textContent = text;
    },
  };
}

/**
 * @param {string} hex
 * @returns {Rgb}
 */
function rgb(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/**
 * 256 colours between `stops`.
 * @param {string[]} stops
 * @returns {Rgb[]}
 */
function ramp(stops) {
  const colours = stops.map(rgb);
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (colours.length - 1);
    const low = Math.min(Math.floor(at), colours.length - 2);
    const between = (/** @type {number} */ c) => {
      const from = colours[low][c];
      return Math.round(from + (colours[low + 1][c] - from) * (at - low));
    };
    return [between(0), between(1), between(2)];
  });
}

/** @param {Rgb} colour */
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/**
 * A canvas of its own that holds a picture.
 * @param {ImageData} picture
 */
function sheetOf(picture) {
  const sheet = document.createElement("canvas");
  sheet.width = picture.width;
  sheet.height = picture.height;
  context2d(sheet).putImageData(picture, 0, 0);
  return sheet;
}

/**
 * Black or white, whichever reads better on a colour (relative luminance as in WCAG 2).
 * @param {Rgb} colour
 */
function inkOn(colour) {
  const [r, g, b] = colour.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

/** @param {HTMLCanvasElement} canvas */
function context2d(canvas) {
  const context = canvas.getContext("2d");
  if (!context) throw new Error("this browser gives no 2d context");
  return context;
}

/**
 * Make a canvas `width` x `height` CSS pixels with sharp device pixels; returns its 2d context, cleared.
 * @param {HTMLCanvasElement} canvas
 * @param {number} width
 * @param {number} height
 */
function fit(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  const context = context2d(canvas);
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  } else {
    // A new backing store for each frame would cost more than the frame.
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, across, down);
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/**
 * Round numbers in [low, high), at most `most` of them or so.
 * @param {number} low
 * @param {number} high
 * @param {number} most
 */
function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const step = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? 10 * power);
  const first = Math.ceil(low / step) * step;
  return Array.from({ length: Math.max(0, Math.ceil((high - first) / step)) }, (_, i) => first + i * step);
}

/**
 * @param {number} value
 * @param {number} low
 * @param {number} high
 */
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/**
 * A number for people: three figures, no long tails.
 * @param {number | null | undefined} value
 */
function short(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const CONTROL = /[\u0000-\u001f\u007f]/g;

/**
 * A token as one can read it: line breaks and blanks shown.
 * @param {string} token
 */
function visible(token) {
  return token === "" ? "∅" : token.replace(/\n/g, "⏎").replace(/\t/g, "⇥   ").replace(CONTROL, "·");
}

/** @param {string} token */
const quoted = (token) => `“${visible(token).replace(/^ +$/, (blanks) => "␣".repeat(blanks.length))}”`;
/** @param {number} value */
const count = (value) => value.toLocaleString("en-US");
/** @param {number} share */
const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
/**
 * Whole numbers from `low` up to `high`, which is not one of them.
 * @param {number} low
 * @param {number} high
 */
const span = (low, high) => (high - low > 1 ? `${count(low)}–${count(high - 1)}` : count(low));

/**
 * Do what a key stands for, and keep it from the host: JupyterLab would take arrow keys for its cells.
 * @param {KeyboardEvent} event
 * @param {Record<string, () => unknown>} actions
 */
function press(event, actions) {
  const act = actions[event.key];
  if (!act) return;
  event.preventDefault();
  event.stopPropagation();
  act();
}

/**
 * The number of the token under the pointer, -1 for none.
 * @param {MouseEvent} event
 */
function tokenUnder(event) {
  const piece = /** @type {Element} */ (event.target).closest("[data-i]");
  return piece instanceof HTMLElement ? Number(piece.dataset.i) : -1;
}

/**
 * A legend of named colours; null stands for nothing.
 * @param {Element} parent
 * @param {[string | null, string][]} entries
 */
function swatches(parent, entries) {
  parent.replaceChildren(
    ...entries.map(([colour, name]) => {
      const entry = node("span", "wb-swatch");
      const box = node("i", colour ? "" : "wb-none", entry);
      if (colour) box.style.background = colour;
      entry.append(name);
      return entry;
    }),
  );
}

/**
 * A legend for a ramp: a bar of `stops` between two or more labels.
 * @param {Element} parent
 * @param {string[]} stops
 * @param {string[]} labels
 * @param {string} title
 */
function rampLegend(parent, stops, labels, title) {
  const box = node("span", "wb-ramp");
  node("span", "", box, title);
  const bar = node("span", "wb-ramp-bar", box);
  node("i", "", bar).style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const row = node("span", "wb-ramp-labels", bar);
  for (const label of labels) node("span", "", row, label);
  parent.replaceChildren(box);
}
