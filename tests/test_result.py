"""Results that others wrote and others read: what is shown, compared and exported."""

import csv
import importlib
import re
import shutil
import sys

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from stream.__main__ import app
from stream.compare import compare
from stream.errors import ConfigError
from stream.export import COLUMNS, export
from stream.result import read
from tests.test_sinks_hdf5 import FRAME_TIME, make_outputs, make_qmap, rates, with_twotime, write_run

AEROGEL = "aps8idi_aerogel_result.nxs"
NUMBERS = ("tau", "q", "phi", "g2", "g2_err", "n_pairs")


def xpcs_stream(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("ours") / "ours.h5")


@pytest.fixture(scope="module")
def two_time(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("two-time") / "result.h5", outputs=with_twotime(make_qmap()))


@pytest.fixture
def other(tmp_path, result):
    """Return a copy that a test may change."""
    return shutil.copy(result, tmp_path / "other.h5")


def change(path, name, values, **attributes):
    with h5py.File(path, "r+") as file:
        kept = dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(kept | attributes)


def as_boost_corr(path):
    """Leave only what boost_corr writes: delays in frames, and neither pairs nor ledger."""
    with h5py.File(path, "r+") as file:
        for name in ("program", "n_frames", "ledger", "multitau/tau", "multitau/n_pairs", "metadata", "exit_status"):
            del file[f"xpcs/{name}"]
        for name in ("data", "entry_identifier"):
            del file[f"entry/{name}"]
    return path


def g2_of(path):
    with h5py.File(path) as file:
        return file["xpcs/multitau/normalized_g2"][()], file["xpcs/multitau/normalized_g2_err"][()]


# Reading


def test_a_result_of_ours_is_read_as_it_was_written(result):
    curves = read(result)
    assert (curves.format, curves.run, curves.facts["frames"], curves.facts["lost"]) == (
        "xpcs-stream",
        "run-1",
        4000,
        3,
    )
    with h5py.File(result) as file:
        for name, place in {
            "g2": "normalized_g2",
            "g2_err": "normalized_g2_err",
            "tau": "tau",
            "n_pairs": "n_pairs",
        }.items():
            np.testing.assert_array_equal(getattr(curves, name), file[f"xpcs/multitau/{place}"])
    np.testing.assert_array_equal(curves.q, make_qmap()["dynamic_v_list_dim0"])


def test_a_result_of_boost_corr_has_delays_in_strides_of_averaged_frames(result, other):
    as_boost_corr(other)
    with h5py.File(other, "r+") as file:
        file["xpcs/multitau/config/stride_frame"][...] = 3
        file["xpcs/multitau/config/avg_frame"][...] = 2
    curves = read(other)
    assert (curves.format, curves.run) == ("boost_corr", "other")
    np.testing.assert_allclose(curves.tau, 6 * read(result).tau, rtol=1e-12)
    assert np.isnan(curves.n_pairs).all()


def test_the_real_result_of_the_aps_is_read(shared_data):
    curves = read(shared_data / AEROGEL)
    assert curves.format == "APS NXcanSAS"
    assert curves.run == "B009_Aerogel_1mm_025C_att1_Lq0_001_00001-10000"
    with h5py.File(shared_data / AEROGEL) as file:
        data = file["entry/XPCS/data"]
        for name, place in {"g2": "g2", "g2_err": "g2_errors", "tau": "t_el", "q": "ql_dyn"}.items():
            np.testing.assert_array_equal(getattr(curves, name), data[place])


def test_q_of_other_units_is_converted_and_that_is_told(result, tmp_path):
    qmap = make_qmap()
    qmap |= {"dynamic_v_list_dim0": qmap["dynamic_v_list_dim0"] * 10, "map_units": ["nm^-1", "degree"]}
    of_nm = write_run(tmp_path / "nm.h5", qmap)
    np.testing.assert_allclose(read(of_nm).q, read(result).q, rtol=1e-12)
    assert read(of_nm).converted == ("q is in nm^-1",)


def test_delays_of_the_aps_in_other_units_are_converted(shared_data, tmp_path):
    path = tmp_path / "ms.nxs"
    path.write_bytes((shared_data / AEROGEL).read_bytes())
    with h5py.File(path) as file:
        tau = file["entry/XPCS/data/t_el"][()]
    change(path, "entry/XPCS/data/t_el", tau * 1000, units="ms")
    np.testing.assert_allclose(read(path).tau, tau, rtol=1e-6)
    assert read(path).converted == ("tau is in ms",)


def test_a_unit_that_is_not_known_is_named(tmp_path):
    path = write_run(tmp_path / "x.h5", make_qmap() | {"map_units": ["furlong", "degree"]})
    with pytest.raises(ConfigError, match=r'x\.h5: q is in "furlong"'):
        read(path)


@pytest.mark.parametrize(
    ("place", "values", "problem"),
    [
        ("xpcs/multitau/normalized_g2", np.ones((3, 7)), r"normalized_g2 is \(3, 7\)"),
        ("xpcs/multitau/normalized_g2", np.ones(3), r"normalized_g2 is \(3,\)"),
        ("xpcs/multitau/normalized_g2_err", np.ones((2, 4)), r"normalized_g2_err is \(2, 4\)"),
        ("xpcs/multitau/tau", np.linspace(1, 0.1, 43), "not above 0 and ascending"),
        ("xpcs/multitau/tau", np.full(43, np.nan), "not above 0 and ascending"),
        ("xpcs/multitau/tau", ["a"] * 43, "holds object, not numbers"),
        ("entry/instrument/detector_1/frame_time", np.nan, "frame_time is nan"),
        ("xpcs/n_frames", [1, 2], "n_frames is .1 2., not one number"),
    ],
)
def test_what_does_not_fit_together_is_named(other, place, values, problem):
    change(other, place, values)
    with pytest.raises(ConfigError, match=problem):
        read(other)


def test_a_dataset_that_claims_to_be_huge_is_refused_before_it_is_read(other):
    with h5py.File(other, "r+") as file:
        del file["xpcs/multitau/normalized_g2"]
        file.create_dataset("xpcs/multitau/normalized_g2", (2**40, 4), chunks=(1, 4), dtype="f8")
    with pytest.raises(ConfigError, match="normalized_g2 has 4398046511104 elements, more than"):
        read(other)


# Showing


def test_show_prints_contrast_rate_and_baseline_of_every_q_and_how_rates_go_with_q(result):
    said = xpcs_stream("show", result).output
    assert re.search(r"run +run-1 ", said)
    assert re.search(r"lost +3 ", said)
    diffusion, error = re.search(r"D +([\d.]+)\((\d+)\) Å²/s", said).groups()
    assert float(diffusion) == pytest.approx(4e5, abs=5 * float(error))
    rows = [line.split() for line in said.splitlines() if line.rstrip().endswith("yes")]
    for row, q, rate in zip(rows, make_qmap()["dynamic_v_list_dim0"], rates(make_qmap()), strict=True):
        assert float(row[0]) == pytest.approx(q, rel=1e-3)
        assert float(row[1].partition("(")[0]) == pytest.approx(0.2, abs=0.005)
        assert float(row[2].partition("(")[0]) == pytest.approx(rate, rel=0.05)
        assert float(row[3].partition("(")[0]) == pytest.approx(1 / rate, rel=0.05)
        assert float(row[4].partition("(")[0]) == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_show_draws_by_the_suffix(two_time, tmp_path, suffix, begin):
    picture = tmp_path / f"picture{suffix}"
    said = xpcs_stream("show", two_time, "--out", picture)
    assert said.exit_code == 0
    assert said.output.endswith(f"{picture}\n")
    assert picture.read_bytes().startswith(begin)


# Comparing


def test_the_same_result_lies_nowhere_apart(result):
    found = compare(read(result), read(result))
    assert (found.largest, found.median, found.notes) == (0, 0, [])
    assert len(found.bins) == 4


def test_a_difference_is_told_in_units_of_both_errors_together(result, other):
    g2, error = g2_of(other)
    shift = 3 * np.hypot(error, 2 * error)
    change(other, "xpcs/multitau/normalized_g2", g2 + shift * (np.arange(4) == 2))
    change(other, "xpcs/multitau/normalized_g2_err", 2 * error)
    found = compare(read(result), read(other))
    np.testing.assert_allclose([each.largest for each in found.bins], [0, 0, 3, 0], atol=1e-9)
    np.testing.assert_allclose([each.median for each in found.bins], [0, 0, 3, 0], atol=1e-9)


def test_two_measurements_of_the_same_dynamics_differ_as_normal_noise_does(result, other):
    _, error = g2_of(other)
    truth = 1 + 0.2 * np.exp(-2 * np.outer(read(other).tau, rates(make_qmap())))
    change(other, "xpcs/multitau/normalized_g2", truth + np.random.default_rng(7).normal(0, error))
    found = compare(read(result), read(other))
    assert 0.5 < found.median < 0.85
    assert found.largest < 5


def test_a_result_of_boost_corr_of_the_same_run_is_the_same(result, other):
    assert compare(read(result), read(as_boost_corr(other))).largest == 0


def test_delays_that_only_one_has_are_left_out_and_told(result, other):
    with h5py.File(other, "r+") as file:
        multitau = file["xpcs/multitau"]
        for name in ("normalized_g2", "normalized_g2_err", "tau", "n_pairs", "delay_list"):
            values = multitau[name][1::2]
            del multitau[name]
            multitau[name] = values
    found = compare(read(result), read(other))
    n = len(read(result).tau)
    assert found.n_delays == n // 2
    assert found.notes[0].startswith(f"{n // 2} delays in common: ")
    np.testing.assert_array_equal(found.bins[0].tau, read(other).tau)


@pytest.mark.parametrize(("apart", "is_same"), [(5e-7, True), (3e-6, False)])
def test_delays_are_the_same_within_a_millionth(result, other, apart, is_same):
    change(other, "xpcs/multitau/tau", read(result).tau * (1 + apart))
    if is_same:
        assert compare(read(result), read(other)).n_delays == len(read(result).tau)
    else:
        with pytest.raises(ConfigError, match=r"no delay in common: .*ours.h5 has .* s to .*other.h5 has"):
            compare(read(result), read(other))


def shifted(tmp_path, by, **more):
    """A result of another map: other bins, of which the q are larger, and one pixel is left out."""
    qmap = make_qmap()
    roi = {name: qmap[name].copy() for name in ("mask", "dynamic_roi_map", "static_roi_map")}
    for each in roi.values():
        each[0, 40] = 0
    q = np.asarray(by) * qmap["dynamic_v_list_dim0"]
    return write_run(tmp_path / "shifted.h5", qmap | roi | {"dynamic_v_list_dim0": q} | more, make_outputs(make_qmap()))


def test_bins_of_other_maps_are_matched_by_q(result, tmp_path):
    found = compare(read(result), read(shifted(tmp_path, [1.0005, 1.01, 1, 0.9995])))
    assert [(each.a, each.b) for each in found.bins] == [(0, 0), (2, 2), (3, 3)]
    assert found.largest == 0
    assert [note.split(" bins of ")[0] for note in found.notes] == ["1 of 4", "1 of 4"]


def test_the_tolerance_of_q_can_be_told(result, tmp_path):
    found = compare(read(result), read(shifted(tmp_path, [1.0005, 1.01, 1, 0.9995])), q_tolerance=0.02)
    assert len(found.bins) == 4


def test_results_without_a_bin_in_common_are_refused_with_their_ranges(result, shared_data):
    with pytest.raises(ConfigError, match=r"no bin in common within 0.001 of q: .* has 4 from .* has 27 from 0.001999"):
        compare(read(result), read(shared_data / AEROGEL))


def test_a_bin_that_is_several_of_the_other_is_named(result, tmp_path):
    with pytest.raises(ConfigError, match=r"bin 2 \(q = 0.01025.*\) is 2 bins of the other"):
        compare(read(result), read(shifted(tmp_path, [1, 1, 0.6531, 1])), q_tolerance=0.02)


def test_bins_of_unknown_q_and_another_map_are_refused(result, tmp_path):
    with pytest.raises(ConfigError, match=r"shifted.h5 does not tell the q of its bins"):
        compare(read(result), read(shifted(tmp_path, np.full(4, np.nan))))


def test_where_one_tells_no_errors_those_of_the_other_are_taken(result, other):
    g2, error = g2_of(other)
    change(other, "xpcs/multitau/normalized_g2", g2 + 2 * error)
    change(other, "xpcs/multitau/normalized_g2_err", np.full_like(error, np.nan))
    found = compare(read(result), read(other))
    np.testing.assert_allclose([each.largest for each in found.bins], 2)
    assert "other.h5 tells no errors" in found.notes[0]
    with pytest.raises(ConfigError, match=r"neither .*other.h5 nor .*other.h5 tells errors"):
        compare(read(other), read(other))


def test_compare_ends_with_1_where_a_difference_is_larger_than_allowed(result, other):
    g2, error = g2_of(other)
    g2[4, 1] += 10 * np.sqrt(2) * error[4, 1]
    change(other, "xpcs/multitau/normalized_g2", g2)
    assert xpcs_stream("compare", result, other).exit_code == 0
    assert xpcs_stream("compare", result, other, "--max-z", 10.1).exit_code == 0
    said = xpcs_stream("compare", result, other, "--max-z", 9.9)
    assert said.exit_code == 1
    assert said.stderr == "xpcs-stream: max |z| 10 is above 9.9\n"
    assert re.search(rf"^0.01025 +43 +0 +10 +{5 * FRAME_TIME:g} *$", said.stdout, re.MULTILINE), said.stdout


def test_compare_draws_both(shared_data, tmp_path):
    said = xpcs_stream("compare", shared_data / AEROGEL, shared_data / AEROGEL, "--out", tmp_path / "both.png")
    assert "27 bins, 48 delays in common: median |z| 0, max |z| 0" in said.output
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


# Exporting


def table_of(curves):
    """What a .csv is to hold, as numbers."""
    for b in range(len(curves.q)):
        for d in range(len(curves.tau)):
            place = (b + 1, curves.q[b], curves.phi[b], curves.tau[d])
            yield (*place, curves.g2[d, b], curves.g2_err[d, b], curves.n_pairs[d])


@pytest.fixture(params=["ours", "aps"])
def any_result(request, result):
    return result if request.param == "ours" else request.getfixturevalue("shared_data") / AEROGEL


def test_a_csv_reads_back_bit_for_bit(any_result, tmp_path):
    assert xpcs_stream("export", any_result, "--to", tmp_path / "g2.csv").exit_code == 0
    with (tmp_path / "g2.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == COLUMNS
    values = [[float(text) if text else np.nan for text in line] for line in lines]
    np.testing.assert_array_equal(values, list(table_of(read(any_result))))


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_netcdf_and_zarr_read_back_bit_for_bit_with_their_units(any_result, tmp_path, suffix):
    import xarray

    curves = read(any_result)
    export(curves, tmp_path / f"g2{suffix}")
    opened = xarray.open_zarr if suffix == ".zarr" else xarray.open_dataset
    with opened(tmp_path / f"g2{suffix}", **({"consolidated": False} if suffix == ".zarr" else {})) as dataset:
        for name in NUMBERS:
            assert dataset[name].dtype == np.float64
            np.testing.assert_array_equal(dataset[name], getattr(curves, name))
        assert dataset["g2"].dims == ("delay", "bin")
        assert (dataset["tau"].units, dataset["q"].units) == ("s", "1/angstrom")
        assert dataset.attrs["run"] == curves.run


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_two_time_correlations_are_exported_with_their_times(two_time, tmp_path, suffix):
    import xarray

    export(read(two_time), tmp_path / f"c2{suffix}")
    engine = {".nc": "h5netcdf", ".zarr": "zarr"}[suffix]
    options = {"consolidated": False} if suffix == ".zarr" else {}
    with (
        xarray.open_dataset(tmp_path / f"c2{suffix}", engine=engine, **options) as dataset,
        h5py.File(two_time) as file,
    ):
        c2 = dataset["c2"].sel(processed_bin=2).values
        upper = np.triu_indices(len(c2))
        np.testing.assert_array_equal(c2[upper], file["xpcs/twotime/correlation_map/c2_00002"][()][upper])
        np.testing.assert_allclose(dataset["t1"], 4 * FRAME_TIME * np.arange(len(c2)))


def test_a_file_that_is_there_is_replaced_and_a_directory_is_not(result, tmp_path):
    export(read(result), tmp_path / "g2.csv")
    (tmp_path / "g2.csv").write_text("old")
    export(read(result), tmp_path / "g2.csv")
    assert (tmp_path / "g2.csv").read_text().startswith("bin,q_per_angstrom")
    export(read(result), tmp_path / "g2.zarr")
    with pytest.raises(ConfigError, match=r"g2.zarr: is there"):
        export(read(result), tmp_path / "g2.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g2.csv", "g2.zarr"]


@pytest.mark.parametrize(("suffix", "library"), [(".nc", "xarray"), (".nc", "h5netcdf"), (".zarr", "zarr")])
def test_what_is_not_installed_is_named_with_how_to_get_it(result, tmp_path, monkeypatch, suffix, library):
    importlib.import_module(library)
    monkeypatch.setitem(sys.modules, library, None)
    said = xpcs_stream("export", result, "--to", tmp_path / f"g2{suffix}")
    assert said.exit_code == 1
    assert said.stderr.endswith(f'{suffix} needs {library}: pip install "xpcs-stream[export]"\n')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "problem"), [("g2.xls", "exported to .csv, .nc, .zarr"), ("none/g2.csv", "No such file")]
)
def test_where_nothing_can_be_exported_to_is_named(result, tmp_path, to, problem):
    said = xpcs_stream("export", result, "--to", tmp_path / to)
    assert said.exit_code == 1
    assert said.stderr.startswith(f"xpcs-stream: {tmp_path / to}: ")
    assert problem in said.stderr
