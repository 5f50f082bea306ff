// The prompt as running text. Only the lines in sight are in the page, so that 100,000 tokens scroll like 100.

const LINE = 26; // pixels; as in views.css

/**
 * @typedef {object} Fields
 * @property {string[]} tokens
 * @property {Packed} levels
 * @property {Packed} knots
 * @property {string} what
 * @property {string[]} tiers
 * @property {number} groups
 * @property {string} label
 * @property {number} rows
 * @property {number | null} selected
 */

/**
 * The index of the first token of each line, breaking before blanks where possible and after line breaks.
 * @param {string[]} tokens
 * @param {number} width
 * @param {(token: string) => number} measure
 */
function flow(tokens, width, measure) {
  const starts = [0];
  let x = 0;
  let word = 0; // the last token before which the line may break, and where it begins
  let wordX = 0;
  for (let i = 0; i < tokens.length; i++) {
    const token = tokens[i];
    const wide = measure(token);
    if (/^\s/.test(token) || /[\u3000-\u9fff]/.test(token)) {
      word = i;
      wordX = x;
    }
    const start = starts[starts.length - 1];
    if (x + wide > width && i > start) {
      const at = word > start ? word : i;
      x -= word > start ? wordX : x;
      starts.push(at);
      word = at;
      wordX = 0;
    }
    x += wide;
    if (token.includes("\n") && i + 1 < tokens.length) {
      starts.push(i + 1);
      x = 0;
      word = i + 1;
      wordX = 0;
    }
  }
  return starts;
}

export default {
  /** @param {Host} host */
  render(host) {
    return mount(
      host,
      "Prompt tokens, shaded by what survives",
      ["tokens", "levels", "knots", "what", "tiers", "groups", "label", "rows", "selected"],
      (/** @type {View<Fields>} */ view) => {
        const { root, get } = view;
        const uid = `wb${Math.random().toString(36).slice(2)}`;
        const head = node("div", "wb-head", root);
        const title = node("span", "wb-title", head);
        const note = node("span", "wb-note", head);
        const legend = node("span", "wb-legend", head);
        const empty = node("div", "wb-empty", root, "No prompt has been read yet.");
        const body = node("div", "wb-text", root);
        const pane = node("div", "wb-text-pane", body);
        const map = node("canvas", "wb-text-map", body);
        map.setAttribute("aria-hidden", "true");
        pane.tabIndex = 0;
        pane.setAttribute("role", "listbox");
        pane.setAttribute("aria-label", "Tokens: arrow keys move, Enter selects, Escape clears");
        const lines = node("div", "wb-text-lines", pane);
        const ruler = context2d(document.createElement("canvas"));
        /** @type {Map<string, number>} */
        const widths = new Map();
        /** @type {string[]} */
        let tokens = [];
        /** @type {Numbers} */
        let levels = new Uint8Array(0);
        /** @type {Numbers} where tokens have values */
        let knots = new Float32Array(0);
        let places = new Uint8Array(0); // of the values on the colour scale
        let starts = [0];
        /** @type {Rgb[]} */
        let colours = [];
        let cursor = -1;

        const tiered = () => get("tiers").length > 0;
        /** @param {number} i */
        const kept = (i) => (knots.length ? places[i] / 255 : tiered() ? (levels[i] > 0 ? 1 : 0) : levels[i]);
        /** @param {number} i */
        const colour = (i) =>
          knots.length
            ? colours[places[i]]
            : tiered()
              ? colours[Math.min(levels[i], colours.length - 1)]
              : colours[Math.round(clamp(levels[i], 0, 1) * 255)];
        /** @param {number} i */
        const lineOf = (i) => {
          let low = 0;
          let high = starts.length - 1;
          while (low < high) {
            const middle = (low + high + 1) >> 1;
            if (starts[middle] <= i) low = middle;
            else high = middle - 1;
          }
          return low;
        };

        /** @param {string} token */
        function measure(token) {
          let wide = widths.get(token);
          if (wide === undefined) {
            wide = ruler.measureText(visible(token)).width;
            widths.set(token, wide);
          }
          return wide;
        }

        /** @param {number} i */
        function describe(i) {
          const lines = [`${quoted(tokens[i])} at position ${count(i)}`];
          if (knots.length) lines.push(`${get("what")} ${short(levels[i])}`.trim());
          else if (tiered()) lines.push(get("tiers")[levels[i]] ?? `tier ${levels[i]}`);
          else if (levels.length > i) {
            const groups = get("groups");
            lines.push(
              groups
                ? `kept by ${percent(levels[i])} of layers and heads (${Math.round(levels[i] * groups)} of ${groups})`
                : `kept: ${percent(levels[i])}`,
            );
          }
          return lines;
        }

        function drawLines() {
          const first = Math.max(0, Math.floor(pane.scrollTop / LINE) - 4);
          const last = Math.min(starts.length, Math.ceil((pane.scrollTop + pane.clientHeight) / LINE) + 4);
          const rows = document.createDocumentFragment();
          const selected = get("selected");
          for (let line = first; line < last; line++) {
            const row = node("div", "wb-text-line", rows);
            row.style.top = `${line * LINE}px`;
            const end = starts[line + 1] ?? tokens.length;
            for (let i = starts[line]; i < end; i++) {
              const piece = node(
                "span",
                i === selected ? "wb-selected" : i === cursor ? "wb-cursor" : "",
                row,
                visible(tokens[i]),
              );
              piece.dataset.i = String(i);
              piece.id = `${uid}-${i}`;
              piece.setAttribute("role", "option");
              piece.setAttribute("aria-posinset", String(i + 1));
              piece.setAttribute("aria-setsize", String(tokens.length));
              if (i === selected) piece.setAttribute("aria-selected", "true");
              if (levels.length > i) {
                const shade = kept(i) > 0 ? colour(i) : null;
                piece.style.background = shade ? css(shade) : "";
                piece.style.color = shade ? inkOn(shade) : view.theme.muted;
              }
            }
          }
          lines.replaceChildren(rows);
          if (cursor >= 0) pane.setAttribute("aria-activedescendant", `${uid}-${cursor}`);
        }

        function drawMap() {
          const height = pane.clientHeight;
          const context = fit(map, 16, height);
          const bright = ramp(view.theme.share);
          const steps = Math.min(height, starts.length);
          const scale = Math.min(height, starts.length * 4) / steps; // a short text does not fill the strip
          for (let y = 0; y < steps; y++) {
            const from = starts[Math.floor((y * starts.length) / steps)];
            const to = starts[Math.floor(((y + 1) * starts.length) / steps)] ?? tokens.length;
            let sum = 0;
            for (let i = from; i < to; i++) sum += kept(i) || 0;
            context.fillStyle = css(bright[Math.round((255 * sum) / Math.max(1, to - from))]);
            context.fillRect(0, y * scale, 16, scale + 0.5);
          }
          const part = (scale * steps) / Math.max(1, starts.length * LINE);
          context.strokeStyle = view.theme.mark;
          context.lineWidth = 2;
          context.strokeRect(
            1,
            pane.scrollTop * part + 1,
            14,
            Math.max(4, Math.min(pane.clientHeight, starts.length * LINE) * part - 2),
          );
          map.onpointerdown = map.onpointermove = (event) => {
            if (event.buttons) pane.scrollTop = event.offsetY / part - pane.clientHeight / 2;
          };
        }

        /** @param {number} i */
        function reveal(i) {
          const top = lineOf(i) * LINE;
          if (top < pane.scrollTop) pane.scrollTop = top;
          else if (top + LINE + 8 > pane.scrollTop + pane.clientHeight)
            pane.scrollTop = top + LINE + 8 - pane.clientHeight;
        }

        /** @param {number} to */
        function move(to) {
          cursor = clamp(to, 0, tokens.length - 1);
          reveal(cursor);
          drawLines();
          view.say(describe(cursor).join(", "));
          const box = lines.querySelector(".wb-cursor, .wb-selected")?.getBoundingClientRect();
          const at = lines.querySelector(`[data-i="${cursor}"]`)?.getBoundingClientRect() ?? box;
          if (at) view.tip(at.left, at.bottom - 14, describe(cursor));
        }

        /** @param {number} i */
        const choose = (i) => view.commit("selected", i === get("selected") ? null : i);

        pane.addEventListener("scroll", () => {
          drawLines();
          drawMap();
        });
        pane.addEventListener("pointermove", (event) => {
          const i = tokenUnder(event);
          if (i >= 0) view.tip(event.clientX, event.clientY, describe(i));
          else view.untip();
        });
        pane.addEventListener("pointerleave", view.untip);
        pane.addEventListener("blur", view.untip);
        pane.addEventListener("click", (event) => {
          const i = tokenUnder(event);
          if (i < 0) return;
          cursor = i;
          choose(i);
        });
        pane.addEventListener("keydown", (event) => {
          if (!tokens.length) return;
          const at = Math.max(cursor, 0);
          const line = lineOf(at);
          const page = Math.max(1, Math.floor(pane.clientHeight / LINE) - 1);
          /** @param {number} to */
          const onLine = (to) => {
            const there = clamp(to, 0, starts.length - 1);
            const end = (starts[there + 1] ?? tokens.length) - 1;
            return Math.min(end, starts[there] + at - starts[line]);
          };
          press(event, {
            ArrowLeft: () => move(at - 1),
            ArrowRight: () => move(cursor < 0 ? 0 : at + 1),
            ArrowUp: () => move(onLine(line - 1)),
            ArrowDown: () => move(onLine(line + 1)),
            PageUp: () => move(onLine(line - page)),
            PageDown: () => move(onLine(line + page)),
            Home: () => move(0),
            End: () => move(tokens.length - 1),
            Enter: () => cursor >= 0 && choose(cursor),
            " ": () => cursor >= 0 && choose(cursor),
            Escape: () => view.commit("selected", null),
          });
        });

        return (dirty) => {
          if (dirty.has("tokens")) {
            tokens = get("tokens");
            cursor = -1;
          }
          if (dirty.has("levels") || dirty.has("knots")) {
            levels = unpack(get("levels")).data;
            knots = get("knots")?.byteLength ? unpack(get("knots")).data : new Float32Array(0);
            places = Uint8Array.from(knots.length ? levels : [], (value) => {
              let [low, high] = [0, knots.length]; // how many knots lie at or below the value
              while (low < high) {
                const middle = (low + high) >> 1;
                if (knots[middle] <= value) low = middle + 1;
                else high = middle;
              }
              return low;
            });
          }
          empty.hidden = tokens.length > 0;
          empty.style.display = tokens.length ? "none" : "";
          body.style.display = tokens.length ? "" : "none";
          title.textContent = get("label");
          if (dirty.has("tokens") || dirty.has("size")) {
            pane.style.maxHeight = `${get("rows") * LINE + 10}px`;
            const row = node("div", "wb-text-line", lines, "x");
            const style = getComputedStyle(row);
            ruler.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
            row.remove();
            starts = flow(tokens, Math.max(60, lines.clientWidth - 4), measure);
            lines.style.height = `${starts.length * LINE}px`;
          }
          const { share, categories } = view.theme;
          if (tiered()) {
            const names = get("tiers");
            colours = names.map((_, i) => (i ? rgb(categories[(i - 1) % categories.length]) : [128, 128, 128]));
            swatches(
              legend,
              names.map((name, i) => [i ? css(colours[i]) : null, name]),
            );
          } else {
            colours = ramp(share);
            if (knots.length)
              rampLegend(
                legend,
                share,
                [0, 64, 127, 190, 254].map((i) => short(knots[i])),
                get("what"),
              );
            else if (levels.length) rampLegend(legend, share, ["none", "half", "all"], "kept by layers and heads");
            else legend.replaceChildren();
          }
          let sum = 0;
          for (let i = 0; i < levels.length; i++) sum += kept(i);
          note.textContent = tokens.length
            ? `${count(tokens.length)} tokens${levels.length && !knots.length ? `, ${percent(sum / levels.length)} kept` : ""}`
            : "";
          const selected = get("selected");
          if (dirty.has("selected") && selected !== null && selected < tokens.length) reveal(selected);
          drawLines();
          drawMap();
        };
      },
    );
  },
};
