"""Screenshots of pages, to look at: python -m tests.browser.screenshots OUT page.html … (1440 and 390 wide, both themes)."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from tests.browser.conftest import start


def main(out: Path, *pages: Path) -> None:
    for theme in ("light", "dark"):
        # In a profile of its own: pages remember the theme they were first seen in.
        with tempfile.TemporaryDirectory() as profile:
            driver = start(Path(profile))
            try:
                for page in pages:
                    for width in (1440, 390):
                        (out / f"{page.stem}-{width}-{theme}.png").write_bytes(take(driver, page, width, theme))
            finally:
                driver.quit()


def take(driver, page: Path, width: int, theme: str) -> bytes:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get(page.resolve(strict=True).as_uri())
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
