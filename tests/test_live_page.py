"""The page itself, in Chromium: what a scientist sees."""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import h5py
import numpy as np
import pytest

from stream.heartbeat import worker
from stream.ingest.zmq import ZmqResults
from stream.messages import Result
from stream.operators.qmap import ring_map
from stream.operators.roimap_file import write
from stream.operators.twotime import TwoTime
from stream.sinks.zmq import ZmqSink
from tests import reference
from tests.conftest import push
from tests.kafka import free_ports
from tests.test_live import ROIMAP, SHAPE, answers, ledger, multitau, region, regions, scattering, start, stop, until

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60


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


class Live:
    """The command `live`, and what it hears."""

    def __init__(self, folder):
        self.qmap = folder / "qmap.h5"
        write(self.qmap, ROIMAP)
        self.sink = ZmqSink("tcp://127.0.0.1:*", pattern="pub")
        [self.port] = free_ports(1)  # of those that nobody is given while it is down
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
        assert self.server.wait(90) == 0

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


def test_curves_of_a_real_stream_come_soon_and_end_as_they_are_in_the_file(chromium, tmp_path):
    roimap = ring_map(
        shape=(64, 128), beam_center_x=64, beam_center_y=70, detector_distance=5.0, pixel_size=75e-6,
        incident_energy=11.0, n_static=40, n_dynamic=4,
    )  # fmt: skip
    qmap, result = tmp_path / "qmap.h5", tmp_path / "result.h5"
    write(qmap, roimap)
    source, page, publish = (f"zmq://127.0.0.1:{port}" for port in free_ports(3))
    port = int(page.rpartition(":")[2])
    command = [sys.executable, "-m", "stream"]
    with ExitStack() as stack:
        pipeline = stack.enter_context(
            subprocess.Popen(
                [
                    *(*command, "run", "--source", source, "--qmap", qmap, "--out", result, "--quiet"),
                    *("--live", f"live://127.0.0.1:{port}", "--publish", publish, "--publish-every", "200 ms"),
                    *("--two-time", "64"),
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
        # Below 1 s where nothing else runs.
        assert screen.ask("xpcs.drawn[0][1]") / 1000 - first.result(60) < 5
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
        assert_the_segments_of_the_chosen_bin_are_those_of_the_file(screen, result)
        assert_the_cut_at_a_chosen_age_is_that_of_the_file(screen, result)


def assert_the_cut_at_a_chosen_age_is_that_of_the_file(screen, path):
    screen.wait("xpcs.state.twotime?.head.final")
    screen.page.locator("#bins [data-bin='2']").click()
    screen.wait("xpcs.twoTime.bin === 2")
    screen.page.locator("#two-time").focus()
    for _ in range(4):
        screen.page.keyboard.press("ArrowRight")
    screen.wait("xpcs.twoTime.chosen === 3")
    with h5py.File(path) as file:
        upper = np.triu(file["xpcs/twotime/correlation_map/c2_00003"][()])
    c2 = upper + np.triu(upper, 1).T
    n_age = len(screen.ask("[...xpcs.twoTime.ages]"))
    assert n_age > 5
    expected = reference.age_cuts(c2[None], n_age)
    step = 32e-3
    xs, ys, age = screen.ask("['xs', 'ys', 'age'].map((name) => xpcs.twoTime.lines.data[name].at(-1))")
    np.testing.assert_allclose(age, expected["ages"][3] * step)
    np.testing.assert_allclose(xs, np.array(expected["taus"]) * step)
    np.testing.assert_allclose(np.array(ys, float), expected["cuts"][0, 3], rtol=1e-5)
    assert screen.ask("document.getElementById('two-time').getAttribute('aria-valuetext')").startswith("age 0.")


def assert_the_segments_of_the_chosen_bin_are_those_of_the_file(screen, path):
    screen.wait("xpcs.state.segments?.head.final")
    screen.page.locator("#bins [data-bin='1']").click()
    screen.page.locator("#segments + span").click()
    with h5py.File(path) as file:
        tau, g2, parts = (
            file[f"xpcs/multitau/{name}"][()] for name in ("tau", "normalized_g2", "normalized_g2_partial")
        )
    part, delay = np.nonzero(np.isfinite(parts[:, :, 1]))
    screen.wait(f"xpcs.curves.lines.data.xs.length === {len(parts) + 1}")
    x, y, colour = screen.columns("curves.points", "x", "y", "colour")
    np.testing.assert_allclose(x, tau[delay])
    np.testing.assert_allclose(y, parts[part, delay, 1], rtol=1e-6)
    assert len(set(zip(part, colour, strict=True))) == len(set(colour)) == len(parts) > 4
    np.testing.assert_array_equal(screen.ask("xpcs.curves.lines.data.ys.at(-1)"), g2[:, 1])
    assert screen.says("latest") == "2 s"


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


def two_time(run, *, lost=()):
    """Of 400 frames that age, without those from `lost`."""
    rng = np.random.default_rng(1)
    operator = TwoTime(start(run), ROIMAP, frames=64)
    speckles = [rng.exponential(10, SHAPE) for _ in range(40)]
    came = np.ones(400, bool)
    came[list(lost)] = False
    frames = np.stack([rng.poisson(speckles[min(i, 200) // 20]) for i in range(400)]).astype("<u2")
    result = push(operator, frames, came=came).result()
    return Result(run=run, operator="twotime", n_frames=400, final=False, arrays=result)


def in_the_map(screen, t1, t2):
    return screen.ask(
        f"""(async () => {{ const {{ frame }} = await xpcs.twoTime.shown;
        const box = document.querySelector('#two-time > *').getBoundingClientRect();
        return [box.x + frame.x_scale.compute({t1}), box.y + frame.y_scale.compute({t2})] }})()"""
    )


def told_of(screen, i, j):
    """Point at the middle of a pair of times of 8 frames; the card may just have come, and still move."""
    screen.page.mouse.move(*in_the_map(screen, (i + 0.5) * 8e-3, (j + 0.5) * 8e-3))
    return screen.says("two-time-says").startswith(f"t₁ = {i * 8e-3:.4g} s · t₂ = {j * 8e-3:.4g} s")


def test_the_two_time_map_tells_its_values_and_a_click_chooses_the_age(screen, live, run):
    lost = range(104, 112)  # one time of the whole run, of 8 frames
    result = two_time(run, lost=lost)
    live.publish(start(run), multitau(run), result, ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}' && xpcs.twoTime.run === xpcs.state.run.key")
    screen.page.locator("#two-time").scroll_into_view_if_needed()
    c2 = result.arrays["c2"][-1, 0]
    for i, j in ((5, 30), (30, 5), (40, 20), (13, 40)):
        until(lambda i=i, j=j: told_of(screen, i, j), SECONDS)
        if i * 8 in lost:
            assert screen.says("two-time-says").endswith("lost")
        else:
            told = float(screen.says("two-time-says").rpartition(" = ")[2])
            np.testing.assert_allclose(told, c2[i, j], atol=1e-3)
    assert np.isnan(screen.ask("xpcs.twoTime.at(13.5 * 8e-3, 20.5 * 8e-3).c2"))
    screen.page.mouse.click(*in_the_map(screen, 25.5 * 8e-3, 35.5 * 8e-3))
    ages = np.array(screen.ask("[...xpcs.twoTime.ages]"))
    screen.wait(f"xpcs.twoTime.chosen === {np.abs(ages - 30 * 8e-3).argmin()}")
    screen.page.keyboard.press("Escape")
    screen.wait("xpcs.twoTime.chosen === null && xpcs.twoTime.lines.data.age.length === 5")


def test_the_newest_frames_of_the_chosen_q_are_seen_one_by_one(screen, live, run):
    result = two_time(run)
    live.publish(start(run), multitau(run), result, ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}' && xpcs.twoTime.run === xpcs.state.run.key")
    screen.page.locator("text=newest 64 frames").click()
    screen.page.locator("#bins [data-bin='1']").click()
    screen.wait("xpcs.twoTime.bin === 1 && xpcs.twoTime.window.avg_frame === 1")
    named = screen.page.locator("#bins [data-bin='1']").inner_text()
    assert screen.says("two-time-name") == f"q = {named} Å⁻¹"
    shown = np.array(screen.ask("[...xpcs.twoTime.values]")).reshape(64, 64)
    beside = ~np.eye(64, dtype=bool)
    np.testing.assert_allclose(shown[beside], result.arrays["c2"][0, 1][beside], atol=1e-3)
    assert screen.ask("xpcs.twoTime.window.first") == pytest.approx(0.336)
    screen.page.locator("text=whole run").click()


def test_a_run_without_two_time_correlation_has_no_place_for_it(screen, live, run):
    live.publish(start(run), multitau(run), two_time(run), ledger(run))
    screen.wait(f"xpcs.state.run.run === '{run}' && !document.getElementById('two-time-card').hidden")
    live.publish(start(f"{run}-b"), multitau(f"{run}-b"), ledger(f"{run}-b"))
    screen.wait(f"xpcs.state.run.run === '{run}-b' && document.getElementById('two-time-card').hidden")


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


def test_the_regions_are_listed_with_their_workers_and_those_that_fall_silent_look_so(screen, live, run):
    known = [region(0), region(1, frames=1500, checkpoint=1000), region(2, age=44.0), region(3)]
    live.publish(start(run), scattering(run), ledger(run, missing_regions=np.array([2])), regions(run, *known))
    rows = screen.page.locator("#region-rows tr")
    screen.wait(f"xpcs.state.run.run === '{run}' && document.querySelectorAll('#region-rows tr').length === 4")
    screen.wait("document.getElementById('regions').textContent === '4 on 4 workers; missing: 2'")
    assert rows.nth(1).locator("td").all_inner_texts()[:5] == ["node1:1", "500", "0", "20 ms", "500"]
    assert rows.nth(2).get_attribute("data-state") == "missing"
    assert "missing · 4" in rows.nth(2).inner_text()
    assert [rows.nth(i).locator("th[scope=row]").inner_text().split()[0] for i in range(4)] == ["0", "1", "2", "3"]
    screen.wait("xpcs.picture.drawn !== undefined")
    x, y = screen.ask(
        """(async () => { const view = await xpcs.picture.shown; const frame = view.frame;
        const box = document.querySelector('#picture > *').getBoundingClientRect();
        return [box.x + frame.x_scale.compute(20.5), box.y + frame.y_scale.compute(30.5)] })()"""
    )
    screen.page.mouse.move(x, y)
    screen.wait("document.getElementById('picture-says').textContent.includes('region 2')")
    screen.wait("document.querySelectorAll('#region-rows [data-state=silent]').length === 3")  # nothing is published
    assert "no word from the worker of region 0 (node0:1), 1 (node1:1), 3 (node3:1)" in screen.says("alerts")
    live.publish(ledger(run, n_frames=2020), regions(run, *[region(i) for i in range(20)]))
    screen.wait("document.getElementById('regions').textContent === '20 on 20 workers; all are there'")
    assert screen.says("more-regions") == "and 4 more that are no worse"
    for width in (360, 1920):
        screen.page.set_viewport_size({"width": width, "height": 900})
        screen.wait("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    live.publish(stop(run))
    screen.wait("document.querySelectorAll('#region-rows [data-state=ended]').length === 16")


def test_of_one_process_no_regions_are_listed(screen, live, run):
    live.publish(start(run), multitau(run), ledger(run, **worker(1500, 0.3)))
    screen.wait("document.getElementById('regions').textContent.startsWith('none: one process, ')")
    assert screen.says("regions").endswith("; checkpoint at frame 1 500")
    assert not screen.page.locator("#region-card").is_visible()


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
