// SPDX-License-Identifier: Apache-2.0
// The field above the table of errors: rows that lack one of its words are hidden.
"use strict";

(() => {
  const field = document.getElementById("mk-error-filter");
  const rows = [...document.querySelectorAll(".mk-errors table tbody tr, table.mk-errors tbody tr")];
  const status = document.getElementById("mk-error-count");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\W+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    status.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  });
  status.textContent = `${rows.length} of ${rows.length}`;
})();
