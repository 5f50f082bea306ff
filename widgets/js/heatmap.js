// A map of any size as 255 levels on a canvas: attention, a difference of two, or one value for each layer and head.

const TOP = 7;
const BOTTOM = 38;
const MOVED_MS = 150; // a moved or zoomed window is told to Python this long after the last move

/**
 * @typedef {object} Fields
 * @property {Packed} tiles
 * @property {Packed} knots
 * @property {Packed} exact
 * @property {Window4} extent
 * @property {string[]} tokens
 * @property {string[]} row_labels
 * @property {string[]} column_labels
 * @property {string} row_title
 * @property {string} column_title
 * @property {string} label
 * @property {string} note
 * @property {string} unit
 * @property {boolean} diverging
 * @property {boolean} brush
 * @property {Pair | null} selected
 * @property {Window4 | null} window
 */

/** First row, end row, first column, end column; half open. */
/** @typedef {[number, number, number, number]} Window4 */

/**
 * The tiles of the whole map or of a part of it; `sheet` is their picture, once it was drawn.
 * @typedef {object} Layer
 * @property {number} rows
 * @property {number} columns
 * @property {Numbers} levels
 * @property {Numbers | null} exact
 * @property {Numbers} knots
 * @property {Window4} extent
 * @property {string} label
 * @property {HTMLCanvasElement | null} sheet
 */

/** What is being marked or moved: from and to are cells, x and y where it began, pan the window before it. */
/** @typedef {{ from: Pair, to: Pair, moved: boolean, x: number, y: number, pan: Window4 | null }} Drag */

/** @returns {Layer} */
const noLayer = () => ({
  rows: 0,
  columns: 0,
  levels: new Uint8Array(0),
  exact: null,
  knots: new Float32Array(0),
  extent: [0, 0, 0, 0],
  label: "",
  sheet: null,
});

/**
 * Whether a window holds another.
 * @param {Window4} a
 * @param {Window4} b
 */
const holds = (a, b) => a[0] <= b[0] && a[1] >= b[1] && a[2] <= b[2] && a[3] >= b[3];
/**
 * @param {Window4 | null} a
 * @param {Window4 | null} b
 */
const same = (a, b) => a === b || (a !== null && b !== null && a.every((edge, i) => edge === b[i]));

/**
 * A number in so few letters that it fits into a cell.
 * @param {number} value
 */
function brief(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(0);
  return String(size < 100 ? Number(value.toPrecision(2)) : Math.round(value)).replace(/^(-?)0\./, "$1.");
}

export default {
  /** @param {Host} host */
  render(host) {
    /** @type {(keyof Fields)[]} */
    const fields = [
      "tiles",
      "knots",
      "exact",
      "extent",
      "tokens",
      "row_labels",
      "column_labels",
      "row_title",
      "column_title",
      "label",
      "note",
      "unit",
      "diverging",
      "selected",
      "window",
      "brush",
    ];
    return mount(host, "Map", fields, (/** @type {View<Fields>} */ view) => {
      const { root, get } = view;
      const head = node("div", "wb-head", root);
      const title = node("span", "wb-title", head);
      const note = node("span", "wb-note", head);
      const trailBox = node("nav", "wb-trail", head);
      trailBox.setAttribute("aria-label", "Where the map is zoomed to");
      const empty = node("div", "wb-empty", root, "Nothing to show yet.");
      const box = node("div", "wb-map", root);
      const canvas = node("canvas", "", box);
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "application");
      const foot = node("div", "wb-foot", root);
      const legend = node("span", "", foot);
      const pinned = node("span", "wb-pinned", foot);
      // What tiles say about the whole map, and in more detail about a part of it while the map is zoomed.
      let whole = noLayer();
      let part = noLayer();
      /** @type {{ left: number, width: number, height: number, shown: Window4 }} */
      let area = { left: 50, width: 1, height: 1, shown: [0, 1, 0, 1] };
      /** @type {Pair | null} row and column of the true map */
      let cursor = null;
      /** @type {Drag | null} */
      let drag = null;
      /** @type {Window4 | null} the window during a move, before Python knows it */
      let live = null;
      /** @type {Window4[]} windows that lead to this one, each within the one before */
      let trail = [];
      let timer = 0;

      const rowLabels = () => (get("row_labels").length ? get("row_labels") : get("tokens"));
      const columnLabels = () => (get("column_labels").length ? get("column_labels") : get("tokens"));
      const ramps = () => (get("diverging") ? view.theme.diverging : view.theme.sequential);

      // -- what is known

      function readLayer() {
        const { shape, data } = unpack(get("tiles"));
        const [rows, columns] = shape.length === 2 ? shape : [0, 0];
        const exact = unpack(get("exact")).data;
        /** @type {Layer} */
        const layer = {
          rows,
          columns,
          levels: data,
          exact: exact.length === data.length ? exact : null,
          knots: unpack(get("knots")).data,
          extent: get("extent"),
          label: get("label"),
          sheet: null,
        };
        if (
          get("window") &&
          layer.label === whole.label &&
          holds(whole.extent, layer.extent) &&
          !same(whole.extent, layer.extent)
        )
          part = layer;
        else {
          whole = layer;
          part = noLayer();
        }
      }

      /**
       * The whole map, as far as anyone knows.
       * @returns {Window4}
       */
      function bounds() {
        const n = get("tokens").length;
        const known = whole.extent;
        return n ? [Math.min(0, known[0]), Math.max(n, known[1]), Math.min(0, known[2]), Math.max(n, known[3])] : known;
      }

      /** @returns {Window4} */
      function shown() {
        const window = live ?? get("window");
        const all = bounds();
        if (!window) return whole.extent;
        /** @type {Window4} */
        const cut = [
          Math.max(window[0], all[0]),
          Math.min(window[1], all[1]),
          Math.max(window[2], all[2]),
          Math.min(window[3], all[3]),
        ];
        return cut[1] > cut[0] && cut[3] > cut[2] ? cut : whole.extent;
      }

      /**
       * @param {Layer} layer
       * @param {number} row
       * @param {number} column
       */
      const covers = (layer, row, column) =>
        layer.rows > 0 &&
        row >= layer.extent[0] &&
        row < layer.extent[1] &&
        column >= layer.extent[2] &&
        column < layer.extent[3];
      /**
       * @param {number} row
       * @param {number} column
       */
      const finest = (row, column) => (covers(part, row, column) ? part : covers(whole, row, column) ? whole : null);

      /**
       * The finest tile known for a true row and column: the true rows and columns it stands for, its value (null for
       * nothing, undefined where nothing is known).
       * @param {number} row
       * @param {number} column
       * @returns {{ rows: Pair, columns: Pair, level: number, value: number | null | undefined, exact: boolean }}
       */
      function tile(row, column) {
        const layer = finest(row, column);
        if (!layer)
          return { rows: [row, row + 1], columns: [column, column + 1], level: 0, value: undefined, exact: false };
        const { rows, columns, levels, exact, knots } = layer;
        const [r0, r1, c0, c1] = layer.extent;
        /**
         * @param {number} i
         * @param {number} size
         * @param {number} low
         * @param {number} high
         */
        const edge = (i, size, low, high) => low + Math.floor((i * (high - low)) / size); // as Python pools
        /**
         * @param {number} at
         * @param {number} size
         * @param {number} low
         * @param {number} high
         * @returns {[number, Pair]}
         */
        const range = (at, size, low, high) => {
          const i = clamp(Math.ceil(((at - low + 1) * size) / (high - low)) - 1, 0, size - 1);
          return [i, [edge(i, size, low, high), Math.max(edge(i, size, low, high) + 1, edge(i + 1, size, low, high))]];
        };
        const [r, trueRows] = range(row, rows, r0, r1);
        const [c, trueColumns] = range(column, columns, c0, c1);
        const level = levels[r * columns + c];
        const number = exact ? exact[r * columns + c] : level ? knots[level - 1] : NaN;
        return {
          rows: trueRows,
          columns: trueColumns,
          level,
          value: Number.isNaN(number) ? null : number,
          exact: exact !== null,
        };
      }

      /** @param {Layer} layer */
      function pictureOf(layer) {
        if (layer.sheet) return layer.sheet;
        const picture = new ImageData(layer.columns, layer.rows);
        const colours = new Uint32Array(256); // level 0 stays transparent
        const shades = ramp(ramps());
        for (let level = 1; level < 256; level++) {
          const [r, g, b] = shades[Math.round(((level - 1) / 254) * 255)];
          colours[level] = (255 << 24) | (b << 16) | (g << 8) | r;
        }
        const out = new Uint32Array(picture.data.buffer);
        for (let i = 0; i < layer.levels.length; i++) out[i] = colours[layer.levels[i]];
        layer.sheet = sheetOf(picture);
        return layer.sheet;
      }

      // -- drawing

      /**
       * @param {string[]} labels
       * @param {number} at
       */
      const label = (labels, at) => (labels.length > at ? labels[at] : count(at));

      /**
       * @param {Pen} context
       * @param {string[]} labels
       * @param {number} low
       * @param {number} high
       * @param {boolean} horizontal
       */
      function axis(context, labels, low, high, horizontal) {
        const { left, width, height } = area;
        const length = horizontal ? width : height;
        const each = length / (high - low);
        const named = labels.length > 0 && each >= (horizontal ? 18 : 12);
        const marks = ticks(low, high, named ? length / (horizontal ? 18 : 12) : length / (horizontal ? 80 : 40));
        context.textAlign = horizontal ? "center" : "right";
        let free = -1e9; // labels never overlap: one that does not fit is left out
        for (const at of marks) {
          const middle = named || each >= 12 ? (at - low + 0.5) * each : (at - low) * each;
          const text = visible(label(named ? labels : [], at)).slice(0, 12);
          if (horizontal) {
            const half = context.measureText(text).width / 2;
            if (middle - half < free) continue;
            free = middle + half + 6;
            context.fillRect(left + middle, TOP + height, 1, 4);
            context.fillText(text, left + middle, TOP + height + 11);
          } else {
            context.fillRect(left - 4, TOP + middle, 4, 1);
            context.fillText(text, left - 8, TOP + middle, left - 22);
          }
        }
      }

      /** @param {number} column */
      const xOf = (column) => area.left + ((column - area.shown[2]) / (area.shown[3] - area.shown[2])) * area.width;
      /** @param {number} row */
      const yOf = (row) => TOP + ((row - area.shown[0]) / (area.shown[1] - area.shown[0])) * area.height;

      /**
       * @param {CanvasRenderingContext2D} context
       * @param {Window4} window
       * @param {string} colour
       * @param {number[]} dash
       */
      function rectangle(context, window, colour, dash) {
        const [r0, r1, c0, c1] = window;
        const { left, width, height, shown: s } = area;
        if (r1 <= s[0] || r0 >= s[1] || c1 <= s[2] || c0 >= s[3]) return;
        const [x0, x1] = [xOf(c0), xOf(c1)].map((x) => clamp(x, left, left + width));
        const [y0, y1] = [yOf(r0), yOf(r1)].map((y) => clamp(y, TOP, TOP + height));
        context.setLineDash(dash);
        for (const { stroke, width: wide } of [
          { stroke: view.theme.surface, width: 4 },
          { stroke: colour, width: 2 },
        ]) {
          context.strokeStyle = stroke;
          context.lineWidth = wide;
          context.strokeRect(x0 - 1, y0 - 1, Math.max(4, x1 - x0) + 2, Math.max(4, y1 - y0) + 2);
        }
        context.setLineDash([]);
        context.lineWidth = 1;
      }

      /**
       * @param {Pen} context
       * @param {Layer} layer
       */
      function paintLayer(context, layer) {
        const { shown: s } = area;
        const [r0, r1, c0, c1] = layer.extent;
        const cut = [Math.max(s[0], r0), Math.min(s[1], r1), Math.max(s[2], c0), Math.min(s[3], c1)];
        if (cut[1] <= cut[0] || cut[3] <= cut[2]) return;
        const across = layer.columns / (c1 - c0);
        const down = layer.rows / (r1 - r0);
        /** @type {Window4} */
        const source = [
          (cut[2] - c0) * across,
          (cut[0] - r0) * down,
          (cut[3] - cut[2]) * across,
          (cut[1] - cut[0]) * down,
        ];
        /** @type {Window4} */
        const place = [xOf(cut[2]), yOf(cut[0]), xOf(cut[3]) - xOf(cut[2]), yOf(cut[1]) - yOf(cut[0])];
        context.imageSmoothingEnabled = source[2] > place[2] && source[3] > place[3];
        context.imageSmoothingQuality = "high";
        context.drawImage(pictureOf(layer), ...source, ...place);
      }

      /**
       * The values themselves, where cells are large enough and stand for single rows and columns.
       * @param {Pen} context
       */
      function paintNumbers(context) {
        const { width, height, shown: s } = area;
        const [wide, tall] = [width / (s[3] - s[2]), height / (s[1] - s[0])];
        if (wide < 34 || tall < 13) return;
        const shades = ramp(ramps());
        context.font = `${tall < 15 ? 10 : 11}px system-ui, sans-serif`;
        context.textAlign = "center";
        for (let row = s[0]; row < s[1]; row++) {
          for (let column = s[2]; column < s[3]; column++) {
            const there = tile(row, column);
            if (
              !there.exact ||
              !there.level ||
              there.value == null ||
              there.rows[1] - there.rows[0] > 1 ||
              there.columns[1] - there.columns[0] > 1
            )
              continue;
            context.fillStyle = inkOn(shades[Math.round(((there.level - 1) / 254) * 255)]);
            context.fillText(brief(there.value), xOf(column + 0.5), yOf(row + 0.5));
          }
        }
      }

      /** @param {Pen} context */
      function paintMap(context) {
        const { muted, line } = view.theme;
        const { left, width, height, shown: s } = area;
        if (!(part.rows && holds(part.extent, s))) paintLayer(context, whole);
        if (part.rows) paintLayer(context, part);
        context.textBaseline = "middle";
        paintNumbers(context);
        context.lineWidth = 1;
        context.strokeStyle = line;
        context.strokeRect(left - 0.5, TOP - 0.5, width + 1, height + 1);
        context.font = "12px system-ui, sans-serif";
        context.fillStyle = muted;
        axis(context, columnLabels(), s[2], s[3], true);
        axis(context, rowLabels(), s[0], s[1], false);
        context.textAlign = "center";
        context.fillText(get("column_title"), left + width / 2, TOP + height + 28);
        context.save();
        context.translate(8, TOP + height / 2);
        context.rotate(-Math.PI / 2);
        context.fillText(get("row_title"), 0, 0);
        context.restore();
      }

      /**
       * @param {Pair} cell
       * @returns {Window4}
       */
      const cellOf = ([row, column]) => {
        const there = tile(row, column);
        return [...there.rows, ...there.columns];
      };

      function draw() {
        if (!whole.rows) return;
        area.shown = shown();
        const { mark, accent } = view.theme;
        const context = fit(canvas, area.left + area.width + 8, TOP + area.height + BOTTOM);
        paintMap(context);
        const selected = get("selected");
        if (selected) rectangle(context, cellOf(selected), mark, []);
        if (drag?.moved) rectangle(context, extentOf(drag), accent, [5, 3]);
        else if (cursor) rectangle(context, cellOf(cursor), accent, [4, 3]);
      }

      // -- in words

      /**
       * @param {Drag} drag
       * @returns {Window4}
       */
      const extentOf = ({ from, to }) => [
        Math.min(from[0], to[0]),
        Math.max(from[0], to[0]) + 1,
        Math.min(from[1], to[1]),
        Math.max(from[1], to[1]) + 1,
      ];

      /**
       * @param {number} row
       * @param {number} column
       */
      function describe(row, column) {
        const there = tile(row, column);
        /**
         * @param {string[]} labels
         * @param {Pair} range
         */
        const name = (labels, [low, high]) =>
          labels.length > low && high - low === 1
            ? `${span(low, high)} ${quoted(labels[low])}`
            : labels.length >= high
              ? `${span(low, high)} ${quoted(labels[low])} … ${quoted(labels[high - 1])}`
              : span(low, high);
        const [r, c] = [there.rows[1] - there.rows[0], there.columns[1] - there.columns[0]];
        const number = there.exact ? String(Number(there.value?.toPrecision(5))) : `about ${short(there.value)}`;
        const value =
          there.value === undefined
            ? "not computed yet"
            : there.value === null
              ? "nothing"
              : `${number}${get("unit") ? ` ${get("unit")}` : ""}`;
        return [
          r * c > 1 && there.value != null ? `${value} (pooled over ${r} × ${c})` : value,
          `${get("row_title") || "row"} ${name(rowLabels(), there.rows)}`,
          `${get("column_title") || "column"} ${name(columnLabels(), there.columns)}`,
        ];
      }

      /** @param {Window4} window */
      const windowName = ([r0, r1, c0, c1]) => `${span(r0, r1)} × ${span(c0, c1)}`;

      function drawTrail() {
        const window = get("window");
        trailBox.replaceChildren();
        if (!window) return;
        const steps = [null, ...trail];
        steps.forEach((step, i) => {
          const name = step ? windowName(step) : "Whole map";
          if (i) node("span", "", trailBox, "›");
          if (i === steps.length - 1) {
            node("b", "", trailBox, name);
            return;
          }
          const button = node("button", "wb-button", trailBox, name);
          button.type = "button";
          button.addEventListener("click", () => open(step));
        });
      }

      function drawPinned() {
        const selected = get("selected");
        pinned.textContent = selected && get("brush") && finest(...selected) ? describe(...selected).join(" · ") : "";
      }

      // -- moving

      /**
       * The row and column under the pointer; null beside the map, unless the nearest is wanted.
       * @param {MouseEvent} event
       * @returns {Pair | null}
       */
      function at(event, strict = true) {
        const { left, width, height, shown: s } = area;
        const x = (event.offsetX - left) / width;
        const y = (event.offsetY - TOP) / height;
        if (strict && (x < 0 || x >= 1 || y < 0 || y >= 1)) return null;
        /**
         * @param {number} part
         * @param {number} low
         * @param {number} high
         */
        const inside = (part, low, high) => clamp(Math.floor(low + part * (high - low)), low, high - 1);
        return [inside(y, s[0], s[1]), inside(x, s[2], s[3])];
      }

      /** @param {Pair} cell */
      const choose = (cell) => {
        const now = get("selected");
        view.commit("selected", now && now[0] === cell[0] && now[1] === cell[1] ? null : cell);
      };

      /**
       * Put a window at the end of the trail, after those that hold it.
       * @param {Window4 | null} window
       */
      function follow(window) {
        if (!window) trail = [];
        else {
          const kept = trail.findLastIndex((step) => holds(step, window) && !same(step, window));
          trail = [...trail.slice(0, kept + 1), window].slice(-5);
        }
      }

      /** @param {Window4 | null} window */
      const open = (window) => {
        drag = null;
        live = null;
        clearTimeout(timer);
        view.untip();
        follow(window);
        view.commit("window", window);
      };

      /**
       * Show a window at once, and tell Python when the moving ends.
       * @param {Window4} window
       */
      function glide(window) {
        live = window;
        view.touch("live");
        clearTimeout(timer);
        timer = setTimeout(() => open(same(window, bounds()) ? null : window), MOVED_MS);
      }

      /**
       * The window of another size around a point that stays where it is; within the whole map.
       * @param {number} factor
       * @param {Pair} point
       * @returns {Window4}
       */
      function zoomed(factor, [row, column]) {
        const s = shown(); // what is asked for: a key may follow another within one frame
        const all = bounds();
        /**
         * @param {number} low
         * @param {number} high
         * @param {number} least
         * @param {number} most
         * @param {number} point
         * @returns {Pair}
         */
        const cut = (low, high, least, most, point) => {
          const size = clamp(Math.round((high - low) * factor), Math.min(4, most - least), most - least);
          const from = clamp(Math.round(point + 0.5 - ((point + 0.5 - low) / (high - low)) * size), least, most - size);
          return [from, from + size];
        };
        return [...cut(s[0], s[1], all[0], all[1], row), ...cut(s[2], s[3], all[2], all[3], column)];
      }

      /**
       * @param {number} rows
       * @param {number} columns
       * @returns {Window4}
       */
      function moved(rows, columns, from = shown()) {
        const all = bounds();
        const r = clamp(from[0] + rows, all[0], all[1] - (from[1] - from[0]));
        const c = clamp(from[2] + columns, all[2], all[3] - (from[3] - from[2]));
        return [r, r + from[1] - from[0], c, c + from[3] - from[2]];
      }

      canvas.addEventListener("pointerdown", (event) => {
        const hit = event.button === 0 && at(event);
        if (!hit) return;
        canvas.setPointerCapture(event.pointerId);
        drag = {
          from: hit,
          to: hit,
          x: event.clientX,
          y: event.clientY,
          moved: false,
          pan: event.shiftKey && get("brush") ? area.shown : null,
        };
      });
      canvas.addEventListener("pointermove", (event) => {
        if (drag && event.buttons) {
          drag.moved ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 5;
          if (!drag.moved || !get("brush")) return;
          if (drag.pan) {
            const [r0, r1, c0, c1] = drag.pan;
            live = moved(
              Math.round(((drag.y - event.clientY) / area.height) * (r1 - r0)),
              Math.round(((drag.x - event.clientX) / area.width) * (c1 - c0)),
              drag.pan,
            );
          } else {
            drag.to = at(event, false) ?? drag.to;
            const [r0, r1, c0, c1] = extentOf(drag);
            view.tip(event.clientX, event.clientY, [
              "zoom to",
              `${get("row_title") || "rows"} ${span(r0, r1)}`,
              `${get("column_title") || "columns"} ${span(c0, c1)}`,
            ]);
          }
          view.touch("live");
          return;
        }
        const hit = at(event);
        if (hit) view.tip(event.clientX, event.clientY, describe(...hit));
        else view.untip();
      });
      canvas.addEventListener("pointerup", (event) => {
        if (!drag) return;
        const { moved: far, from, pan } = drag;
        if (far && pan) open(live && !same(live, bounds()) ? live : get("window"));
        else if (far && get("brush")) open(extentOf(drag));
        else if (!far && event.detail < 2) choose(from);
        drag = null;
      });
      canvas.addEventListener("pointercancel", () => {
        drag = live = null;
        draw();
      });
      canvas.addEventListener(
        "wheel",
        (event) => {
          if (!get("brush") || !(event.ctrlKey || event.metaKey)) return; // a plain wheel scrolls the page
          const hit = at(event);
          if (!hit) return;
          event.preventDefault();
          glide(zoomed(clamp(1.0015 ** event.deltaY, 0.5, 2), hit));
        },
        { passive: false },
      );
      canvas.addEventListener("dblclick", () => get("brush") && open(null));
      canvas.addEventListener("pointerleave", view.untip);
      canvas.addEventListener("blur", () => {
        drag = cursor = null;
        view.untip();
        draw();
      });

      /** Tell of the cell under the cursor, beside it and to screen readers. */
      function tellCursor() {
        if (!cursor) return;
        const frame = canvas.getBoundingClientRect();
        const lines = describe(...cursor);
        view.say(lines.join(", "));
        view.tip(frame.left + xOf(cursor[1] + 1), frame.top + yOf(cursor[0] + 1), lines);
      }

      /**
       * @param {Pair} by
       * @param {boolean} marking
       */
      function step(by, marking) {
        const s = shown();
        const steps = cursor ? [cellOf(cursor)] : [];
        const size = steps.length ? [steps[0][1] - steps[0][0], steps[0][3] - steps[0][2]] : [1, 1];
        const from = cursor ?? get("selected");
        const inside = from && from[0] >= s[0] && from[0] < s[1] && from[1] >= s[2] && from[1] < s[3];
        const all = bounds();
        /** @type {Pair} */
        const next = inside
          ? [clamp(from[0] + by[0] * size[0], all[0], all[1] - 1), clamp(from[1] + by[1] * size[1], all[2], all[3] - 1)]
          : [s[0], s[2]];
        if (marking && get("brush"))
          drag = { from: drag?.from ?? (inside ? from : next), to: next, moved: true, x: 0, y: 0, pan: null };
        else drag = null;
        cursor = next;
        const out = [
          Math.min(0, next[0] - s[0]) + Math.max(0, next[0] - s[1] + 1),
          Math.min(0, next[1] - s[2]) + Math.max(0, next[1] - s[3] + 1),
        ];
        /** A quarter of the window at least. */
        const jump = (/** @type {number} */ far, /** @type {number} */ size) =>
          Math.sign(far) * Math.max(Math.abs(far), Math.round(size / 4));
        if (out[0] || out[1]) glide(moved(jump(out[0], s[1] - s[0]), jump(out[1], s[3] - s[2])));
        draw();
        tellCursor();
      }

      /** @param {number} factor */
      function zoomBy(factor) {
        if (!get("brush")) return;
        const s = shown();
        const window = zoomed(factor, cursor ?? [(s[0] + s[1]) >> 1, (s[2] + s[3]) >> 1]);
        if (!same(window, s)) open(same(window, bounds()) ? null : window);
        view.say(same(window, bounds()) ? "whole map" : `zoomed to ${windowName(window)}`);
      }

      canvas.addEventListener("keydown", (event) => {
        if (!whole.rows || event.ctrlKey || event.metaKey || event.altKey) return;
        press(event, {
          ArrowUp: () => step([-1, 0], event.shiftKey),
          ArrowDown: () => step([1, 0], event.shiftKey),
          ArrowLeft: () => step([0, -1], event.shiftKey),
          ArrowRight: () => step([0, 1], event.shiftKey),
          "+": () => zoomBy(0.5),
          "=": () => zoomBy(0.5),
          "-": () => zoomBy(2),
          Enter: () => (drag?.moved ? open(extentOf(drag)) : get("brush") ? zoomBy(0.25) : cursor && choose(cursor)),
          " ": () => cursor && choose(cursor),
          Escape() {
            if (drag) {
              drag = null;
              draw();
            } else if (get("window")) open(trail.at(-2) ?? null);
            else view.commit("selected", null);
          },
        });
      });

      // -- saving

      const wide = () => area.left + area.width + 24;
      const tall = () => TOP + area.height + BOTTOM + 76;

      /** @type {Compose} */
      function compose(pen, width, height) {
        pen.textBaseline = "middle";
        pen.fillStyle = view.theme.ink;
        pen.textAlign = "left";
        pen.font = "600 13px system-ui, sans-serif";
        pen.fillText([get("label") || "Map", get("note")].filter(Boolean).join("; "), 8, 15);
        pen.save();
        pen.translate(0, 26);
        paintMap(pen);
        pen.restore();
        const layer = part.rows ? part : whole;
        const length = Math.min(300, width - area.left - 24);
        const shades = ramp(ramps());
        for (let i = 0; i < 100; i++) {
          pen.fillStyle = css(shades[Math.round((i / 99) * 255)]);
          pen.fillRect(area.left + (i * length) / 100, height - 38, length / 100 + 0.3, 10);
        }
        pen.fillStyle = view.theme.muted;
        pen.textAlign = "center";
        known(layer).forEach((text, i) => {
          pen.fillText(text, area.left + (i * length) / 4, height - 18);
        });
      }

      /** @param {Layer} layer */
      const known = (layer) => Array.from({ length: 5 }, (_, i) => short(layer.knots[Math.round((i * 254) / 4)]));

      /** The cells in view as numbers: edges of rows and columns, and values; exact where single floats were sent. */
      function cells() {
        const s = area.shown;
        const layer = part.rows && holds(part.extent, s) ? part : whole;
        /**
         * @param {number} size
         * @param {number} low
         * @param {number} high
         * @param {number} from
         * @param {number} to
         */
        const along = (size, low, high, from, to) => {
          const starts = Array.from({ length: size + 1 }, (_, i) => low + Math.floor((i * (high - low)) / size));
          return starts
            .slice(0, -1)
            .map((start, i) => ({ range: /** @type {Pair} */ ([start, starts[i + 1]]), i }))
            .filter(({ range: [start, end] }) => end > from && start < to);
        };
        const [r0, r1, c0, c1] = layer.extent;
        const rows = along(layer.rows, r0, r1, s[0], s[1]);
        const columns = along(layer.columns, c0, c1, s[2], s[3]);
        /**
         * @param {number} r
         * @param {number} c
         */
        const value = (r, c) => {
          const i = r * layer.columns + c;
          const number = layer.exact ? layer.exact[i] : (layer.knots[layer.levels[i] - 1] ?? NaN);
          return Number.isNaN(number) ? null : Number(number.toPrecision(7));
        };
        return {
          rows: rows.map(({ range }) => range),
          columns: columns.map(({ range }) => range),
          values: rows.map(({ i: r }) => columns.map(({ i: c }) => value(r, c))),
          exact: layer.exact !== null,
        };
      }

      /**
       * @param {string[]} labels
       * @param {Pair} range
       */
      const named = (labels, [low, high]) =>
        high - low === 1 && labels.length > low
          ? `${low} ${labels[low]}`
          : high - low === 1
            ? String(low)
            : `${low}-${high - 1}`;

      function toCsv() {
        const { rows, columns, values } = cells();
        const corner = `${get("row_title") || "row"} \\ ${get("column_title") || "column"}`;
        const lines = [[corner, ...columns.map((range) => named(columnLabels(), range))].map(csvCell).join(",")];
        rows.forEach((range, i) => {
          lines.push(`${csvCell(named(rowLabels(), range))},${values[i].map((v) => v ?? "").join(",")}`);
        });
        return `${lines.join("\n")}\n`;
      }

      function toJson() {
        const { rows, columns, values, exact } = cells();
        /** @param {Pair[]} ranges */
        const edges = (ranges) => [...ranges.map(([low]) => low), ranges[ranges.length - 1][1]];
        /**
         * @param {string[]} labels
         * @param {Pair[]} ranges
         */
        const texts = (labels, ranges) => labels.slice(ranges[0][0], ranges[ranges.length - 1][1]);
        return JSON.stringify({
          label: get("label"),
          unit: get("unit"),
          exact,
          rows: { title: get("row_title"), edges: edges(rows), labels: texts(rowLabels(), rows) },
          columns: { title: get("column_title"), edges: edges(columns), labels: texts(columnLabels(), columns) },
          values,
        });
      }

      const name = () => fileName(get("label") || "map");
      const save = saveMenu(foot, [
        ["Picture (PNG)", () => savePng(name(), wide(), tall(), view.theme.surface, compose)],
        ["Drawing (SVG)", () => saveSvg(name(), wide(), tall(), view.theme.surface, compose)],
        ["Cells as a table (CSV)", () => saveFile(`${name()}.csv`, "text/csv", toCsv())],
        ["Cells and tokens (JSON)", () => saveFile(`${name()}.json`, "application/json", toJson())],
      ]);

      return (dirty) => {
        if (dirty.size === 1 && dirty.has("live")) return draw();
        if (["tiles", "knots", "exact", "extent"].some((field) => dirty.has(field))) readLayer();
        if (dirty.has("theme") || dirty.has("diverging")) whole.sheet = part.sheet = null;
        const window = get("window");
        if (dirty.has("window") && !same(window, trail.at(-1) ?? null)) follow(window);
        if (!window) part = noLayer();
        const some = whole.rows > 0 && whole.columns > 0;
        title.textContent = get("label");
        root.setAttribute("aria-label", get("label") || "Map");
        empty.style.display = some ? "none" : "";
        box.style.display = foot.style.display = some ? "" : "none";
        note.textContent = get("note");
        drawTrail();
        if (!some) return;
        const brush = get("brush");
        canvas.setAttribute(
          "aria-label",
          `${get("label") || "Map"}: arrow keys move, ${brush ? "Enter zooms in on the cell, plus and minus zoom, Shift and arrows mark a part, Escape goes back out, Space pins a cell" : "Enter selects, Escape clears"}`,
        );
        if (brush)
          note.textContent = [get("note"), window ? "Escape goes back out" : "drag to zoom in"]
            .filter(Boolean)
            .join("; ");
        const s = shown();
        const rows = rowLabels();
        const longest =
          rows.length && s[1] - s[0] <= 60
            ? Math.max(...rows.slice(s[0], s[1]).map((text) => Math.min(12, text.length)))
            : 0;
        const left = longest ? clamp(28 + 6.5 * longest, 52, 110) : 62;
        const width = Math.max(80, box.clientWidth - left - 8);
        // Cells are drawn square where the room allows: a grid of a few rows stays low, a large map fills 560 pixels.
        const square = (width * (s[1] - s[0])) / (s[3] - s[2]);
        const low = Math.min(square, (s[1] - s[0]) * 26);
        area = {
          left,
          width,
          height: Math.round(
            clamp(
              brush || whole.rows > 64 ? square : low,
              brush && get("tokens").length ? Math.min(width, 320) : 60,
              560,
            ),
          ),
          shown: s,
        };
        save.hidden = false;
        const layer = part.rows ? part : whole;
        rampLegend(legend, ramps(), known(layer), get("unit") || "value");
        draw();
        drawPinned();
      };
    });
  },
};
