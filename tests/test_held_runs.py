"""A run that is held open for its file, and another one meanwhile: what sinks tell of them."""

import io
from dataclasses import replace

import h5py
import numpy as np
import pytest
from rich.console import Console

from stream.inspection import of_result
from stream.messages import Result, RunStart, RunStop
from stream.sinks.console import ConsoleSink
from stream.sinks.hdf5 import Hdf5Sink
from tests import bluesky

NONE = {
    name: np.array(0) for name in ("late", "duplicate", "undecodable", "stray", "plane", "from_file", "awaits_file")
}
NONE |= {"missing_regions": np.empty(0, int), "repaired_regions": np.empty(0, int)}
HELD = {"awaits_file": np.array(1), "plane": np.array(1), "lost": np.array(700)}
REPAIRED = {"repaired_regions": np.array([1, 3]), "from_file": np.array(700), "plane": np.array(1), "lost": np.array(0)}


def named(outputs, run, **changes):
    """The same outputs of a run of another name, with other ledgers."""
    for output in outputs:
        if isinstance(output, Result) and output.operator == "ledger":
            output = replace(output, arrays={**output.arrays, **NONE, **changes})
        yield replace(output, run=run)


@pytest.fixture
def outputs():
    """Run "a" is held while "b" begins and ends, and ends then."""
    given = bluesky.outputs()[1]
    start, stop = given[0], given[-1]
    assert isinstance(start, RunStart)
    assert isinstance(stop, RunStop)
    last = [each for each in given if isinstance(each, Result) and each.final]
    held = [replace(each, final=False) for each in last]
    return [
        replace(start, run="a"),
        *named(held, "a", **HELD),
        *named(given, "b"),
        *named(held, "a", **HELD),
        *named(last, "a", **REPAIRED),
        replace(stop, run="a"),
    ]


def test_documents_are_one_run_of_each_and_tell_how_frames_came(outputs):
    kept = bluesky.Kept()
    with bluesky.sink(kept) as sink:
        for output in outputs:
            sink.write(output)
    starts = {document["uid"]: document["original_run_uid"] for name, document in kept.documents if name == "start"}
    assert sorted(starts.values()) == ["a", "b"]
    descriptors = {each["uid"]: each["run_start"] for name, each in kept.documents if name == "descriptor"}

    def run_of(name, document):
        where = {"start": "uid", "event": "descriptor"}.get(name, "run_start")
        return starts[descriptors.get(document[where], document[where])]

    for run in "ab":
        bluesky.assert_valid([each for each in kept.documents if run_of(*each) == run])
    events = [
        document["data"] for name, document in kept.documents if name == "event" and run_of(name, document) == "a"
    ]
    told = [(each["xpcs_plane"], each["xpcs_frames_from_file"], each["xpcs_awaits_file"]) for each in events]
    assert told == [(1, 0, 1), (1, 0, 1), (1, 700, 0)]


def test_each_run_has_its_result_file_which_tells_how_frames_came(outputs, tmp_path):
    with Hdf5Sink(tmp_path / "{run}.h5", qmap=bluesky.outputs()[0]) as sink:
        for output in outputs:
            sink.write(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["xpcs/ledger/repaired_regions"][()].tolist() == [1, 3]
        assert file["xpcs/ledger/from_file"][()] == 700
        assert file["xpcs/ledger/awaits_file"][()] == 0
    facts, _ = of_result(tmp_path / "a.h5")
    assert facts["came by"] == "stream and file"
    assert facts["repaired regions"] == "1, 3"
    assert facts["late, from the file"] == 700
    facts, _ = of_result(tmp_path / "b.h5")
    assert not facts.keys() & {"came by", "repaired regions", "missing regions", "late, from the file"}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_shows_how_both_ended_and_that_one_waited(outputs, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, height=40)
    with ConsoleSink(console, q=[0.1] * 4) as sink:
        for output in outputs:
            sink.write(output)
    text = console.file.getvalue()
    assert "waits for lost frames from a file" in text
    assert "by stream and file; 700 late, from the file (region 1, 3)" in text
    assert text.count("complete") >= 2
    assert text.rindex("run ") > text.index("complete")
