// Two answers side by side: what they share is dimmed, the first token that differs stands out.

/**
 * @typedef {object} Fields
 * @property {string[]} left
 * @property {string[]} right
 * @property {string} left_label
 * @property {string} right_label
 * @property {Packed} left_odds
 * @property {Packed} right_odds
 * @property {number | null} first_difference
 * @property {string} waiting
 * @property {Pair | null} selected
 */

/** The sides: 0 is the left. */
const SIDES = /** @type {const} */ (["left", "right"]);

export default {
  /** @param {Host} host */
  render(host) {
    /** @type {(keyof Fields)[]} */
    const fields = [
      "left",
      "right",
      "left_label",
      "right_label",
      "left_odds",
      "right_odds",
      "first_difference",
      "selected",
    ];
    return mount(host, "Full and compressed answer", fields, (/** @type {View<Fields>} */ view) => {
      const { root, get } = view;
      const head = node("div", "wb-head", root);
      const verdict = node("span", "wb-title", head);
      const legend = node("span", "wb-legend", head);
      const sides = node("div", "wb-sides", root);
      const panes = SIDES.map((name) => {
        const side = node("div", "wb-side", sides);
        const heading = node("h4", "", side);
        const answer = node("p", "wb-answer", side);
        answer.tabIndex = 0;
        answer.setAttribute("role", "listbox");
        return { name, heading, answer };
      });
      /** @type {Pair | null} side, token */
      let cursor = null;

      /** @param {number} side */
      const odds = (side) => unpack(get(`${panes[side].name}_odds`)).data;

      /**
       * @param {number} side
       * @param {number} i
       */
      function describe(side, i) {
        const lines = [`${quoted(get(panes[side].name)[i])} is token ${count(i + 1)}`];
        const probabilities = odds(side);
        if (probabilities.length > i) lines.push(`probability ${percent(probabilities[i])}`);
        const first = get("first_difference");
        const other = get(panes[1 - side].name)[i];
        if (first !== null && i === first)
          lines.push(other === undefined ? "the other answer ends here" : `the other answer has ${quoted(other)}`);
        return lines;
      }

      /**
       * @param {number} side
       * @param {number} i
       */
      const choose = (side, i) => {
        const now = get("selected");
        view.commit("selected", now && now[0] === side && now[1] === i ? null : [side, i]);
      };
      /**
       * @param {number} side
       * @param {number} i
       */
      const piece = (side, i) => panes[side].answer.querySelector(`[data-i="${i}"]`);

      /**
       * @param {number} side
       * @param {number} to
       */
      function move(side, to) {
        const last = get(panes[side].name).length - 1;
        if (last < 0) return;
        if (cursor) piece(...cursor)?.classList.remove("wb-cursor");
        cursor = [side, clamp(to, 0, last)];
        const at = piece(...cursor);
        if (!at) return;
        at.classList.add("wb-cursor");
        at.scrollIntoView({ block: "nearest" });
        const box = at.getBoundingClientRect();
        view.tip(box.left, box.bottom - 14, describe(...cursor));
        view.say(describe(...cursor).join(", "));
      }

      panes.forEach(({ answer }, side) => {
        answer.addEventListener("pointermove", (event) => {
          const i = tokenUnder(event);
          if (i >= 0) view.tip(event.clientX, event.clientY, describe(side, i));
          else view.untip();
        });
        answer.addEventListener("pointerleave", view.untip);
        answer.addEventListener("blur", view.untip);
        answer.addEventListener("click", (event) => tokenUnder(event) >= 0 && choose(side, tokenUnder(event)));
        answer.addEventListener("keydown", (event) => {
          const at = cursor && cursor[0] === side ? cursor[1] : -1;
          press(event, {
            ArrowLeft: () => move(side, at - 1),
            ArrowRight: () => move(side, at + 1),
            ArrowUp: () => move(side, at - 8),
            ArrowDown: () => move(side, at + 8),
            Home: () => move(side, get("first_difference") ?? 0),
            End: () => move(side, Infinity),
            Enter: () => at >= 0 && choose(side, at),
            " ": () => at >= 0 && choose(side, at),
            Escape: () => view.commit("selected", null),
          });
        });
      });

      return () => {
        const first = get("first_difference");
        const lengths = panes.map(({ name }) => get(name).length);
        const some = lengths[0] + lengths[1] > 0;
        verdict.textContent = !some
          ? "No answers yet"
          : get("waiting")
            ? "The compressed answer, as it comes"
            : first === null
              ? `The answers are identical (${count(lengths[0])} tokens)`
              : `Same for ${count(first)} token${first === 1 ? "" : "s"}, then they part`;
        legend.replaceChildren();
        if (some && first !== null && !get("waiting"))
          swatches(legend, [
            [view.theme.muted, "shared"],
            [view.theme.mark, "first difference"],
            [view.theme.ink, "after it"],
          ]);
        const selected = get("selected");
        panes.forEach(({ name, heading, answer }, side) => {
          const tokens = get(name);
          heading.replaceChildren(
            get(`${name}_label`),
            node("span", "", null, tokens.length ? `${count(tokens.length)} tokens` : ""),
          );
          answer.setAttribute(
            "aria-label",
            `${get(`${name}_label`)}: arrow keys move, Home goes to the first difference, Enter selects`,
          );
          const pieces = document.createDocumentFragment();
          tokens.forEach((token, i) => {
            const classes = get("waiting")
              ? []
              : [first !== null && i < first ? "wb-same" : "", i === first ? "wb-first" : ""];
            if (selected && selected[0] === side && selected[1] === i) classes.push("wb-selected");
            const part = node(
              "span",
              classes.join(" ").trim(),
              pieces,
              token.includes("\n") && i === first ? visible(token) : token,
            );
            part.dataset.i = String(i);
            part.setAttribute("role", "option");
            if (i === first) part.setAttribute("aria-description", "first difference");
          });
          const waits = side === 0 && !tokens.length && get("waiting");
          if (waits) node("span", "wb-same", pieces, waits);
          else if (some && first !== null && tokens.length === first)
            node("span", "wb-end", pieces, tokens.length ? " ▮ ends here" : "▮ says nothing");
          answer.replaceChildren(pieces);
        });
      };
    });
  },
};
