"""Screenshots of pages, to look at: python tests/browser/screenshots.py OUT page.html …  (1440 and 390 wide, both themes)."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from conftest import start

with tempfile.TemporaryDirectory() as profile:
    driver = start(Path(profile))
    try:
        for page in map(Path, sys.argv[2:]):
            for width in (1440, 390):
                for theme in ("light", "dark"):
                    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
                    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                    scheme = [{"name": "prefers-color-scheme", "value": theme}]
                    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
                    driver.get(page.resolve().as_uri())
                    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
                    (Path(sys.argv[1]) / f"{page.stem}-{width}-{theme}.png").write_bytes(base64.b64decode(shot["data"]))
    finally:
        driver.quit()
