// Hover and click on the fronts, and sorting of tables. The markers of the SVG figures have ids
// such as "front-entry-<digest>"; table rows and members carry the same digest as data.
(() => {
  const tip = document.getElementById("tip");
  const markers = [...document.querySelectorAll('svg [id*="-entry-"]')];
  const digestOf = item => item.dataset.digest ?? item.id.split("-entry-")[1];
  const items = [...document.querySelectorAll("[data-digest]"), ...markers];
  const rows = [...document.querySelectorAll("tr[data-tip]")];
  const tips = new Map(rows.map(row => [row.dataset.digest, row.dataset.tip]));

  const highlight = (digest, on) => items.forEach(item => {
    if (digestOf(item) === digest) item.classList.toggle("lit", on);
  });
  items.forEach(item => {
    item.addEventListener("pointerenter", () => highlight(digestOf(item), true));
    item.addEventListener("pointerleave", () => highlight(digestOf(item), false));
  });

  markers.forEach(marker => {
    const digest = digestOf(marker);
    marker.addEventListener("pointermove", event => {
      tip.textContent = tips.get(digest) ?? digest;
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
      tip.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 8) + "px";
    });
    marker.addEventListener("pointerleave", () => { tip.hidden = true; });
    marker.addEventListener("click", () => {
      const member = document.getElementById("member-" + digest);
      if (!member) return;
      member.open = true;
      member.scrollIntoView({ behavior: "smooth" });
    });
  });

  const keyOf = cell => {
    const number = Number(cell.dataset.value);
    return Number.isNaN(number) ? cell.textContent : number;
  };
  document.querySelectorAll("table.sortable").forEach(table => {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [keyOf(a.cells[column]), keyOf(b.cells[column])];
        const areNumbers = typeof x === "number" && typeof y === "number";
        return sign * (areNumbers ? x - y : String(x).localeCompare(String(y)));
      }));
    }));
  });
})();
