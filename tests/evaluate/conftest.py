"""A real browser for the pages; tests that ask for it are skipped where there is none."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chinese_llama.evaluate.rating import Server, Votes
from tests.evaluate.rated import write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = (
    "headless=new no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync "
    "no-first-run hide-scrollbars window-size=1000,800 force-prefers-reduced-motion"  # no scrolling under a click
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium under selenium; its console messages are kept."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium")
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running server for votes on made answers."""
    with Server(Votes(write(tmp_path)), 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
