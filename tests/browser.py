"""What does a page look like in a real browser, without a network?"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

PHONE, DESK = 390, 1200
"""Widths of a window in pixels."""

NARROWEST = 500
"""The narrowest window that Chromium opens."""

# Runs in the page before anything else: notes errors, then looks at every canvas, also those in the
# shadow trees that bokeh makes, and writes down how many have been drawn on.
WATCH = """<script>
const errors = [];
window.addEventListener("error", (event) => errors.push(event.message));
const complain = console.error;
console.error = (...words) => { errors.push(words.join(" ")); complain(...words); };
function canvases(root) {
  const found = [...root.querySelectorAll("canvas")];
  for (const node of root.querySelectorAll("*")) {
    if (node.shadowRoot) found.push(...canvases(node.shadowRoot));
  }
  return found;
}
function drawn(canvas) {
  const context = canvas.getContext("2d");
  if (!context || !canvas.width || !canvas.height) return false;
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size > 10;
}
window.addEventListener("load", () => setTimeout(() => {
  const all = canvases(document);
  document.body.dataset.canvases = all.filter(drawn).length;
  document.body.dataset.width = document.documentElement.scrollWidth;
  document.body.dataset.errors = errors.join(" | ");
}, 3000));
</script>"""


def look_at(page: Path, width: int) -> dict[str, str]:
    """Open a page in a window of this width: its width, how many canvases are drawn, errors."""
    watched = page.with_name(f"watched{width}-{page.name}")
    watched.write_text(page.read_text().replace("<head>", f"<head>{WATCH}", 1))
    run = _open(watched, f"--window-size={width},900", "--dump-dom")
    body = re.search(r"<body [^>]*data-canvases[^>]*>", run.stdout).group()
    return dict(re.findall(r'data-(\w+)="([^"]*)"', body))


def print_page(page: Path) -> tuple[int, int]:
    """Print a page: how many sheets of paper that takes, and how many drawings are on them."""
    paper = page.with_suffix(".pdf")
    _open(page, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    content = paper.read_bytes()
    return len(re.findall(rb"/Type /Page\b", content)), content.count(b"/Subtype /Image")


def _open(page: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            _browser(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={page.parent / 'profile'}",
            "--virtual-time-budget=10000",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def _browser() -> str:
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser to look at reports with: install one of {', '.join(BROWSERS)}")
