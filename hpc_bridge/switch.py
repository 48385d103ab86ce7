"""Which way frames go from a beamline: over the stream, both ways, or by file only. Pure: it is told what was measured.

The manager looks every second or so::

    switch = begin(now)
    while True:
        switch = decide(switch, Measured(ack_lag=..., heartbeat_age=..., ...), switching, now)
        # switch.plane, switch.why and switch.since are what the gateway is told

stream
    All is well.
stream+file
    Frames may be missing from the results, or are late: the file of the run goes, too. Streaming goes on, since late
    and incomplete results are better than none.
file
    Streaming is of no use: nobody takes the frames, or they are lost again and again on a link that the files need.
    They are in the spool only.

A degradation is at once. A return goes step by step, each after `steady` without complaint and not before `dwell`; on
top of that who complains and who is content again have limits of their own. What is not known changes nothing: a
complaint stays until its own number is good again. Where the spool cannot take the frames they are streamed, whatever
else is wrong: by file only, they would be gone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from math import inf
from typing import Literal

from pydantic import Field, model_validator

from hpc_bridge.section import Section, Time


class Plane(StrEnum):
    """Which way frames go."""

    STREAM = "stream"
    BOTH = "stream+file"
    FILE = "file"


Spool = Literal["takes", "loses", "none"]
"""Whether all that comes is in the spool, it lost frames since the last look, or there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known of a beamline at one moment; None: nothing."""

    ack_lag: float | None = None
    """How old the oldest frame is that no worker has safe (s); 0: all are safe. The gateway's ``ack_lag_s``."""
    lost: int | None = None
    """Records that were lost on the way to the workers since the last look: how much the gateway's ``lost`` grew."""
    spool: Spool | None = None
    full_in: float | None = None
    """How long the spool has room at the rate at which frames come (s); None also where none come."""
    heartbeat_age: float | None = None
    """How long ago the pilot was heard of that was heard of last, of those that serve (s). None: none serves."""
    node_wait: float | None = None
    """How long nodes have been wanted and none serves (s); 0: one serves, or none is wanted."""


class Switching(Section):
    """When frames go which way. Two limits each: one to complain at, and a lower one to be content again."""

    lag: Time = timedelta(seconds=60)
    """Frames that no worker has safe for so long go by file, too. Workers make them safe with their checkpoints: more
    than twice their --checkpoint-every."""
    lag_back: Time = timedelta(seconds=40)
    silent: Time = timedelta(seconds=5)
    """No pilot was heard of for so long: by file, too."""
    silent_back: Time = timedelta(seconds=3)
    silent_file: Time = timedelta(seconds=30)
    """The same: by file only."""
    wait: Time = timedelta(seconds=30)
    """Nodes are wanted for so long and none serves: by file, too. Until then the frames wait in the gateway."""
    wait_file: Time = timedelta(minutes=2)
    """The same: by file only."""
    losing_file: Time = timedelta(minutes=5)
    """Frames are lost again and again for so long: by file only, which leaves the link to the files."""
    apart: Time = timedelta(minutes=1)
    """Losses that are no further apart are one, and over so long after the last: between runs nothing is lost."""
    spool_low: Time = timedelta(minutes=2)
    """The spool is full so soon: no more by file only."""
    spool_back: Time = timedelta(minutes=5)
    """By file only not before the spool has room for so long."""
    steady: Time = timedelta(seconds=10)
    """So long without complaint before a return."""
    dwell: Time = timedelta(seconds=30)
    """At least so long until a return. Where frames are lost each time that they are streamed again, twice as long each
    time, ..."""
    longest: Time = timedelta(minutes=15)
    """... up to this."""
    look: Time = Field(default=timedelta(seconds=1))
    """Between looks."""

    @model_validator(mode="after")
    def _is_sound(self) -> "Switching":
        ordered = (
            ("lag_back", "lag"),
            ("silent_back", "silent"),
            ("silent", "silent_file"),
            ("wait", "wait_file"),
            ("spool_low", "spool_back"),
            ("dwell", "longest"),
        )
        for lower, higher in ordered:
            if getattr(self, lower) >= getattr(self, higher):
                raise ValueError(
                    f"{lower} ({getattr(self, lower)}) is not less than {higher} ({getattr(self, higher)})"
                )
        return self


Complaint = Literal["nodes", "lag", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """Which way frames go, and what must be known of the past to decide further. Times are seconds by one clock."""

    plane: Plane
    why: str
    """For people; empty where all is well."""
    since: float
    """When it became this plane."""
    complaints: frozenset[Complaint] = frozenset()
    """That were made and not taken back."""
    calm_since: float | None = None
    """Since when nothing holds up a return."""
    losing_since: float | None = None
    lost_at: float | None = None
    """When frames were lost last."""
    dwell: float = 0.0
    """How long it was by file only at least, the last time that frames were lost again and again ..."""
    left_at: float = -inf
    """... and when that was over."""
    no_file_before: float = -inf


def begin(now: float) -> Switch:
    """Return the switch of a beamline of which nothing is known."""
    return Switch(plane=Plane.STREAM, why="", since=now)


def decide(switch: Switch, measured: Measured, settings: Switching, now: float) -> Switch:
    """Return the switch after a look.

    Parameters
    ----------
    switch
        As it was after the look before.
    now
        By the clock of `begin` (s).
    """
    if measured.spool == "none":
        why = "the gateway has no spool"
        return switch if switch.why == why else replace(begin(now), why=why)
    heard, news = _heard(switch, measured, settings, now)
    trouble = _trouble_of_the_spool(measured, settings.spool_low)
    if trouble:
        heard = replace(heard, no_file_before=now + settings.dwell.total_seconds())
    if heard.plane is Plane.FILE:
        if trouble:
            return _leave_file(heard, f"streamed again: {trouble}", now)
        if _may_return(heard, settings, now):
            return _leave_file(heard, "streamed again; by file, too, until that has lasted", now)
    elif only_file := _only_file(heard, measured, settings, now):
        trouble = trouble or _trouble_of_the_spool(measured, settings.spool_back)
        if measured.spool == "takes" and not trouble and now >= heard.no_file_before:
            return _enter_file(heard, only_file, settings, now)
        if heard.plane is Plane.STREAM:
            why = f"{only_file}; not by file only: {trouble or _doubt(measured)}"
            return replace(heard, plane=Plane.BOTH, why=why, since=now, calm_since=None)
    elif heard.plane is Plane.STREAM and heard.complaints:
        return replace(heard, plane=Plane.BOTH, why=news, since=now, calm_since=None)
    elif heard.plane is Plane.BOTH and _may_return(heard, settings, now):
        return replace(heard, plane=Plane.STREAM, why="", since=now, calm_since=None)
    return replace(heard, why=news) if news and heard.plane is not Plane.STREAM else heard


def _heard(switch: Switch, measured: Measured, settings: Switching, now: float) -> tuple[Switch, str]:
    """Take the complaints of a look; return the words of the first that is new, too."""
    complaints, news = set(switch.complaints), ""
    for name, words, is_content in _verdicts(switch, measured, settings, now):
        if words and name not in complaints:
            complaints.add(name)
            news = news or words
        elif is_content and not words:
            complaints.discard(name)
    losing_since, lost_at = switch.losing_since, switch.lost_at
    if measured.lost:
        losing_since, lost_at = now if losing_since is None else losing_since, now
    elif measured.lost == 0 and lost_at is not None and now - lost_at > settings.apart.total_seconds():
        losing_since = lost_at = None
    # Where nothing is streamed, nothing can become safe. A pilot that is given up is no more silent, but waited for.
    hold_up = complaints - {"lag"} if switch.plane is Plane.FILE else complaints
    calm_since = None if hold_up or measured.node_wait else now if switch.calm_since is None else switch.calm_since
    heard = replace(
        switch,
        complaints=frozenset(complaints),
        calm_since=calm_since,
        losing_since=losing_since,
        lost_at=lost_at,
    )
    return heard, news


def _verdicts(
    switch: Switch, measured: Measured, settings: Switching, now: float
) -> Iterator[tuple[Complaint, str, bool]]:
    """Yield what each number says: a complaint, or that it is content, or neither."""
    age, wait = measured.heartbeat_age, measured.node_wait
    words = ""
    if wait is not None and wait > settings.wait.total_seconds():
        words = f"nodes have been wanted for {wait:.0f} s and none serves"
    elif age is not None and age > settings.silent.total_seconds():
        words = f"no pilot heard of for {age:.0f} s"
    is_heard = age is not None and age <= settings.silent_back.total_seconds() and not wait
    yield "nodes", words, is_heard or (age is None and wait == 0)

    lost, apart = measured.lost, settings.apart.total_seconds()
    words = f"{lost} {'record' if lost == 1 else 'records'} lost on the way to the workers" if lost else ""
    is_over = switch.plane is Plane.FILE or switch.lost_at is None or now - switch.lost_at > apart
    yield "loss", words, lost == 0 and is_over

    lag = measured.ack_lag if switch.plane is not Plane.FILE else None
    if lag is not None:
        is_late = lag > settings.lag.total_seconds()
        words = f"no worker has the frames of the last {lag:.0f} s safe" if is_late else ""
        yield "lag", words, lag <= settings.lag_back.total_seconds()


def _only_file(switch: Switch, measured: Measured, settings: Switching, now: float) -> str:
    """Return why streaming is of no use, or nothing."""
    age, wait = measured.heartbeat_age, measured.node_wait
    if wait is not None and wait > settings.wait_file.total_seconds():
        return f"nodes have been wanted for {wait:.0f} s and none serves"
    if age is not None and age > settings.silent_file.total_seconds():
        return f"no pilot heard of for {age:.0f} s"
    if measured.lost and _loses_for_long(switch, settings, now):
        return f"frames have been lost on the way to the workers for {_losing_for(switch, now):.0f} s"
    return ""


def _loses_for_long(switch: Switch, settings: Switching, now: float) -> bool:
    return _losing_for(switch, now) >= settings.losing_file.total_seconds()


def _losing_for(switch: Switch, now: float) -> float:
    return 0.0 if switch.losing_since is None else now - switch.losing_since


def _trouble_of_the_spool(measured: Measured, least: timedelta) -> str:
    if measured.spool == "loses":
        return "the spool loses frames"
    if measured.full_in is not None and measured.full_in < least.total_seconds():
        return f"the spool is full in {measured.full_in:.0f} s"
    return ""


def _doubt(measured: Measured) -> str:
    if measured.spool is None:
        return "it is not known whether the spool takes the frames"
    return "the spool did not take them until just now"


def _may_return(switch: Switch, settings: Switching, now: float) -> bool:
    least = max(settings.dwell.total_seconds(), switch.dwell if switch.plane is Plane.FILE else 0.0)
    is_steady = switch.calm_since is not None and now - switch.calm_since >= settings.steady.total_seconds()
    return is_steady and now - switch.since >= least


def _enter_file(switch: Switch, why: str, settings: Switching, now: float) -> Switch:
    dwell = 0.0
    if _loses_for_long(switch, settings, now):
        dwell, longest = settings.dwell.total_seconds(), settings.longest.total_seconds()
        if now - switch.left_at < longest:
            dwell = min(max(dwell, 2 * switch.dwell), longest)
    return replace(switch, plane=Plane.FILE, why=why, since=now, calm_since=None, dwell=dwell)


def _leave_file(switch: Switch, why: str, now: float) -> Switch:
    # What is lost from now on is another matter.
    return replace(
        switch,
        plane=Plane.BOTH,
        why=why,
        since=now,
        calm_since=None,
        losing_since=None,
        lost_at=None,
        left_at=now,
    )
