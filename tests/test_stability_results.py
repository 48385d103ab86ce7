"""g2 of parts of a run in result files, in what is made of them, and on the page."""

import csv

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from stream.__main__ import app
from stream.config import load
from stream.errors import ConfigError
from stream.export import export
from stream.figure import draw
from stream.live.section import pack
from stream.live.stability import segments
from stream.result import read
from tests.test_sinks_hdf5 import FRAME_TIME, LENGTH, make_qmap, rates, with_segments, write_run


@pytest.fixture(scope="module")
def multitau():
    """What stands in the file: delays that no pair has are left out."""
    arrays = next(each for each in with_segments(make_qmap()) if getattr(each, "operator", None) == "multitau").arrays
    known = arrays["n_pairs"] > 0
    axis = {"g2_segments": 1, "g2_err_segments": 1, "n_pairs_segments": 1}
    return {
        name: values if name.startswith("segment") else np.compress(known, values, axis.get(name, 0))
        for name, values in arrays.items()
    }


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    qmap = make_qmap()
    return write_run(tmp_path_factory.mktemp("ageing") / "result.h5", qmap, with_segments(qmap))


def show(path):
    return CliRunner().invoke(app, ["show", str(path)], env={"COLUMNS": "100"})


def test_a_result_is_read_as_it_was_written(result, multitau):
    parts = read(result).segments
    np.testing.assert_array_equal(parts.g2, multitau["g2_segments"])
    np.testing.assert_array_equal(parts.g2_err, multitau["g2_err_segments"])
    np.testing.assert_allclose(parts.start, multitau["segment_start"] * FRAME_TIME)
    np.testing.assert_allclose(parts.stop, multitau["segment_stop"] * FRAME_TIME)


def test_a_file_with_parts_that_do_not_fit_its_curves_is_refused(result, tmp_path):
    (tmp_path / "other.h5").write_bytes(result.read_bytes())
    with h5py.File(tmp_path / "other.h5", "a") as file:
        del file["xpcs/multitau/normalized_g2_partial"]
        file["xpcs/multitau/normalized_g2_partial"] = np.ones((4, 3, 4))
    with pytest.raises(ConfigError, match="normalized_g2_partial is"):
        read(tmp_path / "other.h5")


def test_parts_of_other_programs_end_where_the_next_begins(result, tmp_path):
    (tmp_path / "other.h5").write_bytes(result.read_bytes())
    with h5py.File(tmp_path / "other.h5", "a") as file:
        del file["xpcs/multitau/segment_stop"]
    parts = read(tmp_path / "other.h5").segments
    np.testing.assert_array_equal(parts.stop, [*parts.start[1:], np.nan])


def test_a_run_of_one_part_is_none(tmp_path):
    assert read(write_run(tmp_path / "result.h5")).segments is None


def test_show_tells_contrast_and_rate_early_and_late(result):
    said = show(result)
    assert said.exit_code == 0, said.output
    title = said.output.splitlines().index(
        next(
            line for line in said.output.splitlines() if line.startswith("early: 0 s to 1.024 s, late: 3.072 s to 4 s")
        )
    )
    for line, q, rate in zip(
        said.output.splitlines()[title + 2 :], make_qmap()["dynamic_v_list_dim0"], rates(make_qmap()), strict=False
    ):
        told_q, *both, change = line.split()
        contrasts, (early, late) = both[:2], (float(each.partition("(")[0]) for each in both[2:])
        assert float(told_q) == pytest.approx(q, rel=1e-3)
        assert all(float(each.partition("(")[0]) == pytest.approx(0.2, abs=0.02) for each in contrasts)
        assert early == pytest.approx(rate, rel=0.1)
        assert late == pytest.approx(rate / 8, rel=0.1)
        assert float(change) < -10


def test_the_picture_shows_g2_of_every_part_over_that_of_the_run(result, multitau):
    (axes,) = [
        axes for axes in draw(result).get_axes() if "in 4 parts" in axes.get_title() and "g₂" in axes.get_title()
    ]
    parts = [bars.lines[0].get_ydata() for bars in axes.containers]
    known = np.isfinite(multitau["g2_segments"][0, :, 0])
    np.testing.assert_array_equal(parts, multitau["g2_segments"][:, known, 0])
    np.testing.assert_array_equal(axes.get_lines()[-1].get_ydata(), multitau["g2"][:, 0])


def test_a_csv_has_two_columns_of_every_part_named_by_its_time(result, multitau, tmp_path):
    export(read(result), tmp_path / "g2.csv")
    with (tmp_path / "g2.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    n_delay = len(multitau["delay"])
    for part, span in enumerate(("0_to_1.024", "1.024_to_2.048", "2.048_to_3.072", "3.072_to_4")):
        for name in ("g2", "g2_err"):
            column = [float(line[f"{name}_{span}_s"] or "nan") for line in lines[:n_delay]]
            np.testing.assert_array_equal(column, multitau[f"{name}_segments"][part, :, 0])


def test_netcdf_has_them_by_segment_delay_and_bin(result, multitau, tmp_path):
    import xarray

    export(read(result), tmp_path / "g2.nc")
    with xarray.open_dataset(tmp_path / "g2.nc") as dataset:
        assert dataset["g2_segments"].dims == ("segment", "delay", "bin")
        np.testing.assert_array_equal(dataset["g2_segments"], multitau["g2_segments"])
        np.testing.assert_array_equal(dataset["g2_err_segments"], multitau["g2_err_segments"])
        np.testing.assert_allclose(dataset["segment_start"], multitau["segment_start"] * FRAME_TIME)
        assert dataset["segment_stop"].units == "s"


def test_the_number_of_segments_is_configured(tmp_path):
    text = "source: {address: run.h5}\nqmap: qmap.h5\noperators: {multitau: {segments: %s}}\nsinks: [console]\n"
    path = tmp_path / "run.yaml"
    path.write_text(text % 12)
    assert load(path).operators.multitau.segments == 12
    path.write_text(text % 65)
    with pytest.raises(ConfigError, match="segments"):
        load(path)


# On the page


def test_the_page_is_given_the_delays_that_parts_have(multitau):
    shown = segments(multitau, FRAME_TIME)
    known = multitau["delay"] < LENGTH
    np.testing.assert_array_equal(shown["tau"], multitau["tau"][known])
    np.testing.assert_array_equal(shown["g2"], multitau["g2_segments"][:, known].astype("<f4"))
    np.testing.assert_array_equal(shown["n_pairs"], multitau["n_pairs_segments"][:, known])
    np.testing.assert_allclose(shown["stop"], [1.024, 2.048, 3.072, 4.0])
    pack("segments", {}, shown)


def test_the_page_is_given_nothing_of_fewer_than_two_parts(multitau):
    one = {name: values[:1] if "segment" in name else values for name, values in multitau.items()}
    assert segments(one, FRAME_TIME) is None
    assert segments({"tau": multitau["tau"]}, FRAME_TIME) is None


@pytest.mark.parametrize("name", ["g2_segments", "g2_err_segments", "n_pairs_segments", "segment_stop"])
def test_parts_that_do_not_fit_together_are_not_shown(multitau, name):
    with pytest.raises(ValueError, match="segments"):
        segments({**multitau, name: multitau[name][:, :-1] if multitau[name].ndim > 1 else [1]}, FRAME_TIME)
