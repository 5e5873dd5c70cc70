"use strict";
// Sorts a table by the column whose head is clicked: numbers from the largest down, then up.
for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[0];
  const inOrder = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const values = new Map(inOrder.map((row) => [row, row.cells[column].dataset.value]));
    const known = [...values.values()].filter((value) => value !== undefined);
    const numeric = known.every((value) => Number.isFinite(Number(value)));
    head.querySelector("button").addEventListener("click", () => {
      const first = numeric && column > 0 ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      const compare = (a, b) => {
        const [x, y] = [values.get(a), values.get(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
      };
      body.append(...[...inOrder].sort(compare));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
    });
  });
}
