"use strict";
(function () {
  // plotly sets a few styles as attributes, which the policy forbids; through the CSSOM the same text is allowed
  const setAttribute = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function (name, value) {
    if (name === "style" && this.style) this.style.cssText = value;
    else setAttribute.call(this, name, value);
  };

  const CHARACTER = 7; // mean width in pixels of a letter of an axis title
  const PRINT_WIDTH = 640; // CSS pixels that fit A4 and letter between ordinary margins
  const touch = matchMedia("(pointer: coarse)");
  const config = {
    displayModeBar: touch.matches ? false : "hover", displaylogo: false, showSendToCloud: false, responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "pan2d", "zoom2d"],
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];
  const json = (id) => JSON.parse(document.getElementById(id).textContent);
  const palette = plots.length ? json("palette") : {};
  let printing = false;

  function recolour(value) {
    if (typeof value === "string") return palette[value] || value;
    if (Array.isArray(value)) return value.map(recolour);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recolour(item)]));
    }
    return value;
  }

  function wrap(text, room) {
    const lines = [""];
    for (const word of text.split(" ")) {
      if (lines.at(-1) && lines.at(-1).length + word.length >= room) lines.push("");
      lines.push((lines.pop() + " " + word).trim());
    }
    return lines;
  }

  function fitTitles(layout, width) {
    for (const [name, axis] of Object.entries(layout)) {
      if (!/^[xy]axis/.test(name) || !axis.title || !axis.title.text) continue;
      const [from, to] = axis.domain || [0, 1];
      const height = (layout.height || 420) - (width < 480 ? 180 : 120);
      const room = Math.floor((name[0] === "x" ? width - 170 : height * (to - from)) / CHARACTER);
      const fewest = wrap(axis.title.text, room).length;
      let even = Math.ceil(axis.title.text.length / fewest); // lines of one length, not a full one and a last word
      while (even < room && wrap(axis.title.text, even).length > fewest) even += 1;
      axis.title.text = wrap(axis.title.text, even).join("<br>");
    }
  }

  function draw(plot) {
    let figure = json(plot.id + "-data");
    if (dark.matches && !printing) figure = recolour(figure);
    const style = getComputedStyle(document.documentElement);
    const [text, muted, soft, rule] = ["--ink", "--muted", "--soft", "--rule"].map((n) => style.getPropertyValue(n).trim());
    const layout = figure.layout;
    layout.font = Object.assign({ color: text }, layout.font);
    layout.hoverlabel = Object.assign({}, layout.hoverlabel, { bgcolor: soft, bordercolor: rule });
    layout.hoverlabel.font = Object.assign({}, layout.hoverlabel.font, { color: text });
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: text };
    if (touch.matches) layout.dragmode = false; // a finger on a figure scrolls the page
    fitTitles(layout, printing ? PRINT_WIDTH : plot.clientWidth);
    if (printing) Object.assign(layout, { width: PRINT_WIDTH, autosize: false });
    plot.dataset.drawn = "true";
    return Plotly.react(plot, figure.data, layout, config).then(() => {
      // hundreds of tick labels say less than the table; the buttons above the figure stay reachable
      plot.querySelectorAll(".main-svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
    });
  }

  const waiting = new Set(plots);
  function drawOnce(plot) {
    if (!waiting.delete(plot)) return;
    draw(plot);
  }
  // in view first, the rest while the reader reads: printing and searching find all of them
  if (plots.length) {
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); drawOnce(entry.target); }
    }, { rootMargin: "400px" });
    plots.forEach((plot) => watcher.observe(plot));
    const idle = window.requestIdleCallback || ((task) => setTimeout(task, 200));
    const next = () => { for (const plot of waiting) { drawOnce(plot); idle(next); return; } };
    addEventListener("load", () => setTimeout(() => idle(next), 400));
    dark.addEventListener("change", () => plots.filter((plot) => !waiting.has(plot)).forEach(draw));
  }

  addEventListener("beforeprint", () => {
    printing = true;
    waiting.clear();
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => {
    printing = false;
    plots.forEach(draw);
  });

  const tip = document.getElementById("tip");
  let pinned = null;
  function hideTip() {
    if (pinned) pinned.removeAttribute("aria-describedby");
    pinned = null;
    tip.hidden = true;
  }
  function showTip(token) {
    hideTip();
    pinned = token;
    tip.textContent = "‘" + token.dataset.token + "’\nactivation " + token.dataset.value + ", " + token.dataset.share +
      " % of the strongest";
    tip.hidden = false;
    token.setAttribute("aria-describedby", "tip");
    const box = token.getClientRects()[0];
    const width = tip.offsetWidth;
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8));
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = left + scrollX + "px";
    tip.style.top = (above > 0 ? above : box.bottom + 6) + scrollY + "px";
  }
  const tokenOf = (event) => event.target instanceof Element && event.target.closest(".t");
  document.addEventListener("pointerover", (event) => { const token = tokenOf(event); if (token) showTip(token); });
  document.addEventListener("pointerout", (event) => {
    if (!tokenOf(event)) return;
    const focused = document.activeElement;
    if (focused && focused.matches(".t:focus-visible")) showTip(focused); else hideTip();
  });
  document.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) showTip(token); else hideTip(); });
  document.addEventListener("focusout", (event) => { if (tokenOf(event)) hideTip(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hideTip();
    const token = tokenOf(event);
    if (!token) return;
    const row = [...token.closest(".tokens").querySelectorAll(".t")];
    const at = row.indexOf(token);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: row.length - 1 }[event.key];
    if (to === undefined || !row[to]) return;
    event.preventDefault();
    token.tabIndex = -1;
    row[to].tabIndex = 0;
    row[to].focus();
  });

  document.querySelectorAll(".toggle").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => {
      const on = button.closest(".contexts").classList.toggle("values");
      button.setAttribute("aria-pressed", String(on));
    });
  });

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...document.querySelectorAll("main section")];
  function mark() {
    const passed = sections.filter((section) => section.getBoundingClientRect().top < innerHeight * 0.3);
    const here = scrollY + innerHeight >= document.documentElement.scrollHeight - 2 ? sections.at(-1) : passed.at(-1) || sections[0];
    for (const [id, link] of links) {
      if (here && here.id === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }
  let queued = false;
  addEventListener("scroll", () => {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; mark(); });
  }, { passive: true });
  mark();
})();
