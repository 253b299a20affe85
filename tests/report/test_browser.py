"""The page in a real browser: it runs, obeys its own policy, says nothing on the console, and its sliders move."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from fvq_jax.report.tokenizer import page
from tests.helpers.report_case import made_up_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")

# Appended to the page: moves the first slider as a person would and notes what that did.
MOVE = """
<script>
const first = document.querySelector(".pair input");
first.value = 20;
first.dispatchEvent(new Event("input"));
document.documentElement.dataset.clip = getComputedStyle(document.querySelector(".original")).clipPath;
</script>
"""


@pytest.fixture(scope="module")
def text():
    return page(made_up_report())


def browse(folder, text, *options):
    """The page's elements after its script has run, and what it wrote on the console."""
    (folder / "index.html").write_text(text, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", *options, f"file://{folder / 'index.html'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, re.findall(r"CONSOLE.*", ended.stderr)


def test_it_runs_without_a_word_on_the_console(text, tmp_path):
    elements, console = browse(tmp_path, text + MOVE, "--dump-dom")
    assert console == []
    assert 'data-sliders="20"' in elements
    assert 'data-clip="inset(0px 80% 0px 0px)"' in elements or "80%" in re.search('data-clip="(.*?)"', elements)[1]


def test_errors_and_requests_to_elsewhere_would_be_seen(text, tmp_path):
    broken = text + '<script>no_such_function()</script><img src="https://example.org/picture.png">'
    _, console = browse(tmp_path, broken, "--dump-dom")
    assert any("no_such_function is not defined" in line for line in console)
    assert any("example.org" in line and "Content Security Policy" in line for line in console)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_light_and_dark_and_fits_a_phone(scheme, text, tmp_path):
    dark = scheme == "dark"
    options = [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=500,1200"]
    browse(tmp_path, text, f"--screenshot={tmp_path / 'shot.png'}", "--hide-scrollbars", *options)
    with Image.open(tmp_path / "shot.png") as shot:
        pixels = np.asarray(shot.convert("L"))
    assert (pixels[:20, :10].mean() < 60) == dark
    assert pixels.std() > 20
    assert np.ptp(pixels[:, -8:].astype(int)) < 8  # nothing sticks out to the right
