// The page works without this script, which makes it interactive. It asks nothing from the network.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const stages = new Map(data.stages.map((stage) => [stage.key, stage]));
  const root = document.documentElement;
  root.classList.add("scripted");

  const make = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };

  // Pictures: those that the page shows at first are in it as images, the others in `data`.
  for (const image of document.querySelectorAll("img[data-row]")) {
    data.pictures[image.dataset.stage][image.dataset.row] = image.src;
  }
  for (const image of document.querySelectorAll("img[data-sheet]")) {
    data.sheets[image.dataset.stage][image.dataset.sheet].source = image.src;
  }
  const picture = (stage, row) => (data.pictures[stage] || {})[row];
  const score = (value) => (value === undefined || value === null ? "-" : String(Number(value.toPrecision(4))));
  const scored = (metric, stage, row) => ((data.scores[metric] || {})[stage] || {})[row];

  const image = (stage, row, side) => make("img", {
    className: side, src: picture(stage, row) || "", alt: `${data.prompts[row]} (${stages.get(stage).label})`,
  });

  // The enlarged picture
  const zoom = byId("zoom");
  const slider = zoom.querySelector("input");
  let turn = () => {};
  const show = (content, prompt, details, split) => {
    zoom.querySelector(".view").replaceChildren(content);
    zoom.querySelector(".prompt").textContent = prompt;
    zoom.querySelector(".details").replaceChildren(...details);
    zoom.querySelector("label").hidden = !split;
    if (!zoom.open) zoom.showModal();
  };
  const pair = (left, right, row) => {
    const frame = make("span", { className: data.pixels ? "pair pixels" : "pair" }, image(right, row, "right"));
    if (left) frame.append(image(left, row, "left"));
    return frame;
  };
  const scores = (row, shown) => {
    const metrics = Object.keys(data.scores);
    if (!metrics.length) return [];
    const head = make("tr", {}, ...["stage", ...metrics].map((name) => make("th", { scope: "col", textContent: name })));
    const lines = shown.map((key) => make("tr", {}, make("th", { scope: "row", textContent: stages.get(key).label }),
      ...metrics.map((metric) => make("td", { textContent: score(scored(metric, key, row)) }))));
    return [make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines))];
  };
  const enlarge = (left, right, row, rows) => {
    const frame = pair(left, right, row);
    show(frame, data.prompts[row], scores(row, left ? [left, right] : [right]), Boolean(left));
    if (left) setSplit(slider.value);
    turn = (by) => {
      const next = rows[(rows.indexOf(row) + by + rows.length) % rows.length];
      enlarge(left, right, next, rows);
    };
  };
  zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
  zoom.addEventListener("keydown", (event) => {
    if (event.target !== slider && event.key === "ArrowRight") turn(1);
    if (event.target !== slider && event.key === "ArrowLeft") turn(-1);
  });

  // The comparison
  const setSplit = (value) => {
    for (const frame of document.querySelectorAll(".pair")) frame.style.setProperty("--split", `${value}%`);
    for (const each of [slider, byId("split")]) if (each) each.value = value;
  };
  slider.addEventListener("input", () => setSplit(slider.value));
  const comparison = () => {
    const [left, right, list] = [byId("left"), byId("right"), byId("pairs")];
    if (!list) return;
    const tiles = [...list.querySelectorAll(".tile")];
    const rows = tiles.map((tile) => tile.dataset.row);
    const [metric] = Object.keys(data.scores);
    const refresh = () => {
      for (const tile of tiles) {
        const { row } = tile.dataset;
        tile.querySelector(".pair").replaceWith(pair(left.value, right.value, row));
        const two = [left, right].map((select) => score(scored(metric, select.value, row)));
        if (metric) tile.parentElement.querySelector(".scores").textContent = `${two[0]} → ${two[1]}`;
      }
      document.querySelector(".left-name").textContent = stages.get(left.value).label;
      document.querySelector(".right-name").textContent = stages.get(right.value).label;
      setSplit(byId("split").value);
    };
    for (const select of [left, right]) select.addEventListener("change", refresh);
    byId("split").addEventListener("input", (event) => setSplit(event.target.value));
    for (const tile of tiles) {
      tile.addEventListener("click", () => enlarge(left.value, right.value, tile.dataset.row, rows));
    }
    refresh();
  };

  // Best and worst
  const MOST = 4;
  const extremes = () => {
    const [metric, stage] = [byId("metric"), byId("ranked")];
    if (!metric) return;
    const fill = (list, rows) => list.replaceChildren(...rows.map((row) => {
      const button = make("button", { type: "button", className: "tile", ariaLabel: `enlarge: ${data.prompts[row]}` },
        pair(null, stage.value, row));
      button.addEventListener("click", () => enlarge(null, stage.value, row, rows));
      return make("li", {}, button, make("p", { className: "prompt", textContent: data.prompts[row] }),
        make("p", { className: "scores", textContent: score(scored(metric.value, stage.value, row)) }));
    }));
    const refresh = () => {
      const known = Object.entries((data.scores[metric.value] || {})[stage.value] || {});
      const rows = known.filter(([row]) => picture(stage.value, row)).sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([row]) => row);
      const half = Math.min(MOST, Math.ceil(rows.length / 2));
      const worst = [...known].filter(([row]) => picture(stage.value, row)).sort((a, b) => a[1] - b[1] || a[0] - b[0]);
      fill(byId("best"), rows.slice(0, half));
      fill(byId("worst"), worst.map(([row]) => row).filter((row) => !rows.slice(0, half).includes(row)).slice(0, half));
    };
    for (const select of [metric, stage]) select.addEventListener("change", refresh);
    refresh();
  };

  // Checkpoints
  const checkpoints = () => {
    const [stage, scrub, sheet] = [byId("trained"), byId("scrub"), byId("sheet")];
    if (!sheet) return;
    const drawn = sheet.querySelector("img");
    const refresh = () => {
      const { name, source } = data.sheets[stage.value][scrub.value];
      drawn.src = source;
      drawn.alt = `samples of ${stages.get(stage.value).label}, ${name}`;
      byId("step").textContent = name;
    };
    const choose = () => {
      scrub.max = data.sheets[stage.value].length - 1;
      scrub.value = scrub.max;
      scrub.disabled = scrub.max === "0";
      refresh();
    };
    stage.addEventListener("change", choose);
    scrub.addEventListener("input", refresh);
    sheet.addEventListener("click", () => {
      turn = (by) => { scrub.value = Number(scrub.value) + by; refresh(); sheet.click(); };
      show(make("img", { src: drawn.src, alt: drawn.alt }), drawn.alt, [], false);
    });
    scrub.disabled = scrub.max === "0";
    refresh();
  };

  // Curves
  const charts = [];
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const shade = (stage) => color(`--c${stages.get(stage).color}`);
  const LONG = 40;
  const smooth = (values) => {
    const reach = Math.max(2, Math.floor(values.length / 40));
    return values.map((value, i) => {
      if (value === null) return null;
      const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((each) => each !== null);
      return near.reduce((sum, each) => sum + each, 0) / near.length;
    });
  };
  const number = (value) => (value === null || value === undefined ? "-" : String(Number(value.toPrecision(4))));
  const UNITS = [[7200, 3600, "h"], [120, 60, "min"], [0, 1, "s"]];
  const duration = (seconds, longest = seconds) => {
    if (seconds === null || seconds === undefined) return "-";
    const [, size, unit] = UNITS.find(([from]) => longest >= from);
    return `${Number((seconds / size).toFixed(size > 1 ? 2 : 1))} ${unit}`;
  };
  const INCREMENTS = [1, 2, 5, 10, 15, 30].flatMap((n) => [n, 60 * n]).concat([1, 2, 3, 6, 12, 24, 48, 96, 192].map((n) => 3600 * n))
    .sort((a, b) => a - b);
  const plain = { grid: { width: 1 }, ticks: {}, font: "12px system-ui" };
  const axis = (scale, rest) => ({
    ...plain, scale, stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, ...rest,
  });
  const xAxis = (timed) => axis("x", {
    size: 34, space: 70, ...(timed ? { incrs: INCREMENTS } : {}),
    values: (_, splits) => splits.map((at) => (timed ? duration(at, splits[splits.length - 1]) : number(at))),
  });
  const yAxis = (scale, rest) => axis(scale, { size: 58, values: (_, splits) => splits.map(number), ...rest });
  const mark = (at) => (chart) => {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.strokeStyle = color("--down");
    ctx.setLineDash([6, 4]);
    for (const [x] of at) {
      const left = chart.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  };
  // Stages log at different times: at each time, a line has the value of its nearest point, if it has begun and not ended.
  const nearest = (chart, line, at) => {
    const values = chart.data[line];
    if (line === 0 || typeof values[at] === "number") return at;
    let [before, after] = [at, at];
    while (before >= 0 && typeof values[before] !== "number") before -= 1;
    while (after < values.length && typeof values[after] !== "number") after += 1;
    if (before < 0 || after === values.length) return at;
    const [times] = chart.data;
    return times[at] - times[before] < times[after] - times[at] ? before : after;
  };
  const plot = (holder, tables, series, { x, timed = false, sync, bands, marks = [], scales = ["y"] }) => {
    const sides = [yAxis(scales[0], {}), ...(scales.length > 1 ? [yAxis(scales[1], { side: 1, grid: { show: false } })] : [])];
    const chart = new uPlot({
      width: Math.max(200, holder.clientWidth), height: 200, bands,
      series: [{ label: x, value: (_, v) => (timed ? duration(v) : number(v)) }, ...series],
      scales: { x: { time: false }, ...Object.fromEntries(scales.map((key) => [key, {}])) },
      axes: [xAxis(timed), ...sides], cursor: { sync: { key: sync }, dataIdx: nearest }, hooks: { draw: [mark(marks)] },
    }, uPlot.join(tables), holder);
    const rows = chart.root.querySelectorAll(".u-legend .u-series");
    series.forEach(({ silent }, i) => { if (silent) rows[i + 1].style.display = "none"; });
    charts.push({ chart, holder });
  };
  // Losses of different objectives may be a hundredfold apart: then each stage has a scale of its own.
  const APART = 8;
  const spread = (values) => {
    const known = values.filter((value) => value !== null);
    return Math.max(...known.map(Math.abs), 1e-30);
  };
  const curve = (figure) => {
    const holder = figure.querySelector(".plot");
    if (holder.childElementCount || figure.closest("details:not([open])")) return;
    const { metric } = figure.dataset;
    const { stages: logged, unit, alarms, longest } = data.curves;
    const shown = data.stages.filter(({ key }) => logged[key] && logged[key].y[metric]);
    const sizes = shown.map(({ key }) => spread(logged[key].y[metric]));
    const apart = Math.max(...sizes) > APART * Math.min(...sizes);
    const [tables, series] = [[[[0, longest]]], []];
    for (const { key, label } of shown) {
      const { x, y: { [metric]: values } } = logged[key];
      const line = {
        label, stroke: shade(key), scale: apart ? key : "y", spanGaps: true, width: 1.6, value: (_, v) => number(v),
        points: { show: values.length < 3 },
      };
      if (values.length >= LONG && byId("smooth").checked) {
        tables.push([x, values, smooth(values)]);
        series.push({ ...line, label: "", width: 1, alpha: 0.3, silent: true }, line);
      } else {
        tables.push([x, values]);
        series.push(line);
      }
    }
    plot(holder, tables, series, {
      x: unit, timed: unit === "time", sync: "time", marks: /^(reward|held_out)/.test(metric) ? alarms : [],
      scales: apart ? shown.map(({ key }) => key) : ["y"],
    });
    const chart = charts[charts.length - 1].chart;
    if (apart) chart.axes.slice(1).forEach((each, i) => { each.stroke = () => shade(shown[i].key); });
    if (apart) chart.redraw(false, true);
  };
  const drift = () => {
    const figure = byId("drift-chart");
    const holder = figure && figure.querySelector(".plot");
    if (!holder || holder.childElementCount) return;
    const [tables, series, bands] = [[], [], []];
    for (const { key, label } of data.stages) {
      const of = data.drift[key];
      if (!of) continue;
      const stroke = shade(key);
      const bound = { label: "", stroke, width: 0, points: { show: false }, silent: true };
      const at = series.length + 1;
      tables.push([of.sigmas, of.drift, of.high, of.low]);
      series.push({ label, stroke, width: 1.8, spanGaps: true, value: (_, v) => number(v) },
        bound, { ...bound });
      bands.push({ series: [at + 1, at + 2], fill: `${stroke}33` });
    }
    if (tables.length) plot(holder, tables, series, { x: "sigma", sync: "sigma", bands });
  };
  const draw = () => {
    for (const { chart } of charts.splice(0)) chart.destroy();
    document.querySelectorAll(".chart[data-metric]").forEach(curve);
    drift();
  };
  const curves = () => {
    draw();
    for (const details of document.querySelectorAll("details")) {
      details.addEventListener("toggle", () => details.querySelectorAll(".chart[data-metric]").forEach(curve));
    }
    if (byId("smooth")) byId("smooth").addEventListener("change", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    new ResizeObserver(() => {
      for (const { chart, holder } of charts) {
        if (holder.clientWidth && Math.abs(holder.clientWidth - chart.width) > 1) {
          chart.setSize({ width: holder.clientWidth, height: 200 });
        }
      }
    }).observe(document.body);
    addEventListener("beforeprint", () => { root.dataset.print = ""; draw(); });
    addEventListener("afterprint", () => { delete root.dataset.print; draw(); });
  };

  // How long ago a running run changed its files
  const QUIET = 900;
  const ago = () => {
    for (const status of document.querySelectorAll(".running[data-changed]")) {
      const seconds = (Date.now() - Date.parse(status.dataset.changed)) / 1000;
      if (!(seconds >= 0)) continue;
      const quiet = seconds > QUIET ? "; it may have been killed" : "";
      status.querySelector(".ago").textContent = `; last news ${seconds < 120 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`} ago${quiet}`;
    }
  };

  comparison();
  extremes();
  checkpoints();
  curves();
  ago();
  setInterval(ago, 5000);
})();
