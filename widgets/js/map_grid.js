// Small attention maps of all layers and heads on one canvas, each with the colour of its class below it.

const GAP = 4;
const BAR = 4; // the class's colour
const LEFT = 46;
const HEAD = 18;

/**
 * @typedef {object} Fields
 * @property {Packed} tiles
 * @property {Packed} places
 * @property {Packed} classes
 * @property {string[]} class_names
 * @property {Packed} measures
 * @property {string[]} measure_names
 * @property {boolean} diverging
 * @property {string} sort
 * @property {string} label
 * @property {string} note
 * @property {Pair | null} selected
 */

/** One head's map: `kind` is an index into the class names, `values` has one number a measure. */
/** @typedef {{ layer: number, row: number, head: number, kind: number | null, values: number[] }} HeadMap */

export default {
  /** @param {Host} host */
  render(host) {
    /** @type {(keyof Fields)[]} */
    const fields = [
      "tiles",
      "places",
      "classes",
      "class_names",
      "measures",
      "measure_names",
      "diverging",
      "sort",
      "label",
      "note",
      "selected",
    ];
    return mount(host, "Small maps of all layers and heads", fields, (/** @type {View<Fields>} */ view) => {
      const { root, get } = view;
      const head = node("div", "wb-head", root);
      const title = node("span", "wb-title", head);
      const note = node("span", "wb-note", head);
      const sortBox = node("label", "wb-sort", head, "Sorted by ");
      const sort = node("select", "", sortBox);
      const legend = node("span", "wb-legend wb-near", head);
      const empty = node("div", "wb-empty", root, "Nothing to show yet.");
      const box = node("div", "wb-grid", root);
      const canvas = node("canvas", "", box);
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "application");
      const foot = node("div", "wb-foot", root);
      /** @type {HeadMap[]} in the order of the tiles */
      let maps = [];
      /** @type {number[]} what each row of layers is called */
      let layers = [];
      /** @type {number[]} indices of maps as they are laid out */
      let order = [];
      let side = 0;
      /** @type {Numbers} */
      let levels = new Uint8Array(0);
      /** @type {{ sheet: HTMLCanvasElement, across: number } | null} */
      let sheets = null;
      let grid = { cell: 30, columns: 1, rows: 1, left: LEFT, top: HEAD };
      let cursor = -1; // a place in the order

      /** @param {number} value */
      const known = (value) => (Number.isFinite(value) ? value : -Infinity);
      const inOrder = () => get("sort") === "layer";

      function read() {
        const { shape, data } = unpack(get("tiles"));
        side = shape.length === 3 ? shape[1] : 0;
        levels = data;
        const places = unpack(get("places")).data;
        const kinds = unpack(get("classes")).data;
        const { shape: measured, data: numbers } = unpack(get("measures"));
        const count = shape.length === 3 ? shape[0] : 0;
        layers = [...new Set(Array.from({ length: count }, (_, i) => places[2 * i]))];
        maps = Array.from({ length: count }, (_, i) => ({
          layer: places[2 * i],
          row: layers.indexOf(places[2 * i]),
          head: places[2 * i + 1],
          kind: kinds.length ? kinds[i] : null,
          values:
            measured.length === 2 ? Array.from({ length: measured[0] }, (_, m) => numbers[m * measured[1] + i]) : [],
        }));
        sheets = null;
      }

      function arrange() {
        order = maps.map((_, i) => i);
        const by = get("sort");
        const measure = get("measure_names").indexOf(by);
        if (by === "class") order.sort((a, b) => (maps[a].kind ?? 0) - (maps[b].kind ?? 0) || a - b);
        else if (measure >= 0)
          order.sort(
            (a, b) =>
              Number(known(maps[b].values[measure]) > known(maps[a].values[measure])) -
                Number(known(maps[b].values[measure]) < known(maps[a].values[measure])) || a - b,
          );
      }

      /** All small maps side by side on a canvas of their own, coloured once. */
      function makeSheets() {
        const shades = ramp(get("diverging") ? view.theme.diverging : view.theme.sequential).map(
          ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r,
        );
        const across = Math.ceil(Math.sqrt(maps.length));
        const picture = new ImageData(across * side, Math.ceil(maps.length / across) * side);
        const out = new Uint32Array(picture.data.buffer);
        for (let i = 0; i < maps.length; i++) {
          const from = Math.floor(i / across) * side * across * side + (i % across) * side;
          for (let y = 0; y < side; y++) {
            for (let x = 0; x < side; x++) {
              const level = levels[(i * side + y) * side + x];
              if (level) out[from + y * across * side + x] = shades[Math.round(((level - 1) / 254) * 255)];
            }
          }
        }
        sheets = { sheet: sheetOf(picture), across };
      }

      function layout() {
        const width = root.clientWidth - 20; // a scroll bar may come
        const heads = Math.max(...maps.map((map) => map.head)) + 1;
        const left = inOrder() ? LEFT : 2;
        const fitting = Math.floor((width - left) / heads) - GAP;
        const cell = clamp(inOrder() ? fitting : Math.min(fitting, 34), 12, 40);
        const columns = inOrder() ? heads : Math.max(1, Math.floor((width - left) / (cell + GAP)));
        grid = {
          cell,
          columns,
          left,
          top: inOrder() ? HEAD : 2,
          rows: inOrder() ? layers.length : Math.ceil(maps.length / columns),
        };
      }

      const stepX = () => grid.cell + GAP;
      const stepY = () => grid.cell + BAR + GAP;
      /** @param {number} place */
      const at = (place) =>
        inOrder()
          ? [maps[order[place]].row, maps[order[place]].head]
          : [Math.floor(place / grid.columns), place % grid.columns];
      /**
       * @param {number} row
       * @param {number} column
       */
      const placeAt = (row, column) =>
        inOrder()
          ? order.findIndex((i) => maps[i].row === row && maps[i].head === column)
          : row * grid.columns + column;

      /** @param {number} place */
      function corner(place) {
        const [row, column] = at(place);
        return [grid.left + column * stepX(), grid.top + row * stepY()];
      }

      /** @param {Pen} context */
      function paintGrid(context) {
        const { muted, line, categories } = view.theme;
        const { cell } = grid;
        const drawn = sheets;
        if (!drawn) return;
        context.font = "12px system-ui, sans-serif";
        context.textBaseline = "middle";
        context.lineWidth = 1;
        context.fillStyle = muted;
        if (inOrder()) {
          const every = Math.max(1, Math.ceil(22 / stepX()));
          context.textAlign = "center";
          for (let column = 0; column < grid.columns; column += every)
            context.fillText(String(column), grid.left + column * stepX() + cell / 2, 9);
          context.textAlign = "right";
          context.fillText("head", grid.left - 8, 9);
          const skip = Math.max(1, Math.ceil(14 / stepY()));
          for (let row = 0; row < grid.rows; row += skip)
            context.fillText(
              `${row ? "" : "layer "}${layers[row]}`,
              grid.left - 8,
              grid.top + row * stepY() + cell / 2,
            );
        }
        context.imageSmoothingEnabled = cell < side;
        context.imageSmoothingQuality = "high";
        order.forEach((index, place) => {
          const [x, y] = corner(place);
          context.drawImage(
            drawn.sheet,
            (index % drawn.across) * side,
            Math.floor(index / drawn.across) * side,
            side,
            side,
            x,
            y,
            cell,
            cell,
          );
          context.strokeStyle = line;
          context.strokeRect(x - 0.5, y - 0.5, cell + 1, cell + 1);
          const { kind } = maps[index];
          if (kind !== null) {
            context.fillStyle = categories[kind % categories.length];
            context.fillRect(x - 1, y + cell + 1, cell + 2, BAR);
          }
        });
      }

      /**
       * @param {CanvasRenderingContext2D} context
       * @param {number} place
       * @param {string} colour
       * @param {number[]} dash
       */
      function frame(context, place, colour, dash) {
        if (place < 0) return;
        const [x, y] = corner(place);
        context.setLineDash(dash);
        context.strokeStyle = colour;
        context.lineWidth = 2;
        context.strokeRect(x - 2, y - 2, grid.cell + 4, grid.cell + BAR + 5);
        context.setLineDash([]);
      }

      const selectedPlace = () => {
        const now = get("selected");
        return now ? order.findIndex((i) => maps[i].layer === now[0] && maps[i].head === now[1]) : -1;
      };

      function draw() {
        if (!maps.length) return;
        const context = fit(canvas, grid.left + grid.columns * stepX() + 2, grid.top + grid.rows * stepY() + 2);
        paintGrid(context);
        frame(context, selectedPlace(), view.theme.mark, []);
        frame(context, cursor, view.theme.accent, [4, 3]);
      }

      /** @param {number} place */
      function describe(place) {
        const { layer, head, kind, values } = maps[order[place]];
        const lines = [`layer ${layer}, head ${head}`];
        if (kind !== null) lines.push(`${get("class_names")[kind]} head`);
        get("measure_names").forEach((name, m) => {
          if (Number.isFinite(values[m])) lines.push(`${name} ${short(values[m])}`);
        });
        return lines;
      }

      /** @param {MouseEvent} event */
      function under(event) {
        const column = Math.floor((event.offsetX - grid.left + GAP / 2) / stepX());
        const row = Math.floor((event.offsetY - grid.top + GAP / 2) / stepY());
        if (column < 0 || row < 0 || column >= grid.columns || row >= grid.rows) return -1;
        const place = placeAt(row, column);
        return place >= 0 && place < order.length ? place : -1;
      }

      /** @param {number} place */
      const choose = (place) =>
        place >= 0 && view.commit("selected", [maps[order[place]].layer, maps[order[place]].head]);

      /**
       * @param {number} rows
       * @param {number} columns
       */
      function move(rows, columns) {
        if (cursor < 0) cursor = Math.max(0, selectedPlace());
        else {
          const [row, column] = at(cursor);
          const next = placeAt(clamp(row + rows, 0, grid.rows - 1), clamp(column + columns, 0, grid.columns - 1));
          if (next >= 0 && next < order.length) cursor = next;
        }
        draw();
        const [x, y] = corner(cursor);
        if (y < box.scrollTop) box.scrollTop = y - 6;
        else if (y + stepY() > box.scrollTop + box.clientHeight) box.scrollTop = y + stepY() + 6 - box.clientHeight;
        const here = canvas.getBoundingClientRect();
        view.say(describe(cursor).join(", "));
        view.tip(here.left + x + grid.cell, here.top + y + grid.cell, describe(cursor));
      }

      canvas.addEventListener("pointermove", (event) => {
        const place = under(event);
        if (place >= 0) view.tip(event.clientX, event.clientY, describe(place));
        else view.untip();
      });
      canvas.addEventListener("pointerleave", view.untip);
      canvas.addEventListener("blur", () => {
        cursor = -1;
        view.untip();
        draw();
      });
      canvas.addEventListener("click", (event) => choose(under(event)));
      canvas.addEventListener("keydown", (event) => {
        if (!maps.length || event.ctrlKey || event.metaKey || event.altKey) return;
        press(event, {
          ArrowUp: () => move(-1, 0),
          ArrowDown: () => move(1, 0),
          ArrowLeft: () => move(0, -1),
          ArrowRight: () => move(0, 1),
          Enter: () => choose(cursor),
          " ": () => choose(cursor),
        });
      });
      sort.addEventListener("change", () => view.commit("sort", sort.value));

      // -- saving

      /** @returns {Pair} */
      const size = () => [grid.left + grid.columns * stepX() + 12, grid.top + grid.rows * stepY() + 64];

      /** @type {Compose} */
      function compose(pen, _width, height) {
        pen.textBaseline = "middle";
        pen.textAlign = "left";
        pen.font = "600 13px system-ui, sans-serif";
        pen.fillStyle = view.theme.ink;
        pen.fillText(get("label"), 4, 15);
        pen.save();
        pen.translate(0, 30);
        paintGrid(pen);
        pen.restore();
        let x = 4;
        pen.textAlign = "left";
        for (const [colour, text] of classLegend()) {
          pen.fillStyle = colour;
          pen.fillRect(x, height - 20, 10, 10);
          pen.fillStyle = view.theme.muted;
          pen.fillText(text, x + 14, height - 15);
          x += 28 + pen.measureText(text).width;
        }
      }

      /** @returns {Record<string, string | number>[]} */
      const table = () =>
        order.map((index) => {
          const { layer, head, kind, values } = maps[index];
          return {
            layer,
            head,
            ...(kind !== null && { class: get("class_names")[kind] }),
            ...Object.fromEntries(get("measure_names").map((name, m) => [name, values[m]])),
          };
        });

      function toCsv() {
        const rows = table();
        const names = Object.keys(rows[0]);
        return `${[names, ...rows.map((row) => names.map((name) => row[name]))].map((cells) => cells.map((cell) => csvCell(String(cell))).join(",")).join("\n")}\n`;
      }

      saveMenu(foot, [
        ["Picture (PNG)", () => savePng(fileName(get("label")), ...size(), view.theme.surface, compose)],
        ["Drawing (SVG)", () => saveSvg(fileName(get("label")), ...size(), view.theme.surface, compose)],
        ["Heads as a table (CSV)", () => saveFile(`${fileName(get("label"))}.csv`, "text/csv", toCsv())],
        ["Heads (JSON)", () => saveFile(`${fileName(get("label"))}.json`, "application/json", JSON.stringify(table()))],
      ]);

      /** @returns {[string, string][]} */
      function classLegend() {
        const names = get("class_names");
        const counts = names.map((_, kind) => maps.filter((map) => map.kind === kind).length);
        return names.map((name, kind) => [
          view.theme.categories[kind % view.theme.categories.length],
          `${name} ${counts[kind]}`,
        ]);
      }

      return (dirty) => {
        if (["tiles", "places", "classes", "measures"].some((field) => dirty.has(field))) read();
        const some = maps.length > 0 && side > 0;
        empty.style.display = some ? "none" : "";
        box.style.display = foot.style.display = some ? "" : "none";
        title.textContent = get("label");
        note.textContent = get("note");
        const choices = [
          ["layer", "layer and head"],
          ...(get("class_names").length ? [["class", "class"]] : []),
          ...get("measure_names").map((name) => [name, name]),
        ];
        sortBox.style.display = some && choices.length > 1 ? "" : "none";
        sort.replaceChildren(
          ...choices.map(([value, name]) => Object.assign(node("option", "", null, name), { value })),
        );
        sort.value = get("sort");
        if (!some) return;
        canvas.setAttribute("aria-label", `${get("label")}: arrow keys move over the heads, Enter shows one`);
        arrange();
        layout();
        if (!sheets || dirty.has("theme") || dirty.has("diverging")) makeSheets();
        swatches(legend, classLegend());
        draw();
      };
    });
  },
};
