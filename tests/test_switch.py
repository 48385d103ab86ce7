"""Which way frames go, by what is measured: this is the specification of `hpc_bridge.switch`."""

import re
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_bridge import config
from hpc_bridge.errors import ConfigError
from hpc_bridge.switch import Measured, Plane, Switching, begin, decide

DEFAULTS = Switching()
WELL = Measured(ack_lag=2.0, lost=0, spool="takes", full_in=3600.0, heartbeat_age=1.0, node_wait=0.0)
NOTHING = Measured()
STREAM, BOTH, FILE = Plane.STREAM, Plane.BOTH, Plane.FILE


def looks(switch, start, seconds, **changes):
    """Look each second; what is given as a function is of the seconds since `start`."""
    for i in range(seconds):
        now = {name: value(i) if callable(value) else value for name, value in changes.items()}
        switch = decide(switch, replace(WELL, **now), DEFAULTS, start + i)
    return switch


def history(*phases):
    """The switch after phases of (seconds, what is measured unlike when all is well)."""
    switch, start = begin(0.0), 0
    for seconds, changes in phases:
        switch = looks(switch, start, seconds, **changes)
        start += seconds
    return switch


def waited(i):
    return float(i)


UNKNOWN = asdict(NOTHING)
SILENT = {"heartbeat_age": waited}
NO_NODES = {"heartbeat_age": None, "node_wait": waited}
LOSES = {"lost": 7}
LATE = {"ack_lag": 61.0}
FILLING = {"full_in": 119.0}
QUIET = (10, {})

TABLE = [
    # All is well, or nothing is known, or there is nothing to know: no node is wanted between runs.
    ("all is well", [QUIET], STREAM, ""),
    ("nothing is known", [(1000, UNKNOWN)], STREAM, ""),
    ("nobody is wanted", [(1000, {"heartbeat_age": None, "ack_lag": 0.0, "full_in": None})], STREAM, ""),
    # One thing is wrong.
    ("a pilot is silent for less than 5 s", [(6, SILENT)], STREAM, ""),
    ("... for more", [(7, SILENT)], BOTH, "no pilot heard of for 6 s"),
    ("... for 30 s", [(31, SILENT)], BOTH, "no pilot heard of for 6 s"),
    ("... for more than 30 s", [(32, SILENT)], FILE, "no pilot heard of for 31 s"),
    ("nodes are waited for, and the gateway keeps the frames", [(31, NO_NODES)], STREAM, ""),
    ("... for more than 30 s", [(32, NO_NODES)], BOTH, "nodes have been wanted for 31 s and none serves"),
    ("... for more than 2 min", [(122, NO_NODES)], FILE, "nodes have been wanted for 121 s and none serves"),
    ("frames are lost once", [(1, LOSES)], BOTH, "7 records lost on the way to the workers"),
    ("frames are lost for less than 5 min", [(300, LOSES)], BOTH, "7 records lost on the way to the workers"),
    ("... for 5 min", [(301, LOSES)], FILE, "frames have been lost on the way to the workers for 300 s"),
    ("frames are lost now and then", [(1000, {"lost": lambda i: int(i % 62 == 0)})], BOTH, "1 record lost"),
    ("... between runs, too", [(302, {"lost": lambda i: int(i % 60 == 0)})], FILE, "frames have been lost"),
    ("frames are late by less than a minute", [(1000, {"ack_lag": 59.0})], STREAM, ""),
    ("... by more", [(1000, LATE)], BOTH, "no worker has the frames of the last 61 s safe"),
    # The spool alone is no reason: what is streamed needs no file.
    ("the spool fills", [(1000, FILLING)], STREAM, ""),
    ("the spool loses frames", [(1000, {"spool": "loses"})], STREAM, ""),
    # By file only, frames are nowhere else: not without a spool that takes them.
    ("silence, the spool fills", [(1000, SILENT | FILLING)], BOTH, "no pilot heard of for 6 s"),
    ("silence, the spool has room for 2 to 5 min", [(99, SILENT | {"full_in": 299.0})], BOTH, "no pilot heard"),
    ("silence, the spool loses", [(1000, SILENT | {"spool": "loses"})], BOTH, "no pilot heard of for 6 s"),
    ("silence, nothing known of the spool", [(1000, SILENT | {"spool": None})], BOTH, "no pilot heard of for 6 s"),
    ("no nodes, the spool fills", [(1000, NO_NODES | FILLING)], BOTH, "nodes have been wanted for 31 s"),
    ("losses, the spool fills", [(1000, LOSES | FILLING)], BOTH, "7 records lost"),
    ("seen only once it is bad", [(1, {"heartbeat_age": 99.0} | FILLING)], BOTH,
     "no pilot heard of for 99 s; not by file only: the spool is full in 119 s"),
    ("no spool at all", [(1000, SILENT | LOSES | {"spool": "none"})], STREAM, "the gateway has no spool"),
    ("no frames come, so nothing fills", [(99, SILENT | {"full_in": None})], FILE, "no pilot heard of for 31 s"),
    # Back from stream+file: after 10 s without complaint, not before half a minute.
    ("heard again", [(20, SILENT), (16, {})], BOTH, "no pilot heard of for 6 s"),
    ("heard again for long enough", [(20, SILENT), (17, {})], STREAM, ""),
    ("heard again after long", [(300, SILENT | FILLING), (10, {})], BOTH, "no pilot heard of for 6 s"),
    ("heard again after long, for 10 s", [(300, SILENT | FILLING), (11, {})], STREAM, ""),
    ("late by less, but not by enough less", [(99, LATE), (1000, {"ack_lag": 41.0})], BOTH, "no worker has"),
    ("late no more", [(99, LATE), (11, {"ack_lag": 39.0})], STREAM, ""),
    ("no frames are lost, as between runs", [(300, LOSES | FILLING), (60, {})], BOTH, "7 records lost"),
    ("... for more than a minute", [(300, LOSES | FILLING), (72, {})], STREAM, ""),
    ("one of two complaints is over", [(99, LATE | LOSES | FILLING), (1000, LATE)], BOTH, "7 records lost"),
    ("a silent one is given up and waited for", [(11, SILENT), (30, NO_NODES)], BOTH, "no pilot heard of for 6 s"),
    ("... and another one serves", [(11, SILENT), (30, NO_NODES), (11, {})], STREAM, ""),
    # Back from file: by way of stream+file, the same again.
    ("a pilot serves again", [(40, SILENT), (21, {})], FILE, "no pilot heard of for 31 s"),
    ("... for long enough", [(40, SILENT), (22, {})], BOTH, "streamed again; by file, too, until that has lasted"),
    ("... and all is well", [(40, SILENT), (52, {})], STREAM, ""),
    ("... and it serves for less than 10 s", [(99, SILENT), (10, {})], FILE, "no pilot heard of for 31 s"),
    ("nodes come at last", [(400, NO_NODES), (11, {})], BOTH, "streamed again"),
    ("nodes are no more wanted", [(400, NO_NODES), (99, {"heartbeat_age": None})], STREAM, ""),
    ("the lag does not matter where nothing is sent", [(40, SILENT), (22, LATE)], BOTH, "streamed again"),
    ("... but then it does", [(40, SILENT), (300, LATE)], BOTH, "no worker has the frames"),
    # The spool fails while nothing else has the frames: streamed at once, and by file only again not so soon.
    ("the spool fills up", [(40, SILENT), (1, {"heartbeat_age": 40.0} | FILLING)], BOTH,
     "streamed again: the spool is full in 119 s"),
    ("the spool has room for 2 to 5 min", [(40, SILENT), (99, {"heartbeat_age": 40.0, "full_in": 121.0})], FILE, ""),
    ("the spool loses frames", [(40, SILENT), (1, {"heartbeat_age": 40.0, "spool": "loses"})], BOTH,
     "streamed again: the spool loses frames"),
    ("... and takes them again", [(40, SILENT), (1, {"spool": "loses"}), (29, {"heartbeat_age": 40.0})], BOTH, ""),
    ("... for half a minute", [(40, SILENT), (1, {"spool": "loses"}), (30, {"heartbeat_age": 40.0})], FILE, ""),
    # What is no more known changes nothing.
    ("stream+file, then unknown", [(20, SILENT), (1000, UNKNOWN)], BOTH, "no pilot heard of for 6 s"),
    ("file, then unknown", [(40, SILENT), (1000, UNKNOWN)], FILE, "no pilot heard of for 31 s"),
    ("losses, then unknown", [(20, LOSES), (1000, {"lost": None})], BOTH, "7 records lost"),
    ("unknown for a moment on the way back", [(20, SILENT), (5, {}), (5, UNKNOWN), (10, {})], STREAM, ""),
]  # fmt: skip


@pytest.mark.parametrize(("phases", "plane", "why"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_after_this_frames_go_that_way(phases, plane, why):
    switch = history(*phases)
    assert switch.plane == plane, switch
    if why or plane is STREAM:
        assert re.match(re.escape(why) + ("" if why else "$"), switch.why), switch.why


def changes(phases):
    """When frames went another way."""
    switch, start, found = begin(0.0), 0, []
    for seconds, what in phases:
        for i in range(seconds):
            before, switch = (
                switch.plane,
                looks(switch, start + i, 1, **{n: v(i) if callable(v) else v for n, v in what.items()}),
            )
            if switch.plane != before:
                found.append((start + i, switch.plane))
        start += seconds
    return found


def test_on_a_link_that_is_always_too_slow_streaming_is_tried_less_and_less_often():
    """Each time it loses frames again."""
    switch, tried, now = begin(0.0), [], 0
    while now < 14400:
        before, switch = (
            switch.plane,
            decide(switch, replace(WELL, lost=0 if switch.plane is FILE else 5), DEFAULTS, now),
        )
        if (before, switch.plane) == (FILE, BOTH):
            tried.append(now)
        now += 1
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert pauses[:4] == [60 + 301, 120 + 301, 240 + 301, 480 + 301]
    assert set(pauses[4:]) == {900 + 301}


def test_a_number_that_is_known_only_now_and_then_does_not_make_frames_go_to_and_fro():
    flickering = {"heartbeat_age": lambda i: 20.0 if i % 2 else None, "ack_lag": lambda i: None if i % 2 else 50.0}
    assert changes([(1000, flickering)]) == [(1, BOTH)]


numbers = st.sampled_from([None, 0.0, 4.0, 35.0, 50.0, 130.0, 400.0])
measured = st.builds(
    Measured,
    ack_lag=numbers,
    lost=st.sampled_from([None, 0, 0, 5]),
    spool=st.sampled_from(["takes", "takes", "loses", None]),
    full_in=numbers,
    heartbeat_age=numbers,
    node_wait=numbers,
)


@settings(max_examples=300)
@given(st.lists(st.tuples(measured, st.integers(1, 90)), max_size=40))
def test_whatever_is_measured_nothing_is_only_in_a_spool_that_fails_and_nothing_flaps(moments):
    switch, now, returns = begin(0.0), 0.0, []
    for said, seconds in moments:
        for _ in range(seconds):
            before, switch = switch, decide(switch, said, DEFAULTS, now)
            order = list(Plane)
            if switch.plane is FILE:
                assert said.spool != "loses"
                assert said.full_in is None or said.full_in >= 120
            if before.plane is not FILE and switch.plane is FILE:
                assert said.spool == "takes"
            if order.index(switch.plane) < order.index(before.plane):
                is_forced = said.spool == "loses" or (said.full_in is not None and said.full_in < 120)
                assert is_forced or now - before.since >= 30
                assert order.index(before.plane) - order.index(switch.plane) == 1
                returns.append(now)
            if switch.plane != before.plane:
                assert switch.since == now
                assert bool(switch.why) is (switch.plane is not STREAM)
            else:
                assert switch.since == before.since
            now += 1
    assert len(returns) <= 2 + now / 15


def test_a_clock_that_is_set_back_only_delays_a_return():
    switch = looks(begin(1000.0), 1000, 20, **SILENT)
    switch = looks(switch, 500, 30)
    assert switch.plane is BOTH
    assert looks(switch, 530, 600).plane is STREAM


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"lag": "10 s"}, "lag_back (0:00:40) is not less than lag (0:00:10)"),
        ({"wait_file": "20 s"}, "wait (0:00:30) is not less than wait_file (0:00:20)"),
        ({"dwell": "-1 s"}, "dwell"),
        ({"patience": "1 s"}, "patience"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(said, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        config.checked(said, Switching)


def test_limits_are_times_as_elsewhere():
    assert config.checked({"lag": "2 min"}, Switching).lag.total_seconds() == 120
