"""What a result file holds, who can read it, and which files the sink leaves alone."""

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest

from stream.errors import ConfigError, SinkError
from stream.messages import Result, RunStart, RunStop
from stream.operators.roimap import RoiMap
from stream.operators.twotime import TwoTime
from stream.sinks.hdf5 import Hdf5Sink
from tests.conftest import push

SHAPE = (48, 64)
FRAME_TIME = 1e-3
N_FRAMES = 4000
LENGTH = 1024


def make_qmap(n_dynamic=4, static_per_dynamic=2):
    """Rings about (row 24, column 8), with a masked stripe between two modules."""
    row, column = np.indices(SHAPE)
    q = 5e-4 * np.hypot(row - 24, column - 8)
    n_static = n_dynamic * static_per_dynamic
    edges = np.linspace(2e-3, 2.4e-2, n_static + 1)
    static = np.digitize(q, edges)
    static[(static > n_static) | ((column >= 30) & (column < 33))] = 0
    centre = (edges[1:] + edges[:-1]) / 2
    return {
        "mask": ~((column >= 30) & (column < 33)),
        "static_roi_map": static.astype("u1"),
        "dynamic_roi_map": np.where(static, (static - 1) // static_per_dynamic + 1, 0).astype("u1"),
        "static_v_list_dim0": centre,
        "static_v_list_dim1": np.zeros(1),
        "dynamic_v_list_dim0": centre.reshape(n_dynamic, -1).mean(axis=1),
        "dynamic_v_list_dim1": np.zeros(1),
        "static_index_mapping": np.arange(n_static, dtype="u1"),
        "dynamic_index_mapping": np.arange(n_dynamic, dtype="u1"),
        "static_num_pts": np.array([n_static, 1]),
        "dynamic_num_pts": np.array([n_dynamic, 1]),
        "map_names": ["q", "phi"],
        "map_units": ["1/angstrom", "degree"],
        "beam_center_x": 8.0,
        "beam_center_y": 24.0,
        "detector_distance": 5.0,
        "pixel_size": 75e-6,
        "energy": 11.0,
        "attributes": {"hash": "a1b2c3", "version": "1"},
    }


def rates(qmap):
    return 4e5 * qmap["dynamic_v_list_dim0"] ** 2


def make_outputs(qmap, run="run-1", n_frames=N_FRAMES, n_pairs=None, **metadata):
    """Yield the start, the final results and the stop of a run of Brownian particles, contrast 0.2."""
    noise = np.random.default_rng(1)
    delay = np.array([*range(1, 9), *(k << level for level in range(1, 12) for k in range(5, 9))])
    n_pairs = np.maximum(n_frames - delay, 0.0) if n_pairs is None else np.full(len(delay), n_pairs)
    error = np.full((len(delay), len(rates(qmap))), 1e-3)
    g2 = 1 + 0.2 * np.exp(-2 * np.outer(delay * FRAME_TIME, rates(qmap))) + noise.normal(0, error)
    g2[n_pairs == 0] = error[n_pairs == 0] = np.nan
    counts = 0.5 * (qmap["static_v_list_dim0"][0] / qmap["static_v_list_dim0"]) ** 2
    image = np.where(qmap["mask"], np.concatenate([[0.05], counts])[qmap["static_roi_map"]], np.nan)
    per_static = np.ones((len(delay), len(counts)))

    def result(operator, **arrays):
        return Result(run=run, operator=operator, n_frames=n_frames, final=True, arrays=arrays)

    yield RunStart(run=run, shape=SHAPE, dtype="<u2", frame_time=FRAME_TIME, count_time=9e-4, metadata=metadata)
    yield result(
        "multitau",
        delay=delay,
        tau=delay * FRAME_TIME,
        g2=g2,
        g2_err=error,
        n_pairs=n_pairs,
        G2=per_static,
        IP=per_static,
        IF=per_static,
    )
    yield result(
        "scattering",
        image=image,
        origin=np.zeros(2, np.int64),
        scattering_1d=counts,
        scattering_1d_segments=np.tile(counts, (5, 1)),
        segment_start=np.arange(5) * n_frames // 5,
    )
    frame = np.arange(0, n_frames, 10)
    yield result("intensity", frame=frame, intensity=np.linspace(0.2, 0.1, len(frame)))
    ledger = {"sent": n_frames, "received": n_frames - 3, "lost": 3, "late": 0, "duplicate": 1, "undecodable": 0}
    arrays = {name: np.array(number) for name, number in ledger.items()}
    yield result("ledger", **arrays, stray=np.array(0), lag=np.array(0.1), lost_spans=np.array([[100, 103]]))
    yield RunStop(run=run, n_frames=n_frames, exit_status="success")


def with_segments(qmap):
    """Yield what a run tells whose dynamics become slower by a factor of two from part to part."""
    for output in make_outputs(qmap):
        if getattr(output, "operator", None) == "multitau":
            delay = output.arrays["delay"]
            noise = np.random.default_rng(5)
            slower = rates(qmap) / 2 ** np.arange(4)[:, None]
            g2 = 1 + 0.2 * np.exp(-2 * delay[:, None] * FRAME_TIME * slower[:, None])
            error = np.full(g2.shape, 2e-3)
            g2 += noise.normal(0, error)
            g2[:, delay >= LENGTH] = error[:, delay >= LENGTH] = np.nan
            start = np.arange(4) * LENGTH
            parts = {
                "g2_segments": g2,
                "g2_err_segments": error,
                "n_pairs_segments": np.maximum(LENGTH - delay, 0.0) * np.ones((4, 1)),
                "segment_start": start,
                "segment_stop": np.minimum(start + LENGTH, N_FRAMES),
            }
            output = replace(output, arrays={**output.arrays, **parts})
        yield output


def write_run(path, qmap=None, outputs=None, configuration=""):
    """Write one run through the sink and return its file."""
    qmap = qmap or make_qmap()
    written = []
    with Hdf5Sink(path, qmap=qmap, configuration=configuration, on_written=written.append) as sink:
        for output in outputs or make_outputs(qmap):
            sink.write(output)
        sink.flush()
    return written[-1]


def twotime(qmap, n_frames=40, came=None, **options):
    """The result of the operator for Poisson counts."""
    roimap = RoiMap(static_roi_map=qmap["static_roi_map"], dynamic_roi_map=qmap["dynamic_roi_map"])
    start = RunStart(run="run-1", shape=SHAPE, dtype="<u2", frame_time=FRAME_TIME, count_time=9e-4)
    frames = np.random.default_rng(2).poisson(5, (n_frames, *SHAPE)).astype("<u2")
    operator = push(TwoTime(start, roimap, **{"frames": 16, "levels": 4} | options), frames, came=came)
    return Result(run="run-1", operator="twotime", n_frames=n_frames, final=True, arrays=operator.result())


def with_twotime(qmap):
    """Of the whole run there are averages of 4 frames; one of these is lost."""
    start, *rest = make_outputs(qmap)
    came = np.ones(40, bool)
    came[8:12] = False
    return [start, twotime(qmap, came=came), *rest]


def with_one_time(qmap):
    """There is nothing to correlate."""
    start, *rest = make_outputs(qmap)
    return [start, twotime(qmap, n_frames=1), *rest]


def aborted(qmap):
    start, *_, stop = make_outputs(qmap)
    return [start, replace(stop, n_frames=0, exit_status="abort")]


def without_frames(qmap):
    """Every operator gave its result, though it never saw a frame."""
    n_dynamic, n_static = len(qmap["dynamic_index_mapping"]), len(qmap["static_index_mapping"])
    table, dynamic, static = np.empty(0), np.empty((0, n_dynamic)), np.empty((0, n_static))
    unknown = np.full(n_static, np.nan)
    arrays = {
        "multitau": {"delay": table, "tau": table, "n_pairs": table, "g2": dynamic, "g2_err": dynamic}
        | {"G2": static, "IP": static, "IF": static},
        "scattering": {"image": np.full(SHAPE, np.nan), "origin": np.zeros(2, np.int64), "scattering_1d": unknown}
        | {"scattering_1d_segments": static, "segment_start": table},
        "intensity": {"frame": np.empty(0, np.int64), "intensity": table},
    }
    start, stop = aborted(qmap)
    results = [Result(run=start.run, operator=name, n_frames=0, final=True, arrays=arrays[name]) for name in arrays]
    return [start, *results, stop]


def two_frames(qmap):
    """There is one pair of frames, so one delay."""
    start, multitau, *rest = make_outputs(qmap, n_frames=2)
    return [start, replace(multitau, arrays={name: array[:1] for name, array in multitau.arrays.items()}), *rest]


def half_dark(qmap):
    """The detector masks a static bin and a dynamic bin away."""
    start, multitau, scattering, *rest = make_outputs(qmap)
    multitau.arrays["g2"][:, 1] = multitau.arrays["g2_err"][:, 1] = np.nan
    scattering.arrays["scattering_1d"][[2, 3]] = np.nan
    scattering.arrays["scattering_1d_segments"][:, [0, 2, 3]] = [0, np.nan, np.nan]
    return [start, multitau, scattering, *rest]


def hostile(qmap):
    start, *rest = make_outputs(qmap)
    names = ("incident_energy", "beam_center_x", "scan_number", "start_time", "sample", "detector", "truth")
    values = (10**400, float("nan"), 2**80, "soon", "a\0b\ud800", ["x"], {b"\xff": object()})
    return [replace(start, metadata=dict(zip(names, values, strict=True))), *rest]


def one_bin():
    return make_qmap(n_dynamic=1, static_per_dynamic=1)


RUNS = [
    pytest.param(make_qmap, make_outputs, id="complete"),
    pytest.param(make_qmap, aborted, id="aborted before the first frame"),
    pytest.param(make_qmap, without_frames, id="results without frames"),
    pytest.param(one_bin, two_frames, id="two frames, one bin"),
    pytest.param(make_qmap, half_dark, id="bins without counts"),
    pytest.param(make_qmap, hostile, id="hostile metadata"),
    pytest.param(make_qmap, with_twotime, id="two-time correlation"),
    pytest.param(make_qmap, with_one_time, id="one time alone"),
    pytest.param(make_qmap, with_segments, id="segments"),
]


@pytest.mark.parametrize(("make_map", "outputs"), RUNS)
def test_the_file_is_a_valid_nxxpcs(tmp_path, make_map, outputs):
    from nexusformat.nexus.validate import validate_application

    qmap = make_map()
    path = write_run(tmp_path / "result.h5", qmap, outputs(qmap))
    _, errors = validate_application(str(path), application="NXxpcs")
    assert errors == 0
    with h5py.File(path) as file:
        linked = ["g2", "g2_derr", "delay_difference"]
        assert {file[f"entry/data/{name}"].attrs["storage_mode"] for name in linked} == {"one_array"}


DRIVE = """
import json, sys
from pathlib import Path

from pyqtgraph import PlotDataItem
from PySide6.QtWidgets import QApplication
from pyxpcsviewer.gui.control import job_manager

job_manager.create_fit_pool = lambda: None  # it would fork a process per core; the fits are made here
from pyxpcsviewer.gui.view.xpcs_viewer import XpcsViewer, tab_mapping


def points(plot):
    columns = [item.xData for item in plot.listDataItems() if isinstance(item, PlotDataItem)]
    return [len(column) for column in columns if column is not None]


def plots(layout):
    return [points(item) for item in layout.items if hasattr(item, "listDataItems")]


def drawn(path):
    window = XpcsViewer(path=str(path.parent))
    assert path.name in window.model.source
    window.model.add_target([path.name])
    (file,) = window.model.get_xf_list()
    fit = file.fit_g2(bounds=([0.01, 1e-5, 0.5, 0.9], [0.5, 1e2, 2.0, 1.1]), fit_func="single")
    window.init_diffusion()
    for index, tab in tab_mapping.items():
        if tab != "average":  # averages several files
            window.tabWidget.setCurrentIndex(index)
            window._tab_plotters[tab](dryrun=False)
            application.processEvents()
            assert not window.grab().isNull()
    window.close()
    return {
        "saxs_2d": window.pg_saxs.image.shape,
        "saxs_1d": points(window.mp_saxs.getPlotItem()),
        "stability": points(window.mp_stab.getPlotItem()),
        "intensity_t": plots(window.pg_intt.ci),
        "g2": plots(window.mp_g2.ci),
        "g2 of segments": plots(window.mp_g2_stability.ci),
        "tau of q": points(window.mp_tauq.getPlotItem()),
        "qmap": window.pg_qmap.image.shape,
        "metadata": window.hdf_info.topLevelItemCount(),
        "g2map": window.g2map_all_img.image.shape,
        "twotime": None if file.c2_g2 is None else {
            "c2": window.mp_2t_hdls["tt"].image.shape,
            "g2": points(window.mp_2t_hdls["c2g2"]),
            "bins": window.comboBox_twotime_selection.count(),
        },
        "fitted tau": [float(tau) if line["success"] else None
                       for tau, line in zip(fit["fit_val"][:, 0, 1], fit["fit_line"])],
    }


application = QApplication([])
json.dump([drawn(Path(path)) for path in sys.argv[1:]], sys.stdout)
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What stands in the tabs of pyXpcsViewer, drawn off screen, of a run, an aborted run, one with dark bins."""
    folder = tmp_path_factory.mktemp("viewer")
    qmap = make_qmap()
    runs = [with_segments, without_frames, half_dark, with_twotime]
    paths = [write_run(folder / f"{run.__name__}.h5", qmap, run(qmap)) for run in runs]
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "HOME": str(folder)}
    command = [sys.executable, "-c", DRIVE, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "plot g2 failed" not in done.stderr
    return dict(zip([run.__name__ for run in runs], json.loads(done.stdout), strict=True))


def test_pyxpcsviewer_draws_all_its_tabs_of_a_run(drawn):
    tabs = drawn["with_segments"]
    n_delay = tabs["g2"][0][0]
    assert n_delay > 30
    assert tabs["saxs_2d"] == tabs["qmap"] == list(SHAPE)
    assert tabs["saxs_1d"] == [8]
    assert tabs["stability"] == [8] * 5
    assert tabs["intensity_t"] == [[N_FRAMES], [N_FRAMES // 2], [N_FRAMES]]
    assert tabs["g2"] == [[n_delay]] * 4
    assert tabs["tau of q"][0] == 4
    assert tabs["metadata"] > 0
    assert tabs["g2map"] == [4, n_delay]
    np.testing.assert_allclose(tabs["fitted tau"], 1 / rates(make_qmap()), rtol=0.05)


def test_pyxpcsviewer_draws_two_time_correlation_and_g2_of_segments(drawn):
    assert drawn["with_twotime"]["twotime"] == {"c2": [10, 10], "g2": [9, *[1] * 5], "bins": 4}
    assert drawn["with_twotime"]["g2"] == drawn["with_segments"]["g2"]
    assert drawn["with_segments"]["twotime"] is None


def test_pyxpcsviewer_draws_g2_of_segments_of_every_bin(drawn):
    n_delay = drawn["with_segments"]["g2"][0][0]
    assert drawn["with_segments"]["g2 of segments"] == [[n_delay] * 4] * 4
    assert drawn["with_twotime"]["g2 of segments"] == []


def test_pyxpcsviewer_draws_a_run_that_was_aborted_before_its_first_frame(drawn):
    assert drawn["without_frames"]["saxs_2d"] == list(SHAPE)
    assert drawn["without_frames"]["fitted tau"] == [None] * 4


def test_pyxpcsviewer_still_fits_the_other_bins_when_one_has_no_counts(drawn):
    tau = drawn["half_dark"]["fitted tau"]
    assert tau.pop(1) is None
    np.testing.assert_allclose(tau, 1 / rates(make_qmap())[[0, 2, 3]], rtol=0.05)


@pytest.mark.parametrize(("make_map", "outputs"), RUNS)
@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")  # the viewer's, of a ring without counts
def test_pyxpcsviewer_reads_what_was_measured(tmp_path, make_map, outputs):
    from pyxpcsviewer.core.xpcs_file import XpcsFile

    qmap = make_map()
    given = {output.operator: output.arrays for output in outputs(qmap) if isinstance(output, Result)}
    seen = XpcsFile(str(write_run(tmp_path / "result.h5", qmap, outputs(qmap))))
    assert seen.atype == (("Twotime", "Multitau") if outputs is with_twotime else ("Multitau",))
    assert seen.qmap.get_qbin_label(1) == f"q={qmap['dynamic_v_list_dim0'][0]:.5f} 1/angstrom"
    assert seen.saxs_2d.shape == SHAPE
    assert np.isfinite(seen.saxs_2d).all()
    if given:
        n = min(len(seen.t_el), len(given["multitau"]["tau"]))
        np.testing.assert_array_equal(seen.g2[:n], given["multitau"]["g2"][:n])
        np.testing.assert_allclose(seen.t_el[:n], given["multitau"]["tau"][:n])
        assert not np.isfinite(given["multitau"]["g2"][n:]).any()
        assert not np.isfinite(seen.g2[n:]).any()
        np.testing.assert_array_equal(seen.saxs_1d["Iq"][0], given["scattering"]["scattering_1d"])
        if outputs is with_segments:
            _, _, g2, error, _, labels = seen.get_g2_stability_data()
            np.testing.assert_array_equal(g2, given["multitau"]["g2_segments"][:, :n])
            np.testing.assert_array_equal(error, given["multitau"]["g2_err_segments"][:, :n])
            np.testing.assert_array_equal(labels, given["multitau"]["segment_start"])
        segments = given["scattering"]["scattering_1d_segments"]
        np.testing.assert_array_equal(seen.Iqp[: len(segments)], segments)


def test_pyxpcsviewer_reads_the_two_time_correlation_that_was_measured(tmp_path):
    from pyxpcsviewer.core.xpcs_file import XpcsFile

    qmap = make_qmap()
    given = twotime(qmap, n_frames=10, bins=[2, 4]).arrays
    start, *rest = make_outputs(qmap)
    result = twotime(qmap, n_frames=10, bins=[2, 4])
    seen = XpcsFile(str(write_run(tmp_path / "result.h5", qmap, [start, result, *rest])))
    assert seen.c2_processed_bins.tolist() == [2, 4]
    assert seen.c2_t0 == FRAME_TIME
    for i in range(2):
        read = seen.get_twotime_c2(selection=i, correct_diag=False)
        np.testing.assert_allclose(read["c2_mat"], given["c2"][0, i], rtol=1e-6)
        np.testing.assert_array_equal(read["g2_full"], given["g2"][:, i])
        np.testing.assert_array_equal(read["g2_partial"], given["g2_segments"][:, :, i].T)


def test_two_time_correlation_stands_in_the_file_as_nxxpcs_has_it(tmp_path):
    qmap = make_qmap()
    path = write_run(tmp_path / "result.h5", qmap, with_twotime(qmap))
    given = next(each for each in with_twotime(qmap) if isinstance(each, Result)).arrays
    with h5py.File(path) as file:
        data, xpcs = file["entry/twotime"], file["xpcs/twotime"]
        c2 = data["two_time_corr_func"]
        assert dict(c2.attrs)["populated_elements"] == "upper_half"
        np.testing.assert_allclose(c2[()], np.triu(given["c2"][-1, :, :10, :10]), rtol=1e-6)
        assert np.isnan(c2[0, 2, 2:]).all()
        np.testing.assert_allclose(data["t1"], np.arange(10) * 4 * FRAME_TIME)
        np.testing.assert_array_equal(data["g2_from_two_time_corr_func"], given["g2"])
        partials = data["g2_from_two_time_corr_func_partials"][()]
        np.testing.assert_array_equal(np.moveaxis(partials, 2, 1), given["g2_segments"])
        assert xpcs["config/avg_frame"][()] == 4
        assert xpcs["finer/avg_frame"][()].tolist() == [1, 2]
        assert xpcs["finer/first"][()].tolist() == [24, 8]
        np.testing.assert_allclose(xpcs["finer/c2"], np.triu(given["c2"][:-1]), rtol=1e-6)


def test_delays_without_any_pair_are_left_out(tmp_path):
    path = write_run(tmp_path / "result.h5")
    with h5py.File(path) as file:
        multitau = file["xpcs/multitau"]
        assert multitau["delay_list"][-1] < N_FRAMES
        assert np.isfinite(multitau["normalized_g2"][()]).all()
        np.testing.assert_array_equal(multitau["n_pairs"][()], N_FRAMES - multitau["delay_list"][()])
        assert {len(multitau[name]) for name in ("tau", "normalized_g2_err", "G2", "IP", "IF")} == {
            len(multitau["tau"])
        }


def test_only_final_results_count_and_the_one_that_knows_most_frames_stays(tmp_path):
    qmap = make_qmap()
    start, multitau, *_, stop = make_outputs(qmap)

    def with_contrast(value, **changes):
        return replace(
            multitau, arrays={**multitau.arrays, "g2": np.full_like(multitau.arrays["g2"], value)}, **changes
        )

    results = [
        with_contrast(1.1, n_frames=10),
        with_contrast(1.2, n_frames=20),
        with_contrast(1.3, n_frames=15),
        with_contrast(1.4, n_frames=30, final=False),
    ]
    with h5py.File(write_run(tmp_path / "result.h5", qmap, [start, *results, stop])) as file:
        assert set(file["xpcs/multitau/normalized_g2"][()].ravel()) == {1.2}


def test_interleaved_runs_do_not_mix(tmp_path):
    qmap = make_qmap()
    one, two = make_outputs(qmap, run="one", sample="gold"), make_outputs(qmap, run="two", sample="silica")
    written = []
    with Hdf5Sink(tmp_path / "{run}.h5", qmap=qmap, on_written=written.append) as sink:
        for pair in zip(one, two, strict=True):
            for output in pair:
                sink.write(output)
    assert written == [tmp_path / "one.h5", tmp_path / "two.h5"]
    samples = []
    for path in written:
        with h5py.File(path) as file:
            samples.append(file["entry/sample/name"].asstr()[()])
    assert samples == ["gold", "silica"]


def test_what_belongs_to_no_announced_run_is_ignored(tmp_path):
    _, *rest = make_outputs(make_qmap())
    with Hdf5Sink(tmp_path / "result.h5", qmap=make_qmap()) as sink:
        for output in rest:
            sink.write(output)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["../../etc/passwd", "..", "a/b", "a\0b", "x" * 4000, "", "µ 1", ".hidden", "a\ud800"])
def test_the_name_of_a_run_never_leaves_the_folder(tmp_path, run):
    folder = tmp_path / "results"
    path = write_run(folder / "{run}.h5", outputs=make_outputs(make_qmap(), run=run))
    assert list(folder.iterdir()) == [path]
    assert not path.name.startswith(".")
    assert path.name.isascii()


def test_runs_whose_names_look_alike_have_their_own_files(tmp_path):
    paths = {
        write_run(tmp_path / "{run}.h5", outputs=make_outputs(make_qmap(), run=run)) for run in ("a/b", "a:b", "a_b")
    }
    assert len(paths) == 3


def test_the_file_of_another_run_is_never_overwritten(tmp_path, caplog):
    path = tmp_path / "result.h5"
    write_run(path, outputs=make_outputs(make_qmap(), run="old"))
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        second = write_run(path, outputs=make_outputs(make_qmap(), run="new"))
    assert path.read_bytes() == before
    assert second == tmp_path / "result_new.h5"
    assert f"{path} is kept: it belongs to run old" in caplog.text


def test_the_file_of_the_same_run_is_replaced(tmp_path):
    path = tmp_path / "result.h5"
    write_run(path, outputs=make_outputs(make_qmap(), sample="first"))
    write_run(path, outputs=make_outputs(make_qmap(), sample="second"))
    with h5py.File(path) as file:
        assert file["entry/sample/name"].asstr()[()] == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_whose_name_comes_again_has_its_own_file(tmp_path):
    path = tmp_path / "result.h5"
    times = ["2026-11-21T10:00:00+00:00", "2026-11-22T10:00:00+00:00", "2026-11-23T10:00:00+00:00"]
    names = [write_run(path, outputs=make_outputs(make_qmap(), start_time=time)).name for time in times]
    assert names == ["result.h5", "result_run-1.h5", "result_run-1_2.h5"]
    again = write_run(path, outputs=make_outputs(make_qmap(), start_time=times[1]))
    assert again.name == names[1]


def test_a_file_that_is_no_result_is_left_alone(tmp_path):
    path = tmp_path / "result.h5"
    path.write_text("my thesis")
    (tmp_path / "result_run-1.h5").write_text("my other thesis")
    assert write_run(path) == tmp_path / "result_run-1_2.h5"
    assert path.read_text() == "my thesis"
    assert (tmp_path / "result_run-1.h5").read_text() == "my other thesis"


def test_a_file_system_error_names_path_and_reason(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "result.h5"
    with pytest.raises(SinkError, match=rf"{path}.*(Not a directory|File exists)"):
        write_run(path)


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(tmp_path):
    script = """
import resource, signal, sys
from pathlib import Path
from stream.errors import SinkError
from tests.test_sinks_hdf5 import write_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    write_run(Path(sys.argv[1]))
except SinkError as error:
    print(error)
"""
    path = tmp_path / "result.h5"
    done = subprocess.run([sys.executable, "-B", "-c", script, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{path}: File too large\n", done.stderr
    assert not any(tmp_path.iterdir())


def test_a_region_stands_in_the_whole_detector_where_it_was_measured(tmp_path):
    qmap = make_qmap()
    start, multitau, scattering, *rest = make_outputs(qmap)
    start = replace(start, shape=(10, 64), origin=(20, 0), detector_shape=SHAPE)
    part = {**scattering.arrays, "image": np.full((10, 64), 7.0), "origin": np.array([20, 0])}
    outputs = [start, multitau, replace(scattering, arrays=part), *rest]
    with h5py.File(write_run(tmp_path / "result.h5", qmap, outputs)) as file:
        seen, mean = file["xpcs/temporal_mean/scattering_2d"][0], file["entry/data/frame_average"][()]
    assert (mean[20:30] == 7).all()
    assert np.isnan(mean[:20]).all()
    assert np.isnan(mean[30:]).all()
    np.testing.assert_array_equal(seen, np.nan_to_num(mean))


def test_a_pixel_that_was_not_measured_is_not_zero(tmp_path):
    qmap = make_qmap()
    with h5py.File(write_run(tmp_path / "result.h5", qmap)) as file:
        np.testing.assert_array_equal(np.isnan(file["entry/data/frame_average"][()]), ~qmap["mask"])


def test_intensity_has_one_value_per_frame_as_the_viewer_takes_it_and_0_where_no_frame_came(tmp_path):
    qmap = make_qmap()
    start, *_, stop = make_outputs(qmap)
    arrays = {"frame": np.array([2, 4, 8, 10]), "intensity": np.array([0.1, 0.2, np.nan, 0.4])}
    intensity = Result(run=start.run, operator="intensity", n_frames=11, final=True, arrays=arrays)
    with h5py.File(write_run(tmp_path / "result.h5", qmap, [start, intensity, stop])) as file:
        group = file["xpcs/spatial_mean"]
        np.testing.assert_array_equal(group["intensity_vs_time"][0], np.arange(11))
        np.testing.assert_array_equal(group["intensity_vs_time"][1], [0, 0, 0.1, 0.1, 0.2, 0.2, 0, 0, 0, 0, 0.4])
        np.testing.assert_array_equal(group["intensity"][()], arrays["intensity"])


def test_a_run_of_millions_of_frames_does_not_make_a_value_per_frame(tmp_path):
    qmap = make_qmap()
    start, *_, stop = make_outputs(qmap)
    arrays = {"frame": np.array([0, 4_000_000]), "intensity": np.array([0.1, 0.3])}
    intensity = Result(run=start.run, operator="intensity", n_frames=5_000_000, final=True, arrays=arrays)
    with h5py.File(write_run(tmp_path / "result.h5", qmap, [start, intensity, stop])) as file:
        np.testing.assert_array_equal(file["xpcs/spatial_mean/intensity_vs_time"], np.stack(list(arrays.values())))


GEOMETRY = {
    "incident_beam/incident_energy": ("incident_energy", 11.0),
    "detector_1/distance": ("detector_distance", 5.0),
    "detector_1/beam_center_x": ("beam_center_x", 8.0),
    "detector_1/beam_center_y": ("beam_center_y", 24.0),
    "detector_1/x_pixel_size": ("x_pixel_size", 75e-6),
    "detector_1/y_pixel_size": ("y_pixel_size", 75e-6),
}


def test_geometry_that_the_run_does_not_say_is_the_maps_and_says_so(tmp_path):
    with h5py.File(write_run(tmp_path / "result.h5")) as file:
        for name, (_, of_map) in GEOMETRY.items():
            dataset = file["entry/instrument"][name]
            assert (dataset[()], dataset.attrs["source"]) == (of_map, "qmap")
        assert file["entry/scan_number"][()] == -1
        assert file["entry/start_time"].attrs["source"].startswith("clock")


def test_geometry_that_the_run_says_is_the_runs(tmp_path):
    qmap = make_qmap()
    metadata = {name: 3.5 for name, _ in GEOMETRY.values()} | {"scan_number": 42, "start_time": "2026-11-21T22:00:00Z"}
    with h5py.File(write_run(tmp_path / "result.h5", qmap, make_outputs(qmap, **metadata))) as file:
        for name in GEOMETRY:
            dataset = file["entry/instrument"][name]
            assert (dataset[()], dataset.attrs["source"]) == (3.5, "run")
        assert file["entry/scan_number"][()] == 42
        assert file["entry/start_time"].asstr()[()] == "2026-11-21T22:00:00Z"


def test_the_file_says_how_it_was_made(tmp_path):
    qmap = make_qmap()
    truth = {"contrast": 0.2, "rate": rates(qmap), "weights": [1.0], "factors": [1.0]}
    outputs = list(make_outputs(qmap, truth=truth, n_frames=500))
    with h5py.File(write_run(tmp_path / "result.h5", qmap, outputs, configuration="publish_every: 1 s\n")) as file:
        xpcs = file["xpcs"]
        assert xpcs.attrs["NX_class"] == "NXprocess"
        assert xpcs["program"].asstr()[()] == "xpcs-stream"
        assert xpcs["version"].asstr()[()]
        assert xpcs["configuration"].asstr()[()] == "publish_every: 1 s\n"
        assert xpcs["qmap"].attrs["hash"] == "a1b2c3"
        assert xpcs["exit_status"].asstr()[()] == "success"
        assert xpcs["ledger/lost"][()] == 3
        assert xpcs["ledger/lost_spans"][()].tolist() == [[100, 103]]
        assert json.loads(xpcs["metadata"][()])["truth"]["rate"] == rates(qmap).tolist()


def test_the_map_is_kept_as_it_was_given(tmp_path):
    qmap = make_qmap()
    with h5py.File(write_run(tmp_path / "result.h5", qmap)) as file:
        kept = file["xpcs/qmap"]
        assert set(kept) == set(qmap) - {"attributes"}
        assert kept["map_names"].asstr()[()].tolist() == ["q", "phi"]
        for name in set(kept) - {"map_names", "map_units"}:
            np.testing.assert_array_equal(kept[name][()], qmap[name])
            assert kept[name].dtype == np.asarray(qmap[name]).dtype


def test_arrays_of_any_other_operator_are_kept_verbatim(tmp_path):
    start, *_, stop = make_outputs(make_qmap())
    arrays = {"c2": np.arange(12.0).reshape(3, 4), "bins": np.array([1, 2], "<i4")}
    other = Result(run=start.run, operator="twotime_sums", n_frames=9, final=True, arrays=arrays)
    with h5py.File(write_run(tmp_path / "result.h5", outputs=[start, other, stop])) as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file[f"xpcs/twotime_sums/{name}"][()], array)
            assert file[f"xpcs/twotime_sums/{name}"].dtype == array.dtype


def test_images_are_compressed_with_what_every_hdf5_reads(tmp_path):
    with h5py.File(write_run(tmp_path / "result.h5")) as file:
        assert file["xpcs/temporal_mean/scattering_2d"].compression == "gzip"
        compressions = set()
        file.visititems(lambda _, item: compressions.add(getattr(item, "compression", None)))
        assert compressions == {None, "gzip"}


def test_a_result_that_does_not_fit_the_map_is_an_error(tmp_path):
    outputs = make_outputs(make_qmap(n_dynamic=3))
    with pytest.raises(SinkError, match=r"result 'multitau': g2: \(3,\) does not fit the map's \(4,\)"):
        write_run(tmp_path / "result.h5", make_qmap(), outputs)


@pytest.mark.parametrize("detector", [{"shape": (9, 64)}, {"detector_shape": (2**31, 2**31)}])
def test_a_detector_that_does_not_fit_the_map_is_an_error(tmp_path, detector):
    start, *rest = make_outputs(make_qmap())
    with pytest.raises(SinkError, match=r"run run-1: detector: \(.*\) does not fit the map's \(48, 64\)"):
        write_run(tmp_path / "result.h5", outputs=[replace(start, **detector), *rest])


def test_a_result_that_lacks_an_array_is_an_error(tmp_path):
    start, multitau, *_, stop = make_outputs(make_qmap())
    del multitau.arrays["n_pairs"]
    with pytest.raises(SinkError, match="result 'multitau' lacks n_pairs"):
        write_run(tmp_path / "result.h5", outputs=[start, multitau, stop])


def test_a_map_that_the_viewer_could_not_load_is_refused_at_once(tmp_path):
    qmap = make_qmap()
    del qmap["static_index_mapping"], qmap["attributes"]["hash"]
    with pytest.raises(ConfigError, match="lacks static_index_mapping, attributes: hash"):
        Hdf5Sink(tmp_path / "result.h5", qmap=qmap)


@pytest.mark.parametrize("name", ["file/result.h5", "file/{run}/result.h5"])
def test_a_place_where_nothing_can_be_written_is_refused_at_once(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=rf"{re.escape(str(tmp_path / name))}: (Not a directory|File exists)"):
        Hdf5Sink(tmp_path / name, qmap=make_qmap())


def test_the_folder_is_made_before_the_first_run_and_nothing_is_left_in_it(tmp_path):
    Hdf5Sink(tmp_path / "a" / "b" / "{run}" / "result.h5", qmap=make_qmap())
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
