"""The page in headless Chromium, as wide as a phone and as a screen, light and dark.

`PROXBIT_SCREENSHOTS=FOLDER pytest tests/analysis/report/test_browser.py` also writes pictures of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import browser
from proxbit.analysis.report import write_report
from run_folder import write_run

WIDTHS = {"phone": 375, "desktop": 1280}
SCRIPT = """(() => {
  const plot = document.querySelector("svg.plot");
  if (!plot) return null;
  const readout = plot.closest("figure").querySelector(".readout");
  const box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 0.97, clientY: box.top + 20 }));
  const pointed = readout.textContent;
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", cancelable: true }));
  const moved = readout.textContent;
  plot.dispatchEvent(new PointerEvent("pointerleave"));
  return {
    width: innerWidth,
    scrolls: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide: [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll") && !e.closest("svg") &&
      e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.className),
    empty: [...document.images].filter((e) => !e.complete || !e.naturalWidth).length,
    small: Math.min(...[...document.querySelectorAll("svg.plot text")].map((e) => e.getBoundingClientRect().height)),
    pointed, moved, left: readout.textContent,
    background: getComputedStyle(document.body).backgroundColor,
  };
})()"""


def open_pages(pages, dark=False, script=SCRIPT):
    order = {"pages": list(map(str, pages)), "widths": list(WIDTHS.values()), "dark": dark, "script": script}
    order["pictures"] = os.environ.get("PROXBIT_SCREENSHOTS")
    command = [sys.executable, browser.__file__, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_renders(tmp_path, dark):
    path = write_report(write_run(tmp_path / "run"))
    for shown, width in zip(open_pages([path], dark), WIDTHS.values(), strict=True):
        assert shown["loaded"] and shown["console"] == []
        assert {Path(address).name for address in shown["requests"] if address != "data:"} == {path.name}
        found = shown["answer"]
        assert found["width"] == width
        assert (found["scrolls"], found["wide"], found["empty"]) == (0, [], 0)
        assert found["small"] > 9
        assert found["pointed"].startswith("epoch 4: training 0.05, test, hard 0.075, test, soft 0.05")
        assert found["moved"].startswith("epoch 3: ")
        assert not found["left"].startswith("epoch")
        red = int(found["background"].removeprefix("rgb(").split(",")[0])
        assert red < 64 if dark else red > 192


def test_the_browser_sees_what_is_wrong(tmp_path):
    """The test above can fail: on errors, on requests, on a page that is too wide."""
    page = tmp_path / "bad.html"
    page.write_text("<p style='width: 4000px'>x<img src='http://127.0.0.1:8099/x.png'><script>boom()</script>")
    script = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    for shown in open_pages([page], script=script):
        assert any("boom is not defined" in message for message in shown["console"])
        assert "http://127.0.0.1:8099/x.png" in shown["requests"]
        assert shown["answer"] > 2000
