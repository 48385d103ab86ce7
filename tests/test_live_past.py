"""Runs of the day that a page has from their result files."""

import os
import threading
import time

import h5py
import numpy as np

from stream.live.past import newest, read_back
from stream.messages import FrameBatch
from stream.operators.multitau import MultiTau
from stream.operators.scattering import Scattering
from stream.pipeline import Pipeline
from stream.sinks.hdf5 import Hdf5Sink
from tests.sources import ListSink, ListSource
from tests.test_live import ROIMAP, SHAPE, hear, ledger, multitau, served, start, stop, unpack


def result_file(folder, run, *, seed, n_frames=64):
    """Write what a run leaves behind; return its g2."""
    counts = np.random.default_rng(seed).poisson(3, (n_frames, *SHAPE)).astype("<u2")
    batch = FrameBatch(run=run, first=0, frames=counts, timestamp_ns=0)
    messages = [start(run, sample=f"silica {seed}", start_time=f"2026-11-22T00:00:0{seed}+00:00"), batch, stop(run)]
    sink = ListSink()
    with Hdf5Sink(
        folder / "result-{run}.h5", qmap=ROIMAP.arrays(), configuration="", on_written=lambda _: None
    ) as file:
        operators = lambda start: [MultiTau(start, ROIMAP), Scattering(start, ROIMAP)]  # noqa: E731
        Pipeline(ListSource(messages), operators, [file, sink], publish_every=1e9).run()
    g2 = sink.results(final=True)[run, "multitau"]["g2"]
    return g2[np.isfinite(g2).any(axis=1)]


def test_a_page_that_is_started_anew_has_the_runs_of_the_day_from_their_files(tmp_path):
    curves = [result_file(tmp_path, f"scan-{seed}", seed=seed) for seed in range(3)]
    (tmp_path / "result-damaged.h5").write_bytes((tmp_path / "result-scan-0.h5").read_bytes()[:5000])
    (tmp_path / "result-none.h5").write_text("no result")
    os.mkfifo(tmp_path / "result-fifo.h5")
    (tmp_path / "result-scan-0.h5").unlink()
    for where in (tmp_path, tmp_path / "result-{run}.h5"):
        with served(files=where) as page, page.socket() as socket:
            head, _ = hear(socket, lambda head: head["section"] == "history" and len(head["runs"]) == 2)
            told = {run["run"]: run for run in head["runs"]}
            assert set(told) == {"scan-1", "scan-2"}
            assert (told["scan-2"]["sample"], told["scan-2"]["state"]) == ("silica 2", "complete")
            _, arrays = unpack(page.get(f"/runs/{told['scan-2']['number']}/g2"))
            np.testing.assert_array_equal(arrays["g2"], curves[2])
            again = start("scan-2", start_time="2026-11-22T00:00:02+00:00")
            page.publish(again, multitau("scan-2", final=True), ledger("scan-2", final=True), stop("scan-2", "abort"))
            head, _ = hear(socket, lambda head: head["section"] == "history" and head["runs"][0]["state"] == "aborted")
            assert [run["run"] for run in head["runs"]] == ["scan-2", "scan-1"], "it is the same run"


def test_of_result_files_those_of_the_day_are_read(tmp_path):
    for name, age in (("yesterday", 25), ("today", 23)):
        (tmp_path / f"{name}.h5").touch()
        os.utime(tmp_path / f"{name}.h5", (time.time() - age * 3600, time.time() - age * 3600))
    assert newest(tmp_path) == [tmp_path / "today.h5"]


def test_of_result_files_the_newest_are_read(tmp_path):
    for i in range(70):
        (tmp_path / f"{i}.h5").touch()
        os.utime(tmp_path / f"{i}.h5", (time.time() - i, time.time() - i))
    assert [path.name for path in newest(tmp_path)] == [f"{i}.h5" for i in range(50)]
    assert newest(tmp_path / "none") == []


def test_a_date_that_is_none_hides_no_other_run(tmp_path):
    for seed in range(2):
        result_file(tmp_path, f"scan-{seed}", seed=seed)
    with h5py.File(tmp_path / "result-scan-1.h5", "r+") as file:
        del file["xpcs/date"]
        file["xpcs/date"] = "0001-01-01T00:00:00+14:00"
    told = []
    read_back(tmp_path, lambda facts, _: told.append(facts["run"]), threading.Event())
    assert told == ["scan-0"]
