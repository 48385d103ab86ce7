"""Make docs/live.png: the page with a simulated run, as Chromium shows it. ``python docs/live_picture.py``."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import sync_playwright

COMMAND = [sys.executable, "-m", "stream"]
FRAMES = 8000
QMAP = """qmap --shape 256x256 --beam-center-x 128 --beam-center-y 140 --detector-distance 5m --pixel-size 75um
--incident-energy 11keV --n-dynamic 8 --n-static 120 --q-min 0.0015/angstrom"""


def main() -> None:
    """Simulate a run, and look at its page while it is on."""
    out = Path(__file__).with_name("live.png")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        qmap = Path(folder) / "qmap.h5"
        subprocess.run([*COMMAND, *QMAP.split(), "--out", qmap], check=True)
        source, port = f"zmq+dectris://127.0.0.1:{free_port()}", free_port()
        detector = ["simulate", "--qmap", qmap, "--to", source, "--frames", str(FRAMES), "--rate", "200 Hz"]
        physics = ["--mean-counts", "0.3", "--diffusion", "4e5 angstrom^2/s", "--lose", "0.01"]
        correlator = ["run", "--source", source, "--qmap", qmap, "--two-time", "128"]
        for arguments in (
            [*correlator, "--quiet", "--live", f"live://127.0.0.1:{port}"],
            [*detector, *physics, "--sample", "silica in glycerol, 25 °C"],
        ):
            process = stack.enter_context(subprocess.Popen([*COMMAND, *arguments]))
            stack.callback(process.terminate)
        wait_for(port)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1110})
        page.goto(f"http://127.0.0.1:{port}/")
        deadline = time.monotonic() + 240
        while not page.evaluate("xpcs.state.run.n_frames > 5000 && xpcs.state.fit !== null"):
            if time.monotonic() > deadline:
                raise TimeoutError("no results came")
            page.wait_for_timeout(200)
        page.screenshot(path=out)
        browser.close()
    # 256 colours are enough for lines and a map.
    Image.open(out).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    print(out, out.stat().st_size, "bytes")


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Return once the page is served."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the page is not served")


if __name__ == "__main__":
    main()
