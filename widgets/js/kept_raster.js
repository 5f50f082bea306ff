// Which positions stay, for every layer and KV head: a row each, positions from left to right.

const LEFT = 46;
const RIGHT = 70; // the share each row keeps, as bars
const TOP = 4;
const BOTTOM = 34;

/**
 * @typedef {object} Fields
 * @property {Packed} kept
 * @property {number} layers
 * @property {number[]} numbers
 * @property {number} heads
 * @property {number} positions
 * @property {string[]} tiers
 * @property {string[]} tokens
 * @property {string} label
 * @property {Pair | null} selected
 * @property {number | null} marked
 */

export default {
  /** @param {Host} host */
  render(host) {
    return mount(
      host,
      "Kept positions by layer and head",
      ["kept", "layers", "numbers", "heads", "positions", "tiers", "tokens", "label", "selected", "marked"],
      (/** @type {View<Fields>} */ view) => {
        const { root, get } = view;
        const head = node("div", "wb-head", root);
        const title = node("span", "wb-title", head);
        const note = node("span", "wb-note", head);
        const legend = node("span", "wb-legend", head);
        const empty = node("div", "wb-empty", root, "No plan to show yet.");
        const box = node("div", "wb-map", root);
        const canvas = node("canvas", "", box);
        canvas.tabIndex = 0;
        canvas.setAttribute("role", "application");
        canvas.setAttribute(
          "aria-label",
          "Kept positions: up and down choose a layer and head, left and right a position, Enter selects, Escape clears",
        );
        /** @type {Numbers} [rows, columns] */
        let tier = new Uint8Array(0);
        /** @type {Numbers | null} [rows, columns], 0..255, where columns are pooled positions */
        let share = null;
        let [rows, columns] = [0, 0];
        /** @type {number[]} */
        let rowShare = [];
        /** @type {HTMLCanvasElement | null} */
        let image = null;
        /** @type {Pair | null} row, position */
        let cursor = null;
        let geometry = { width: 1, rowHeight: 1 };

        /**
         * @param {number} row
         * @param {number} from
         * @param {number} to
         */
        const keptIn = (row, from, to) => {
          let sum = 0;
          for (let c = from; c < to; c++)
            sum += share ? share[row * columns + c] / 255 : Number(tier[row * columns + c] > 0);
          return sum / Math.max(1, to - from);
        };

        function readData() {
          const { shape, data } = unpack(get("kept"));
          const pooled = shape.length === 3;
          [rows, columns] = shape.slice(-2).length === 2 ? shape.slice(-2) : [0, 0];
          tier = pooled ? data.subarray(0, rows * columns) : data;
          share = pooled ? data.subarray(rows * columns) : null;
          rowShare = Array.from({ length: rows }, (_, row) => keptIn(row, 0, columns));
        }

        /**
         * One picture pixel for each column or screen pixel, whichever are fewer; colours of what falls together are averaged.
         * @param {number} pixels
         */
        function makeImage(pixels) {
          const wide = Math.max(1, Math.min(columns, pixels));
          const picture = new ImageData(wide, rows);
          const { categories, surface } = view.theme;
          const none = rgb(surface);
          const colours = categories.map(rgb);
          for (let row = 0; row < rows; row++) {
            for (let x = 0; x < wide; x++) {
              const from = Math.floor((x * columns) / wide);
              const to = Math.max(from + 1, Math.floor(((x + 1) * columns) / wide));
              let r = 0;
              let g = 0;
              let b = 0;
              for (let c = from; c < to; c++) {
                const at = row * columns + c;
                const part = tier[at] === 0 ? 0 : share ? share[at] / 255 : 1;
                const colour = tier[at] === 0 ? none : colours[(tier[at] - 1) % colours.length];
                r += none[0] + (colour[0] - none[0]) * part;
                g += none[1] + (colour[1] - none[1]) * part;
                b += none[2] + (colour[2] - none[2]) * part;
              }
              const out = 4 * (row * wide + x);
              picture.data[out] = r / (to - from);
              picture.data[out + 1] = g / (to - from);
              picture.data[out + 2] = b / (to - from);
              picture.data[out + 3] = 255;
            }
          }
          return sheetOf(picture);
        }

        function draw() {
          const { ink, muted, line, mark, accent, surface } = view.theme;
          const { width, rowHeight } = geometry;
          const height = rows * rowHeight;
          const context = fit(canvas, LEFT + width + RIGHT, TOP + height + BOTTOM);
          const n = get("positions");
          const heads = get("heads");
          /** @param {number} position */
          const x = (position) => LEFT + (position / n) * width;
          context.imageSmoothingEnabled = false;
          if (image) context.drawImage(image, LEFT, TOP, width, height);
          context.strokeStyle = line;
          context.lineWidth = 1;
          context.strokeRect(LEFT - 0.5, TOP - 0.5, width + 1, height + 1);
          context.font = "12px system-ui, sans-serif";
          context.textBaseline = "middle";
          context.textAlign = "right";
          const layerHeight = heads * rowHeight;
          const every = Math.max(1, Math.ceil(15 / layerHeight));
          const step = [1, 2, 5, 10, 20, 50].find((s) => s >= every) ?? every;
          for (let layer = 0; layer < get("layers"); layer++) {
            const y = TOP + layer * layerHeight;
            if (layerHeight >= 8 && layer) {
              context.fillStyle = line;
              context.fillRect(LEFT - 4, y - 0.5, 4, 1);
              if (rowHeight >= 4) context.fillRect(LEFT, y - 0.5, width, 1);
            }
            context.fillStyle = muted;
            if (layer % step === 0) context.fillText(`L${called(layer)}`, LEFT - 8, y + layerHeight / 2);
          }
          for (let row = 0; row < rows; row++) {
            context.fillStyle = line;
            context.fillRect(LEFT + width + 8, TOP + row * rowHeight, RIGHT - 12, Math.max(1, rowHeight - 1));
            context.fillStyle = muted;
            context.fillRect(
              LEFT + width + 8,
              TOP + row * rowHeight,
              (RIGHT - 12) * rowShare[row],
              Math.max(1, rowHeight - 1),
            );
          }
          context.fillStyle = muted;
          context.textAlign = "center";
          for (const at of ticks(0, n, width / 90)) {
            context.fillRect(x(at), TOP + height, 1, 4);
            context.fillText(count(at), Math.max(x(at), LEFT + 6), TOP + height + 11);
          }
          context.fillText("position in the prompt", LEFT + width / 2, TOP + height + 26);
          context.fillText("share kept", LEFT + width + 8 + (RIGHT - 12) / 2, TOP + height + 11);
          const marked = get("marked");
          if (marked !== null && marked >= 0 && marked < n) {
            context.fillStyle = mark;
            context.fillRect(x(marked + 0.5) - 1, TOP, 2, height);
          }
          /**
           * @param {number} row
           * @param {string} colour
           * @param {number[]} dash
           */
          const outline = (row, colour, dash) => {
            context.strokeStyle = colour;
            context.lineWidth = 2;
            context.setLineDash(dash);
            context.strokeRect(LEFT - 1, TOP + row * rowHeight - 1, width + 2, rowHeight + 2);
            context.setLineDash([]);
          };
          const selected = get("selected");
          if (selected) outline(placeOf(selected[0]) * heads + selected[1], mark, []);
          if (cursor) {
            outline(cursor[0], accent, [4, 3]);
            context.fillStyle = ink;
            context.strokeStyle = surface;
            context.lineWidth = 1;
            context.beginPath();
            context.arc(x(cursor[1] + 0.5), TOP + (cursor[0] + 0.5) * rowHeight, 4, 0, 7);
            context.fill();
            context.stroke();
          }
        }

        /**
         * @param {number} row
         * @param {number} position
         */
        function describe(row, position) {
          const n = get("positions");
          const heads = get("heads");
          const perPixel = Math.max(1, n / Math.max(1, Math.min(columns, geometry.width)));
          const from = Math.floor(Math.floor(position / perPixel) * perPixel);
          const to = clamp(Math.ceil(from + perPixel), from + 1, n);
          const [low, high] = [
            Math.floor((from * columns) / n),
            Math.max(Math.floor((from * columns) / n) + 1, Math.floor((to * columns) / n)),
          ];
          const names = get("tiers");
          const tokens = get("tokens");
          const lines = [`layer ${called(Math.floor(row / heads))}, head ${row % heads}`, `position ${span(from, to)}`];
          if (tokens.length > from) lines.push(quoted(tokens.slice(from, Math.min(to, from + 12)).join("")));
          if (to - from === 1) lines.push(names[tier[row * columns + low]] ?? `tier ${tier[row * columns + low]}`);
          else lines.push(`${percent(keptIn(row, low, Math.min(high, columns)))} of these kept`);
          lines.push(`this head keeps ${percent(rowShare[row])}`);
          return lines;
        }

        /** @param {number} place what the model calls the layer that is drawn there */
        const called = (place) => get("numbers")[place] ?? place;
        /** @param {number} layer */
        const placeOf = (layer) => (get("numbers").length ? get("numbers").indexOf(layer) : layer);

        /**
         * The row and position under the pointer.
         * @param {MouseEvent} event
         * @returns {Pair | null}
         */
        function at(event) {
          const { width, rowHeight } = geometry;
          const row = Math.floor((event.offsetY - TOP) / rowHeight);
          const position = Math.floor(((event.offsetX - LEFT) / width) * get("positions"));
          return row >= 0 && row < rows && event.offsetX <= LEFT + width + RIGHT
            ? [row, clamp(position, 0, get("positions") - 1)]
            : null;
        }

        /** @param {number} row */
        function choose(row) {
          const heads = get("heads");
          /** @type {Pair} */
          const picked = [called(Math.floor(row / heads)), row % heads];
          const now = get("selected");
          view.commit("selected", now && now[0] === picked[0] && now[1] === picked[1] ? null : picked);
        }

        /**
         * @param {number} row
         * @param {number} position
         */
        function move(row, position) {
          cursor = [clamp(row, 0, rows - 1), clamp(position, 0, get("positions") - 1)];
          draw();
          const frame = canvas.getBoundingClientRect();
          const y = TOP + (cursor[0] + 0.5) * geometry.rowHeight;
          box.scrollTop = clamp(box.scrollTop, y + 20 - box.clientHeight, Math.max(0, y - 20));
          const said = describe(...cursor);
          view.say(said.join(", "));
          view.tip(
            frame.left + LEFT + (cursor[1] / get("positions")) * geometry.width,
            canvas.getBoundingClientRect().top + y,
            said,
          );
        }

        canvas.addEventListener("pointermove", (event) => {
          const hit = at(event);
          if (hit) view.tip(event.clientX, event.clientY, describe(...hit));
          else view.untip();
        });
        canvas.addEventListener("pointerleave", view.untip);
        canvas.addEventListener("blur", () => {
          cursor = null;
          view.untip();
          if (image) draw();
        });
        canvas.addEventListener("click", (event) => {
          const hit = at(event);
          if (hit) choose(hit[0]);
        });
        canvas.addEventListener("keydown", (event) => {
          if (!rows) return;
          const selected = get("selected");
          const [row, position] = cursor ?? [selected ? placeOf(selected[0]) * get("heads") + selected[1] : 0, 0];
          const stride = Math.max(1, Math.round(get("positions") / geometry.width)) * (event.shiftKey ? 20 : 1);
          press(event, {
            ArrowUp: () => move(row - 1, position),
            ArrowDown: () => move(cursor ? row + 1 : row, position),
            ArrowLeft: () => move(row, position - stride),
            ArrowRight: () => move(row, position + stride),
            PageUp: () => move(row - get("heads"), position),
            PageDown: () => move(row + get("heads"), position),
            Home: () => move(row, 0),
            End: () => move(row, get("positions") - 1),
            Enter: () => choose(row),
            " ": () => choose(row),
            Escape: () => view.commit("selected", null),
          });
        });

        return (dirty) => {
          if (dirty.has("kept")) readData();
          const whole = rows > 0 && columns > 0 && rows === get("layers") * get("heads");
          empty.style.display = whole ? "none" : "";
          box.style.display = whole ? "" : "none";
          title.textContent = get("label");
          note.textContent = whole
            ? `${get("layers")} layers, ${get("heads")} heads each, ${percent(rowShare.reduce((a, b) => a + b, 0) / rows)} kept`
            : "";
          const { categories } = view.theme;
          swatches(
            legend,
            whole ? get("tiers").map((name, i) => [i ? categories[(i - 1) % categories.length] : null, name]) : [],
          );
          if (!whole) return;
          const width = Math.max(80, box.clientWidth - LEFT - RIGHT);
          geometry = { width, rowHeight: clamp(Math.floor(420 / rows), 2, 16) };
          if (!image || dirty.has("kept") || dirty.has("size") || dirty.has("theme"))
            image = makeImage(Math.round(width * (devicePixelRatio || 1)));
          draw();
        };
      },
    );
  },
};
