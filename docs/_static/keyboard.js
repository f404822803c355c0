// SPDX-License-Identifier: Apache-2.0
// What scrolls can be reached with the keyboard.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".cell_output div, div.math, .highlight pre"))
    if (box.scrollWidth > box.clientWidth && /auto|scroll/.test(getComputedStyle(box).overflowX)) box.tabIndex = 0;
});
