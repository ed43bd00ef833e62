"""Chromium without a window, through chromedriver's WebDriver protocol: plain HTTP, so that no package is needed."""

import base64
import contextlib
import http.client
import json
import shutil
import subprocess
import time
from dataclasses import dataclass

from tests.serving.servers import PATIENCE, until

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = None if DRIVER and CHROMIUM else "needs Chromium: apt-get install chromium chromium-driver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# WebDriver's names of keys.
KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Escape": "\ue00c", "Tab": "\ue004", "Right": "\ue014", "End": "\ue010"}
# Nothing is fetched from anywhere, and nothing is asked of whoever sits there.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
)


@dataclass(kw_only=True)
class Browser:
    """A page in a session of its own."""

    port: int
    session: str = ""

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3 * PATIENCE)
        with contextlib.closing(connection):
            data = json.dumps(body if body is not None else {}) if method == "POST" else None
            connection.request(method, path, body=data, headers={"content-type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        if isinstance(value, dict) and value.get("error"):
            raise AssertionError(f"{method} {path}: {value['error']}: {value['message'].splitlines()[0]}")
        return value

    def command(self, path, method="POST", **body):
        return self.call(method, f"/session/{self.session}/{path}", body)

    def devtools(self, name, **parameters):
        return self.command("goog/cdp/execute", cmd=name, params=parameters)

    def open(self, url):
        self.command("url", url=url)

    def run(self, script, *arguments):
        """The value of a function's body in the page."""
        return self.command("execute/sync", script=script, args=arguments)

    def all_text(self, selector):
        """The text of every element that fits, spaces included."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def text(self, selector):
        [found] = self.all_text(selector)
        return found

    def shown(self, selector):
        """Whether there is such an element that takes room."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].some(e => e.offsetWidth * e.offsetHeight > 1)",
            selector,
        )

    def click(self, selector):
        found = self.command("element", using="css selector", value=selector)
        self.command(f"element/{found[ELEMENT]}/click")

    def type(self, *keys):
        """Press and release keys where the focus is: names of `KEYS`, texts, and pairs (held, pressed)."""
        actions = []
        for key in keys:
            held, pressed = key if isinstance(key, tuple) else (None, key)
            pressed = [KEYS[pressed]] if pressed in KEYS else pressed
            if held:
                actions.append({"type": "keyDown", "value": KEYS[held]})
            for one in pressed:
                actions += [{"type": "keyDown", "value": one}, {"type": "keyUp", "value": one}]
            if held:
                actions.append({"type": "keyUp", "value": KEYS[held]})
        self.command("actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def focused(self):
        return self.run("return document.activeElement.id || document.activeElement.className")

    def wait(self, script, what):
        """Until a function's body in the page gives something true."""
        until(lambda: self.run(script), what)

    def log(self):
        """What the console said since the last look."""
        return [one["message"] for one in self.command("se/log", type="browser")]

    def size(self, width, height, scheme="light"):
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.command("screenshot", method="GET")))


@contextlib.contextmanager
def browsing(folder):
    """A browser whose profile is in a folder of its own."""
    with (folder / "driver.log").open("w+") as output:
        process = subprocess.Popen([DRIVER, "--port=0"], stdout=output, stderr=subprocess.STDOUT)
        try:
            browser = Browser(port=_port(process, folder / "driver.log"))
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            browser.session = browser.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            try:
                yield browser
            finally:
                browser.call("DELETE", f"/session/{browser.session}")
        finally:
            process.terminate()
            process.wait()


def _port(process, log):
    """Where the driver listens; it says so when it does."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        said = log.read_text()
        if "started successfully on port " in said:
            return int(said.split("started successfully on port ")[1].split(".")[0].split()[0])
        time.sleep(0.05)
    raise AssertionError(f"chromedriver did not start: {log.read_text()}")
