"""The page itself, in Chromium: what a scientist sees."""

import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import h5py
import numpy as np
import pytest

from stream.ingest.zmq import ZmqResults
from stream.messages import Result
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from stream.sinks.zmq import ZmqSink
from tests.test_live import ROIMAP, SHAPE, answers, ledger, multitau, scattering, start, stop, until

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 30


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Screen:
    """One page of the browser; says what went wrong in it."""

    def __init__(self, browser, port, **options):
        self.page = browser.new_page(viewport={"width": 1400, "height": 900}, **options)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if "Policy" in said.text else None)
        self.page.goto(f"http://127.0.0.1:{port}/")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()
        assert self.errors == []

    def ask(self, expression):
        return self.page.evaluate(expression)

    def wait(self, expression, seconds=SECONDS):
        # Not wait_for_function, which makes a script of text: the page lets nobody do that.
        until(lambda: self.ask(expression), seconds)

    def says(self, element):
        return self.page.locator(f"#{element}").inner_text()

    def columns(self, source, *names):
        data = self.ask(f"Object.fromEntries(Object.entries(xpcs.{source}.data).map(([k, v]) => [k, [...v]]))")
        return [np.array(data[name]) for name in names]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Live:
    """The command `live`, and what it hears."""

    def __init__(self, folder):
        self.qmap = folder / "qmap.h5"
        write(self.qmap, ROIMAP)
        self.sink = ZmqSink("tcp://127.0.0.1:*", pattern="pub")
        self.port = free_port()
        self.start()

    def start(self):
        self.server = subprocess.Popen(
            [
                *(sys.executable, "-m", "stream", "live", self.sink.address.replace("tcp", "zmq")),
                *("--qmap", str(self.qmap), "--at", f"live://127.0.0.1:{self.port}"),
            ]
        )
        until(lambda: answers(self.port), 60)

    def stop(self):
        self.server.terminate()
        assert self.server.wait(20) == 0

    def publish(self, *outputs):
        for output in outputs:
            self.sink.write(output)


@pytest.fixture(scope="module")
def live(chromium, tmp_path_factory):
    live = Live(tmp_path_factory.mktemp("live"))
    with live.sink:
        yield live
        live.stop()


@pytest.fixture(scope="module")
def page(chromium, live):
    with Screen(chromium, live.port) as screen:
        yield screen


@pytest.fixture
def screen(page):
    """The page, as it is when nothing was clicked."""
    page.ask("document.activeElement.blur()")
    page.page.keyboard.press("Escape")
    yield page
    assert page.errors == []


@pytest.fixture
def run():
    return f"run-{time.monotonic_ns()}"


def time_of_first_curves(address):
    """Hear what the page hears."""
    with ZmqResults(address.replace("zmq", "tcp")) as results:
        curves = (each for each in results if isinstance(each, Result) and each.operator == "multitau")
        next(each for each in curves if len(each.arrays["tau"]))
        return time.time()


def test_curves_of_a_real_stream_come_within_a_second_and_end_as_they_are_in_the_file(chromium, tmp_path):
    roimap = ring_map(
        shape=(64, 128), beam_center_x=64, beam_center_y=70, detector_distance=5.0, pixel_size=75e-6,
        incident_energy=11.0, n_static=40, n_dynamic=4,
    )  # fmt: skip
    qmap, result = tmp_path / "qmap.h5", tmp_path / "result.h5"
    write(qmap, roimap)
    source, page, publish = (f"zmq://127.0.0.1:{free_port()}" for _ in range(3))
    port = int(page.rpartition(":")[2])
    command = [sys.executable, "-m", "stream"]
    with ExitStack() as stack:
        pipeline = stack.enter_context(
            subprocess.Popen(
                [
                    *(*command, "run", "--source", source, "--qmap", qmap, "--out", result, "--quiet"),
                    *("--live", f"live://127.0.0.1:{port}", "--publish", publish, "--publish-every", "200 ms"),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(pipeline.terminate)
        until(lambda: answers(port), 120)
        screen = stack.enter_context(Screen(chromium, port))
        screen.wait("xpcs.state.here")
        assert screen.says("state") == "waiting"
        detector = [*command, "simulate", "--qmap", qmap, "--to", source, "--frames", "2000", "--rate", "1 kHz"]
        first = stack.enter_context(ThreadPoolExecutor(1)).submit(time_of_first_curves, publish)
        stack.enter_context(subprocess.Popen([*detector, "--diffusion", "4e6 angstrom^2/s", "--mean-counts", "0.5"]))
        screen.wait("xpcs.state.g2 !== null && xpcs.drawn.length > 0", 60)
        assert screen.ask("xpcs.drawn[0][1]") / 1000 - first.result(60) < 1
        assert pipeline.stdout.readline().strip() == str(result)
        screen.wait("xpcs.state.run.state === 'complete' && xpcs.state.g2?.head.final")
        screen.wait("xpcs.drawn.at(-1)[0] === 2000")
        with h5py.File(result) as file:
            multitau = file["xpcs/multitau"]
            g2, delay = multitau["normalized_g2"][()], multitau["delay_list"][()]
        x, y, bins = screen.columns("curves.points", "x", "y", "bin")
        for bin_ in range(4):
            known = np.isfinite(g2[:, bin_])
            np.testing.assert_array_equal(y[bins == bin_], g2[known, bin_])
            np.testing.assert_allclose(x[bins == bin_], delay.ravel()[known] * 1e-3)
        assert screen.says("frames") == "2 000 of 2 000"


def test_the_hover_names_the_pixel_its_q_and_its_bin_and_a_click_picks_it(screen, live, run):
    live.publish(start(run), multitau(run), scattering(run), ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}' && xpcs.picture.drawn !== undefined")
    bins = ROIMAP.dynamic_roi_map
    here, below, beside = bins[:-1, :-1], bins[1:, :-1], bins[:-1, 1:]
    for row, column in np.argwhere((here > 0) & (here != below) & (here != beside))[::9]:
        x, y = screen.ask(
            f"""(async () => {{ const view = await xpcs.picture.shown; const frame = view.frame;
            const box = document.querySelector('#picture > *').getBoundingClientRect();
            return [box.x + frame.x_scale.compute({column} + 0.5),
                    box.y + frame.y_scale.compute({row} + 0.5)] }})()"""
        )
        screen.page.mouse.move(x, y)
        screen.wait(f"document.getElementById('picture-says').textContent.startsWith('row {row}, column {column} ')")
        expected = bins[row, column]
        assert f" · bin {expected}" in screen.says("picture-says")
        away = np.hypot(row - 24, column - 32) * 75e-6
        q = 4 * np.pi * 11.0 / 12.398419843320026 * np.sin(np.arctan2(away, 5.0) / 2)
        assert f"q = {q:.5f} Å⁻¹" in screen.says("picture-says")
    screen.page.mouse.click(x, y)
    screen.wait(f"xpcs.state.selected === {expected - 1}")


def test_delays_with_few_pairs_are_pale(screen, live, run):
    live.publish(start(run), multitau(run), ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}' && xpcs.curves.key === xpcs.state.run.key")
    x, alpha = screen.columns("curves.points", "x", "alpha")
    result = multitau(run).arrays
    few = result["tau"][result["n_pairs"] < 32]
    assert set(x[alpha < 1]) == set(few)


def test_fits_are_drawn_through_the_curves(screen, live, run):
    live.publish(start(run), multitau(run, n_frames=2005), ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}' && xpcs.state.fit && xpcs.curves.lines.data.xs.length === 3")
    xs, ys = screen.columns("curves.lines", "xs", "ys")
    expected = 1 + 0.2 * np.exp(-2 * 2e7 * ROIMAP.dynamic_q[:, None] ** 2 * xs)
    np.testing.assert_allclose(ys, expected, atol=3e-3)
    screen.wait("document.getElementById('rates-says').textContent.includes('Å²/s')")
    screen.page.locator("text=no fit").click()
    screen.wait("xpcs.curves.lines.data.xs.length === 0")


def test_arrow_keys_choose_the_bin_and_the_curve_comes_to_the_front(screen, live, run):
    live.publish(start(run), multitau(run), ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}' && xpcs.curves.key === xpcs.state.run.key")
    screen.page.keyboard.press("ArrowRight")
    screen.page.keyboard.press("ArrowRight")
    screen.wait("xpcs.curves.points.data.bin.at(-1) === 1")
    assert screen.page.locator("#bins [aria-checked=true]").get_attribute("data-bin") == "1"
    bins, alpha = screen.columns("curves.points", "bin", "alpha")
    assert alpha[bins == 1].max() == 1
    assert alpha[bins != 1].max() < 0.2


def test_a_missing_region_and_the_plane_are_announced_and_shown_in_the_image(screen, live, run):
    image = np.ones(SHAPE)
    image[24:36] = np.nan
    degraded = {"missing_regions": np.array([2]), "plane": np.array(2)}
    live.publish(start(run), scattering(run, image=image), ledger(run, **degraded))
    screen.wait("document.getElementById('alerts').textContent.includes('region 2 of the detector is missing')")
    assert "degraded: frames come over the file plane" in screen.says("alerts")
    assert screen.says("regions") == "missing: 2"
    screen.wait("xpcs.picture.at(10, 30)?.missing === true && xpcs.picture.at(10, 10).missing === false")


def test_what_is_old_looks_old(screen, live, run):
    live.publish(start(run), multitau(run), ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}'")
    screen.wait("document.documentElement.classList.contains('stale')")
    assert "what is shown is old" in screen.says("alerts")
    live.publish(ledger(run, n_frames=2010))
    screen.wait("!document.documentElement.classList.contains('stale')")


def test_earlier_runs_are_laid_over_by_a_click(screen, live, run):
    final = multitau(run, final=True, seed=3)
    live.publish(start(run), final, ledger(run, final=True), stop(run), start(f"{run}-b"), multitau(f"{run}-b"))
    screen.wait(f"xpcs.state.history[0]?.run === '{run}' && xpcs.state.run.run === '{run}-b'")
    screen.page.locator("#history button").first.click()
    screen.wait("xpcs.curves.earlier.data.ys.length === 3")
    (ys,) = screen.columns("curves.earlier", "ys")
    np.testing.assert_array_equal(ys, final.arrays["g2"].T)


def test_text_from_the_wire_is_text(screen, live):
    evil = "<img src=x onerror=\"document.title='evil'\">"
    live.publish(start(evil, sample=evil), multitau(evil), ledger(evil), stop(evil))
    screen.wait("document.getElementById('run').textContent.startsWith('<img')")
    screen.wait("document.querySelectorAll('#history button').length > 0")
    assert screen.says("run") == evil
    assert screen.ask("document.querySelectorAll('main img, header img').length") == 0
    assert screen.page.title() == "xpcs-stream"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(chromium, live, scheme):
    with Screen(chromium, live.port, color_scheme=scheme) as screen:
        assert screen.ask("document.documentElement.dataset.theme") == scheme
        screen.page.locator("#theme").click()
        assert screen.ask("document.documentElement.dataset.theme") != scheme


@pytest.mark.parametrize("width", [360, 800, 1920, 3840])
def test_nothing_is_cut_off_at_any_width(screen, live, width):
    screen.page.set_viewport_size({"width": width, "height": 900})
    screen.wait("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_server_that_was_restarted_is_found_again(chromium, live, run):
    live.publish(start(run), multitau(run), ledger(run))
    with Screen(chromium, live.port) as screen:
        screen.wait(f"xpcs.state.run.run === '{run}' && xpcs.state.here")
        live.stop()
        screen.wait("!xpcs.state.here && document.documentElement.classList.contains('away')")
        screen.wait("document.getElementById('state').textContent === 'reconnecting'")
        live.start()
        screen.wait("xpcs.state.here && !document.documentElement.classList.contains('away')")
        live.publish(start(f"{run}-b"), multitau(f"{run}-b", n_frames=2011), ledger(f"{run}-b"))
        screen.wait(f"xpcs.state.run.run === '{run}-b' && xpcs.state.g2?.head.n_frames === 2011")


def test_the_page_needs_nothing_from_elsewhere(chromium, live):
    asked = []
    with Screen(chromium, live.port) as screen:
        screen.page.on("request", lambda request: asked.append(request.url))
        screen.page.reload()
        screen.wait("window.xpcs?.state.here")
    assert asked
    assert {url.split("/")[2] for url in asked} == {f"127.0.0.1:{live.port}"}
