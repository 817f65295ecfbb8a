"""The page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# The page itself has no script; this one only looks at it.
PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const small = images.filter(image => !image.complete || image.naturalWidth < 200);
  const page = document.documentElement;
  document.body.dataset.found = [images.length, small.length, page.scrollWidth - innerWidth,
    document.querySelectorAll("table").length].join(" ");
});
</script>"""

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"
    ),
]


@pytest.mark.parametrize(("which", "width"), [("study_run", 1200), ("training_run", 500)])
def test_the_page_renders(which, width, request, tmp_path):
    """Catches broken images, console errors, and a page wider than the screen."""
    run = request.getfixturevalue(which)
    page = tmp_path / "page.html"
    page.write_text(run.report_path.read_text().replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-found="(\d+) (\d+) (-?\d+) (\d+)"', done.stdout)
    assert found is not None, "the probe did not run"
    images, small, overflow, tables = map(int, found.groups())
    assert images == len(list(run.plots.iterdir()))
    assert small == 0
    assert overflow <= 0
    assert tables >= 2
