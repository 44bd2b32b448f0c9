"""A real browser without a window, for pages that the project writes: Chromium where there is one.

It can reach nothing: no name resolves, and what it tried to fetch stands in its log.
"""

import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
)
DARK, LIGHT = "0", "1"  # of Chromium's preferredColorScheme


class Visit(NamedTuple):
    """What came of opening a page. dom: as it stands after loading. urls: all that were asked for
    of a network. console: what the page said, its errors among it."""

    dom: str
    urls: tuple[str, ...]
    console: tuple[str, ...]


def visit(page: Path, folder: Path) -> Visit:
    """Open a file and wait until it has loaded."""
    log = folder / "net.json"
    done = _run(page, folder, "--dump-dom", f"--log-net-log={log}")
    urls = set(re.findall(r'"url":"([^"]*)"', log.read_text()))
    console = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
    outside = sorted(url for url in urls if not url.startswith(("file:", "data:", "chrome")))
    return Visit(done.stdout.decode(), tuple(outside), tuple(console))


def picture(page: Path, folder: Path, scheme: str = LIGHT, width: int = 1180) -> bytes:
    """A PNG of the page's first 1200 pixels."""
    path = folder / f"{scheme}-{width}.png"
    _run(
        page,
        folder,
        f"--screenshot={path}",
        f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    return path.read_bytes()


def browser() -> str:
    """The browser's path; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


def _run(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, timeout=120, check=True)


def brightness(pixels: bytes) -> float:
    """Mean of a picture's channels, 0 (black) to 1."""
    from matplotlib.image import imread

    return float(imread(io.BytesIO(pixels))[..., :3].mean())
