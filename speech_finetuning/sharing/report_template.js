"use strict";
// The explorer of rows. All text goes in as textContent: transcripts are other people's.
(function () {
  const ID = 0, GROUP = 1, DURATION = 2, ERRORS = 3, UNITS = 4, REFERENCE = 5, PREDICTION = 6, OPERATIONS = 7,
    WRITTEN_REFERENCE = 8, WRITTEN_PREDICTION = 9, EARLIER = 10, EARLIER_ERRORS = 11, SET = 12;
  const ROWS_AT_ONCE = 50;
  const tables = JSON.parse(document.getElementById("tables").textContent);
  const [set, part, query, filter, sort, group] = ["set", "part", "query", "filter", "sort", "group"].map(find);
  const list = find("list"), more = find("more"), count = find("count");
  let places = []; // of the rows that are shown, in their order
  let numShown = 0;

  function find(id) { return document.getElementById(id); }

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function numbered(number, name) { return `${number} ${name}${number === 1 ? "" : "s"}`; }

  function table() { return tables[set.selectedIndex] || { rows: [], clips: {}, sets: [] }; }

  // The entry of the mix that a row is of: its name, what is counted in it, whether it is a guard.
  function setOf(row) { return table().sets[row[SET]]; }

  function splitUnits(text, unit) {
    if (unit !== "character") return text.split(/\s+/).filter(Boolean);
    return text.match(/\S\p{M}*/gu) || [];
  }

  // The words of a row, coloured by kind of error.
  function words(row, unit) {
    const made = element("p", undefined, "words");
    made.dir = "auto";
    const gap = unit === "character" ? "" : " ";
    if (!row[OPERATIONS]) {
      made.textContent = row[REFERENCE] || row[PREDICTION];
      return made;
    }
    const said = splitUnits(row[REFERENCE], unit), heard = splitUnits(row[PREDICTION], unit);
    let first = 0, second = 0;
    for (const [, kind, digits] of row[OPERATIONS].matchAll(/([=sdi])(\d+)/g)) {
      const length = Number(digits);
      const left = kind === "i" ? [] : said.slice(first, first + length);
      const right = kind === "d" ? [] : heard.slice(second, second + length);
      first += left.length;
      second += right.length;
      if (kind === "=") made.append(left.join(gap), gap);
      if (kind === "d") made.append(element("del", left.join(gap)), gap);
      if (kind === "i") made.append(element("ins", right.join(gap)), gap);
      if (kind === "s") {
        left.forEach(function (word, place) {
          const pair = element("span", undefined, "sub");
          pair.append(element("del", word), gap || "\u200a", element("ins", right[place]));
          made.append(pair, gap);
        });
      }
    }
    return made;
  }

  function facts(row, place) {
    const made = element("div", undefined, "facts");
    const { clips, sets } = table();
    const { name, unit } = setOf(row);
    if (row[ERRORS] === null) made.append(element("span", "no reference"));
    else {
      const rate = row[UNITS] ? Math.round((100 * row[ERRORS]) / row[UNITS]) : 0;
      const errors = element("span");
      errors.append(element("b", numbered(row[ERRORS], "error")), ` in ${numbered(row[UNITS], unit)} (${rate} %)`);
      made.append(errors);
      if (row[EARLIER_ERRORS] !== null) made.append(element("span", `before training: ${row[EARLIER_ERRORS]}`));
    }
    made.append(element("span", `${row[DURATION].toFixed(1)} s`));
    if (sets.length > 1) made.append(element("bdi", name));
    if (row[GROUP]) made.append(element("bdi", row[GROUP]));
    if (clips[place] && clips[place].audio) made.append(element("span", "▶ sound"));
    return made;
  }

  function paragraph(title, text) {
    const made = element("p");
    made.dir = "auto";
    const label = element("small", title);
    label.dir = "ltr";
    made.append(label, text);
    return made;
  }

  // What opens: built when it is asked for.
  function body(row, place) {
    const made = element("div", undefined, "body");
    const clip = table().clips[place];
    if (clip && clip.audio) {
      const player = element("audio");
      player.controls = true;
      player.src = "data:audio/mpeg;base64," + clip.audio;
      made.append(player);
    }
    if (clip && clip.picture) {
      const picture = element("img");
      picture.alt = "Log-mel spectrogram: what the model reads";
      picture.width = 480;
      picture.height = 165;
      picture.src = "data:image/webp;base64," + clip.picture;
      made.append(picture);
    }
    const heard = row[PREDICTION] || (row[OPERATIONS] || row[ERRORS] === null ? "" : row[REFERENCE]);
    if (row[REFERENCE] || row[WRITTEN_REFERENCE]) made.append(paragraph("said", row[WRITTEN_REFERENCE] || row[REFERENCE]));
    made.append(paragraph("written by this model", row[WRITTEN_PREDICTION] || heard || "(nothing)"));
    if (row[EARLIER]) made.append(paragraph("written before training", row[EARLIER]));
    made.append(paragraph("row", row[ID]));
    return made;
  }

  function entry(place) {
    const row = table().rows[place];
    const made = element("details", undefined, "row");
    const summary = element("summary");
    summary.append(words(row, setOf(row).unit), facts(row, place));
    made.append(summary);
    made.addEventListener("toggle", function () {
      if (made.open && made.children.length === 1) made.append(body(row, place));
    });
    return made;
  }

  function showMore() {
    const next = places.slice(numShown, numShown + ROWS_AT_ONCE);
    list.append(...next.map(entry));
    numShown += next.length;
    more.hidden = numShown >= places.length;
  }

  function rate(row) { return row[UNITS] ? row[ERRORS] / row[UNITS] : 0; }
  function gain(row) { return row[EARLIER_ERRORS] === null ? 0 : row[EARLIER_ERRORS] - row[ERRORS]; }

  const FILTERS = {
    all: () => true,
    wrong: (row) => row[ERRORS] > 0,
    right: (row) => row[ERRORS] === 0,
    s: (row) => row[OPERATIONS].includes("s"),
    d: (row) => row[OPERATIONS].includes("d"),
    i: (row) => row[OPERATIONS].includes("i"),
    clip: (row, place) => Boolean(table().clips[place] && table().clips[place].audio),
    better: (row) => gain(row) > 0,
    worse: (row) => gain(row) < 0,
  };
  const PARTS = { all: () => true, trained: (row) => !setOf(row).isGuard };
  const ORDERS = {
    errors: (a, b) => b[ERRORS] - a[ERRORS],
    rate: (a, b) => rate(b) - rate(a),
    long: (a, b) => b[DURATION] - a[DURATION],
    short: (a, b) => a[DURATION] - b[DURATION],
    gain: (a, b) => gain(b) - gain(a),
    loss: (a, b) => gain(a) - gain(b),
    id: (a, b) => (a[ID] < b[ID] ? -1 : a[ID] > b[ID] ? 1 : 0),
  };

  function update() {
    const { rows, leftOut, clipsLeftOut, isShort } = table();
    const wanted = query.value.trim().toLowerCase();
    const accepts = FILTERS[filter.value];
    const isOfPart = PARTS[part.value] || ((row) => String(row[SET]) === part.value);
    places = [];
    rows.forEach(function (row, place) {
      if (!accepts(row, place) || !isOfPart(row)) return;
      if (group.value && row[GROUP] !== group.value) return;
      if (wanted && ![ID, REFERENCE, PREDICTION, WRITTEN_REFERENCE, WRITTEN_PREDICTION, EARLIER].some(
        (field) => row[field].toLowerCase().includes(wanted))) return;
      places.push(place);
    });
    const order = ORDERS[sort.value];
    places.sort((a, b) => order(rows[a], rows[b]) || a - b);
    const notes = [`${places.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`];
    if (leftOut) notes.push(`${leftOut.toLocaleString("en")} more, the best ones, are only in predictions_*.jsonl: the page would be too large`);
    if (isShort) notes.push("texts only as they are counted");
    if (clipsLeftOut) notes.push(`${clipsLeftOut} clips left out for their size`);
    count.textContent = notes.join("; ") + ".";
    list.replaceChildren();
    numShown = 0;
    showMore();
  }

  // Guards are left out until they are asked for, as they are in all that stands above.
  function fillSets() {
    const { sets } = table();
    const options = sets.map((each, place) => new Option(each.isGuard ? `${each.name} (guard)` : each.name, place));
    const trained = sets.some((each) => each.isGuard) ? [new Option("all but guards", "trained")] : [];
    part.replaceChildren(...trained, new Option("all", "all"), ...options);
    find("part-label").hidden = sets.length < 2;
  }

  function fillGroups() {
    const names = [...new Set(table().rows.map((row) => row[GROUP]))].filter(Boolean).sort();
    group.replaceChildren(new Option("all", ""), ...names.slice(0, 500).map((name) => new Option(name, name)));
    find("group-label").hidden = names.length === 0;
  }

  set.append(...tables.map((each) => new Option(each.title)));
  // The last evaluation of the trained model comes first, as it is what people look for.
  set.selectedIndex = 0;
  set.addEventListener("change", function () { fillSets(); fillGroups(); update(); });
  for (const control of [part, filter, sort, group]) control.addEventListener("change", update);
  let pending = 0;
  query.addEventListener("input", function () { clearTimeout(pending); pending = setTimeout(update, 120); });
  more.addEventListener("click", function () {
    const before = list.children.length;
    showMore();
    const next = list.children[before];
    if (next) next.firstChild.focus();
  });
  new IntersectionObserver(function (seen) {
    if (seen.some((each) => each.isIntersecting) && !more.hidden) showMore();
  }, { rootMargin: "400px" }).observe(more);
  document.querySelectorAll("button.find").forEach(function (button) {
    button.addEventListener("click", function () {
      const section = button.closest("[data-table]");
      if (section) { set.selectedIndex = Number(section.dataset.table); fillSets(); fillGroups(); }
      query.value = button.dataset.query;
      filter.value = "wrong";
      update();
      find("rows").scrollIntoView();
      query.focus({ preventScroll: true });
    });
  });
  // Up and down from row to row; / to the search.
  document.addEventListener("keydown", function (event) {
    const typing = /^(INPUT|SELECT|AUDIO|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing) { event.preventDefault(); query.focus(); }
    const row = document.activeElement.closest && document.activeElement.closest("details.row");
    if (!row || typing || !/^Arrow(Up|Down)$/.test(event.key)) return;
    const next = event.key === "ArrowDown" ? row.nextElementSibling : row.previousElementSibling;
    if (next) { event.preventDefault(); next.firstChild.focus(); }
  });
  fillSets();
  fillGroups();
  update();
})();
