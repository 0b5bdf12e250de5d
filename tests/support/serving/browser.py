"""A real browser: Chromium without a window, driven by selenium. Tests skip where either is absent.

python -m tests.support.serving.browser http://127.0.0.1:3000 image.png page.png [dark] [WIDTH]
takes a picture of the page with its answer to an image, as docs/pictures/page.png was taken.
"""

import base64
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb",
)  # fmt: skip
PIXELS = """
const canvas = document.getElementById(arguments[0]), [x, y, w, h] = [0, 0, canvas.width, canvas.height];
return [w, h, btoa(Array.from(canvas.getContext('2d').getImageData(x, y, w, h).data, c => String.fromCharCode(c)).join(''))];
"""


class Browser:
    """What the tests do with a page; `driver` is selenium's."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.downloads = driver, folder
        self.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def get(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def text(self, name: str) -> str:
        return str(self.js("return document.getElementById(arguments[0]).textContent", name))

    def wait(self, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
        """The condition's first true value."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda _: condition())

    def size(self, width: int, height: int = 900, dark: bool = False) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """The page, when it has found out what it can about the service."""
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(url)
        self.wait(lambda: self.js("return !(card.hidden && problem.hidden) && kinds.querySelector('input') !== null"))

    def settled(self) -> bool:
        return bool(self.js("return !document.body.classList.contains('busy') && !(result.hidden && problem.hidden)"))

    def choose(self, file: Path) -> None:
        """Give the page a file by its file input and wait until it has been answered."""
        self.js("document.getElementById('status').textContent = ''; result.hidden = problem.hidden = true")
        self.get("file").send_keys(str(file))
        self.wait(self.settled)

    def pixels(self, name: str) -> np.ndarray:
        """A canvas as uint8 H x W x 4."""
        width, height, text = self.js(PIXELS, name)
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)

    def keys(self, *keys: str) -> None:
        """Type at whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def focus(self) -> str:
        """Id, or else value, of the element that has the focus."""
        return str(self.js("return document.activeElement.id || document.activeElement.value || ''"))

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the console says since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def start() -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    helper = shutil.which("chromedriver")
    if not program or not helper:
        pytest.skip("needs Chromium and its chromedriver (Debian: chromium, chromium-driver)")
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as folder:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in (*FLAGS, f"--user-data-dir={folder}/profile"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(helper))
        downloads = Path(folder, "downloads")
        downloads.mkdir()
        try:
            yield Browser(driver, downloads)
        finally:
            driver.quit()


def picture(url: str, image: Path, out: Path, *options: str) -> None:
    """The whole page with its answer to an image, as PNG."""
    width = next((int(option) for option in options if option.isdigit()), 1180)
    with start() as browser:
        browser.size(width, dark="dark" in options)
        browser.open(url)
        browser.choose(image)
        height = browser.js("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = browser.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        out.write_bytes(base64.b64decode(shot["data"]))


def png(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


if __name__ == "__main__":
    picture(sys.argv[1], Path(sys.argv[2]).absolute(), Path(sys.argv[3]), *sys.argv[4:])
