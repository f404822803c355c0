// SPDX-License-Identifier: Apache-2.0
// The recipe builder. What may be chosen comes from builder-data.js, which is made from the parameter classes:
// a choice that would be refused beside the others is disabled, and a line with a wrong entry is not shown.
"use strict";

(() => {
  const { recipes, hardware } = window.maxkitBuilder;
  const byId = (id) => document.getElementById(id);
  const form = byId("mk-builder");
  let recipe, machine, values;

  // --- what is valid ---

  const option = (name) => recipe.options.find((o) => o.name === name);
  const place = (name, value) => {
    const o = option(name);
    if (!o) return 0; // only one value is possible, so it is not offered
    return o.choices ? o.choices.indexOf(value) : Number(value !== o.default);
  };
  const number = (name, otherwise) => Number(values[name] ?? option(name)?.default ?? otherwise);
  const ways = () => (option("mesh") ? machine.meshes.find((m) => m.text === values.mesh).ways : 1);

  // Each micro-batch is divided over the devices that hold rows.
  const rowsDivide = () =>
    !option("batch_size") || (number("batch_size") / number("gradient_accumulation_steps", 1)) % ways() === 0;
  const rulesHold = () =>
    recipe.rules.every((rule) => rule.valid.includes(rule.names.map((n) => place(n, values[n])).join(".")));
  const onThisMachine = (o, choice) => !o.only_on?.[choice] || o.only_on[choice] === machine.platform;

  function possible(o, choice) {
    if (o.kind !== "mesh" && !onThisMachine(o, choice)) return false;
    const before = values[o.name];
    values[o.name] = choice;
    const fits = rulesHold() && rowsDivide();
    values[o.name] = before;
    return fits;
  }

  function problem(o) {
    const text = values[o.name];
    if (text === o.default) return "";
    if (o.kind === "text") {
      const names = /^[\w*.:/-]+(,[\w*.:/-]+)*$/;
      return o.list && !names.test(text) ? "names, separated by commas" : "";
    }
    if (o.kind !== "number") return "";
    const value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value)) return `must be a ${o.type}`;
    if (o.whole && !Number.isSafeInteger(value)) return "must be a whole number";
    if (o.ge !== undefined && value < o.ge) return `must be at least ${o.ge}`;
    if (o.gt !== undefined && value <= o.gt) return `must be greater than ${o.gt}`;
    if (o.le !== undefined && value > o.le) return `must be at most ${o.le}`;
    if (o.lt !== undefined && value >= o.lt) return `must be less than ${o.lt}`;
    if (o.name === "batch_size" && !rowsDivide()) return `must be a multiple of ${ways()}: each device needs its rows`;
    return "";
  }

  // After another machine was chosen: the next batch_size that its devices can share.
  function repair() {
    for (const o of recipe.options)
      if (o.kind === "choice" && !onThisMachine(o, values[o.name])) values[o.name] = o.default;
    if (option("mesh") && !machine.meshes.some((m) => m.text === values.mesh)) values.mesh = "";
    if (rowsDivide()) return "";
    const o = option("batch_size");
    const step = ways() * number("gradient_accumulation_steps", 1);
    const sizes = o.choices ?? [String(Math.ceil(number("batch_size") / step) * step)];
    const fitting = sizes.filter((size) => possible(o, size)).sort((a, b) => a - b);
    const larger = fitting.find((size) => Number(size) >= number("batch_size")) ?? fitting.at(-1);
    if (larger === undefined) {
      machine = hardware[0];
      byId("mk-hardware").value = machine.id;
      return "This recipe does not divide over so many devices at once: back to the CPU.";
    }
    const [before, after] = [values.batch_size, larger];
    values.batch_size = after;
    return `batch_size was ${before}; ${ways()} devices share each micro-batch, so it is ${after} now.`;
  }

  // --- the lines ---

  const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);
  const given = () => recipe.options.filter((o) => values[o.name] !== o.default).map((o) => [o.name, values[o.name]]);
  const joined = (words) => words.join(" ");

  function lines() {
    const pairs = given();
    const maxkit = pairs.map(([name, value]) => `-p ${quoted(`${name}=${value}`)}`);
    const papermill = pairs.map(([name, value]) => `-p ${name} ${quoted(value)}`);
    const planned = pairs.filter(([name]) => name !== "run_dir").map(([n, v]) => `-p ${quoted(`${n}=${v}`)}`);
    return {
      "mk-run": joined(["maxkit run", recipe.name, ...maxkit]),
      "mk-papermill": joined(["papermill", recipe.notebook, "out.ipynb", ...papermill]),
      "mk-plan": joined(["maxkit plan", recipe.name, ...planned, "--topology", machine.id]),
      "mk-setup": machine.setup.join("\n"),
    };
  }

  // --- what it will need ---

  function needs() {
    const changed = given().map(([name]) => name).filter((name) => name !== "run_dir");
    const settings = changed.length ? "with default settings" : "with these settings";
    const found = [];
    const records = recipe.records.filter((r) => r.platform === machine.platform && !r.changed.length);
    for (const r of records) {
      found.push(["Time", `${r.seconds} on ${r.hardware}, ${settings}`]);
      if (r.memory) found.push(["Memory", `${r.memory} at the peak, ${settings}`]);
    }
    if (!records.length) found.push(["Time", "not measured on this hardware"]);
    else if (changed.length) found.push(["Time with these settings", "not measured"]);
    if (machine.platform === "tpu" && recipe.trains) found.push(["Memory of a chip", planned(changed)]);
    found.push(["Cost", !changed.length && records[0] ? records[0].cost.replace(/^cost /, "") : "not measured"]);
    return found;
  }

  function planned(changed) {
    const gib = (bytes) => (bytes / 2 ** 30).toFixed(2);
    const same = (plan) =>
      plan.topology === machine.id && changed.length === Object.keys(plan.changed).length &&
      changed.every((name) => String(plan.changed[name]) === values[name]);
    const plan = recipe.plans.find(same);
    if (!plan) return "not compiled with these settings; the line above asks the compiler";
    const verdict = plan.fits ? "fits" : "does not fit";
    const of = plan.available ? ` of ${gib(plan.available)}` : "";
    return `${verdict}: ${gib(plan.required)}${of} GiB of each device's memory, says the TPU compiler (run on none)`;
  }

  // --- the page ---

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const shown = (o, choice) => (choice === "" ? (o.kind === "mesh" ? "all devices on fsdp" : "as stored") : choice);

  function control(o) {
    const id = `mk-o-${o.name}`;
    const box = { id, name: o.name, "aria-describedby": `${id}-help ${id}-problem` };
    let input;
    if (o.kind === "choice" || o.kind === "mesh") {
      const choices = o.choices ?? machine.meshes.map((m) => m.text);
      input = element("select", box, ...choices.map((c) => element("option", { value: c }, shown(o, c))));
    } else {
      const empty = ["", "none"].includes(o.default);
      input = element("input", { ...box, type: "text", inputmode: o.kind === "number" ? "decimal" : "text" });
      input.placeholder = empty ? "none" : o.default;
    }
    const help = element("span", { class: "mk-help", id: `${id}-help` }, o.meaning);
    const wrong = element("span", { class: "mk-problem", id: `${id}-problem` });
    const alone = o.kind === "mesh" && machine.meshes.length === 1; // one device: nothing to arrange
    const shell = { class: "mk-option", ...(alone && { hidden: "" }) };
    return element("div", shell, element("label", { for: id }, o.name), input, help, wrong);
  }

  function show(note = "") {
    let wrong = false;
    for (const o of recipe.options) {
      const input = form.elements[o.name];
      const isDefault = values[o.name] === o.default;
      input.closest(".mk-option").classList.toggle("mk-changed", !isDefault);
      if (input.tagName === "SELECT") {
        input.value = values[o.name];
        for (const choice of input.options) choice.disabled = !possible(o, choice.value);
      } else if (document.activeElement !== input) {
        input.value = isDefault && ["", "none"].includes(o.default) ? "" : values[o.name];
      }
      const text = problem(o);
      byId(`mk-o-${o.name}-problem`).textContent = text;
      input.setAttribute("aria-invalid", String(Boolean(text)));
      wrong ||= Boolean(text);
    }
    for (const [id, line] of Object.entries(lines())) {
      byId(id).textContent = wrong && id !== "mk-setup" ? "" : line;
      form.querySelector(`[data-copies="${id}"]`).disabled = wrong && id !== "mk-setup";
    }
    byId("mk-plan-block").hidden = machine.platform !== "tpu" || !recipe.trains;
    byId("mk-note").textContent = wrong ? "An entry below cannot be used; the reason stands beside it." : note;
    byId("mk-needs").replaceChildren(
      ...needs().map(([what, words]) => element("div", {}, element("dt", {}, what), element("dd", {}, words))),
    );
  }

  function draw() {
    const link = element("a", { href: recipe.page }, recipe.title);
    byId("mk-summary").replaceChildren(link, ": ", recipe.summary);
    for (const [id, common] of [["mk-common", true], ["mk-rest", false]]) {
      const fieldset = byId(id);
      const legend = fieldset.querySelector("legend");
      fieldset.replaceChildren(legend, ...recipe.options.filter((o) => o.common === common).map(control));
      for (const input of fieldset.querySelectorAll("input, select")) input.addEventListener("input", changed);
    }
  }

  function changed(event) {
    const o = option(event.target.name);
    const text = event.target.value.trim();
    values[o.name] = text === "" && event.target.tagName === "INPUT" ? o.default : text;
    show();
  }

  function start(name) {
    recipe = recipes.find((r) => r.name === name) ?? recipes[0];
    values = Object.fromEntries(recipe.options.map((o) => [o.name, o.default]));
    byId("mk-recipe").value = recipe.name;
    const note = repair();
    draw();
    show(note);
  }

  async function copy(button) {
    const text = byId(button.dataset.copies).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Pages opened from a disk have no clipboard of their own: the selection is copied.
      getSelection().selectAllChildren(byId(button.dataset.copies));
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  byId("mk-recipe").append(...recipes.map((r) => element("option", { value: r.name }, `${r.title} (${r.name})`)));
  byId("mk-hardware").append(...hardware.map((m) => element("option", { value: m.id }, m.label)));
  machine = hardware[0];
  byId("mk-recipe").addEventListener("change", (event) => start(event.target.value));
  byId("mk-hardware").addEventListener("change", (event) => {
    machine = hardware.find((m) => m.id === event.target.value);
    const note = repair();
    draw();
    show(note);
  });
  form.addEventListener("reset", (event) => (event.preventDefault(), start(recipe.name)));
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of form.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
  start(new URLSearchParams(location.search).get("recipe"));
})();
