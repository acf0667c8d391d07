"""The page in a real browser: its plots are seen in light and in dark, and it asks nobody for anything.

Skipped where there is no Chromium. What the browser asks its maker for, by itself, does not count.
"""

import json
import shutil
import subprocess
from urllib.parse import urlsplit

import pytest

from awq_core.report import page_text, read_record

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
SILENT = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
MAKER = (".google.com", ".googleapis.com", ".gvt1.com")
WIDTH, HEIGHT = 1100, 4200
SCHEMES = {"dark": 0, "light": 1}
BACKGROUND = {"dark": (0x14, 0x18, 0x1C), "light": (0xFF, 0xFF, 0xFF)}


def opened(folder, text, scheme):
    """(picture of the page, hosts it asked for, lines on its console)."""
    page, picture, log = folder / "page.html", folder / "page.png", folder / "net.json"
    page.write_text(text, encoding="utf-8")
    command = [BROWSER, *QUIET, *SILENT, f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--enable-logging=stderr"]
    command += [f"--log-net-log={log}", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
    urls = [event.get("params", {}).get("url", "") for event in json.loads(log.read_text())["events"]]
    hosts = {urlsplit(url).hostname or "" for url in urls if url.startswith(("http", "ws"))}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Image.open(picture).convert("RGB"), {h for h in hosts if not h.endswith(MAKER)}, console


def colours(picture):
    """Colour -> share of the picture."""
    counted = picture.getcolors(WIDTH * HEIGHT)
    return {colour: count / (picture.width * picture.height) for count, colour in counted}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plots_are_seen_and_nobody_is_asked(dense, scheme, tmp_path):
    picture, hosts, console = opened(tmp_path, page_text(read_record(dense[0])), scheme)
    assert picture.size == (WIDTH, HEIGHT)
    assert hosts == set() and console == []
    shares = colours(picture)
    assert shares[BACKGROUND[scheme]] > 0.3, "the page"
    strong = sum(share for colour, share in shares.items() if max(colour) - min(colour) > 60)
    assert strong > 0.1, "maps and bars"
    words = [
        share for c, share in shares.items() if abs(sum(c) - sum(BACKGROUND[scheme])) > 450 and max(c) - min(c) < 40
    ]
    assert sum(words) > 0.002, "words and axes, against the page"


def test_the_checks_see_a_page_that_fetches(tmp_path):
    text = '<script src="http://acorn.invalid/a.js"></script><script>console.error("oak")</script>'
    _, hosts, console = opened(tmp_path, text, "light")
    assert hosts == {"acorn.invalid"}
    assert any("oak" in line for line in console)
