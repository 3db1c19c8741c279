"""Chromium without a screen and without a network. Debian: apt-get install chromium chromium-driver."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
)


def start(profile: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium or no chromedriver: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason="pip install 'indistill-fx[dev]'")
    driver = start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()
