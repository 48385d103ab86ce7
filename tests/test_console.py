import io
import re

import numpy as np
import pytest
from rich.console import Console

from stream.messages import FrameBatch, Result, RunStart, RunStop
from stream.sinks.console import ConsoleSink

TAU = 1e-3 * np.array([1, 2, 4, 8, 16, 32, 64, 128])
Q = [0.001, 0.002]


class Screen:
    def __init__(self, *, terminal=False, width=100, height=25):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=width, height=height)

    @property
    def raw(self):
        return self.file.getvalue()

    @property
    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw)


def start(run="run-1", **metadata):
    return RunStart(
        run=run, shape=(100, 200), dtype="<u2", frame_time=1e-3, count_time=1e-3, metadata={"n_frames": 4000} | metadata
    )


def stop(exit_status="success"):
    return RunStop(run="run-1", n_frames=4000, exit_status=exit_status)


def ledger(n_frames, run="run-1", *, final=False, lag=0.012, **counts):
    names = ("sent", "received", "lost", "late", "duplicate", "undecodable", "stray")
    arrays = {name: np.array(counts.get(name, 0)) for name in names} | {"lag": np.array(lag)}
    return Result(run=run, operator="ledger", n_frames=n_frames, final=final, arrays=arrays)


def multitau(g2=1.25, err=0.0021, pairs=1000.0, n_dynamic=2):
    arrays = {
        "tau": TAU,
        "g2": np.full((len(TAU), n_dynamic), g2),
        "g2_err": np.full((len(TAU), n_dynamic), err),
        "n_pairs": np.broadcast_to(pairs, TAU.shape),
    }
    return Result(run="run-1", operator="multitau", n_frames=2000, final=False, arrays=arrays)


def shown(*outputs, q=Q, is_live=True, **screen):
    screen = Screen(**screen)
    with ConsoleSink(screen.console, q=q, is_live=is_live) as sink:
        for output in outputs:
            sink.write(output)
        sink.flush()
    return screen


def test_without_a_terminal_there_is_a_line_and_a_summary_at_the_end():
    lines = shown(start(), ledger(2000, received=1990, lost=10), stop()).text.splitlines()
    assert lines[0].startswith("run run-1: 2000 of 4000 frames, ")
    assert lines[0].endswith("lag 12 ms, 10 lost")
    assert lines[1].startswith("╭─ run run-1 ")
    assert lines[-1].endswith(" complete ─╯")


def test_without_a_terminal_lines_are_a_second_apart():
    lines = shown(start(), *(ledger(n) for n in range(100))).text.splitlines()
    assert len(lines) == 1


def test_without_a_terminal_nothing_moves_the_cursor():
    assert "\x1b" not in shown(start(), multitau(), ledger(2000), stop()).raw


def test_a_terminal_is_drawn_over_in_place():
    screen = shown(start(), multitau(), ledger(1000), ledger(2000), stop(), terminal=True)
    assert "\x1b[2K" in screen.raw
    assert "2,000 of 4,000 frames" in screen.text
    assert "complete" in screen.text


def test_the_cursor_is_given_back_when_a_run_is_cut_off():
    assert shown(start(), ledger(1000), terminal=True).raw.endswith("\x1b[?25h")


def test_g2_stands_at_its_q_and_delay_with_the_uncertainty_of_the_last_digits():
    text = shown(start(), multitau(g2=1.25, err=0.0021), stop()).text
    assert re.search(r"q \(1/Å\) +1 ms .* 128 ms", text)
    assert re.search(r"0\.001 +1\.2500\(21\)", text)
    assert re.search(r"0\.002 +1\.2500\(21\)", text)


@pytest.mark.parametrize(
    ("g2", "err", "written"),
    [
        (1.25, 0.0021, "1.2500(21)"),
        (1.25, 0.0996, "1.25(10)"),
        (1.25, 0.00996, "1.250(10)"),
        (1.25, 1e-7, "1.2500(1)"),
        (1.25, np.nan, "1.2500"),
        (1.25, 0.0, "1.2500"),
        (1.25, 7.0, "1.2500"),
        (np.nan, np.nan, "–"),
    ],
)
def test_values_are_written_in_short(g2, err, written):
    row = next(line for line in shown(start(), multitau(g2, err), stop()).text.splitlines() if "0.001" in line)
    assert f" {written} " in row


def test_delays_with_few_pairs_are_pale():
    many = shown(start(), multitau(pairs=32.0), stop(), terminal=True).raw
    few = shown(start(), multitau(pairs=31.0), stop(), terminal=True).raw
    assert "\x1b[2m1.2500(21)" not in many
    assert "\x1b[2m1.2500(21)" in few


def test_delays_without_pairs_are_not_shown():
    pairs = np.array([9, 9, 9, 9, 9, 0, 0, 0])
    text = shown(start(), multitau(pairs=pairs), stop()).text
    assert "16 ms" in text
    assert "128 ms" not in text


def rows_of(n_dynamic, **screen):
    text = shown(start(), multitau(n_dynamic=n_dynamic), stop(), q=np.linspace(0.01, 0.3, n_dynamic), **screen).text
    return [line for line in text.splitlines() if "1.2500(21)" in line], text


def test_all_of_a_dozen_q_are_shown():
    rows, text = rows_of(12)
    assert len(rows) == 12
    assert "not shown" not in text


def test_of_more_q_than_fit_some_are_shown_with_the_first_and_the_last_and_the_others_are_counted():
    rows, text = rows_of(30, height=24)
    assert 12 <= len(rows) < 24
    assert "0.01 " in rows[0]
    assert "0.3 " in rows[-1]
    assert f"{30 - len(rows)} more q are not shown" in text
    assert len(text.splitlines()) <= 24 + 1  # the line with the frames is not of the display


def test_all_q_that_fit_are_shown():
    assert len(rows_of(30, height=60)[0]) == 30


@pytest.mark.parametrize(("seconds", "told"), [(0.012, "lag 12 ms"), (3500.0, "lag 58.3 min"), (3601.0, "lag –")])
def test_a_lag_that_cannot_be_is_not_told(seconds, told):
    assert told in shown(start(), ledger(1000, lag=seconds), stop()).text


def test_frames_of_a_file_have_no_lag():
    assert "lag –" in shown(start(), ledger(1000, lag=0.012), stop(), is_live=False).text


def test_a_bin_whose_q_is_unknown_is_shown_by_its_number():
    assert "bin 2" in shown(start(), multitau(), stop(), q=[0.001, np.nan]).text


def test_losses_stand_out_and_zeros_do_not():
    raw = shown(start(), ledger(2000, lost=1234), stop(), terminal=True).raw
    assert "\x1b[1;33mlost 1,234" in re.sub(r"\x1b\[0m", "", raw)
    assert "33mlate 0" not in raw


def test_the_table_fits_a_narrow_terminal():
    text = shown(start(), multitau(), stop(), width=60).text
    assert max(map(len, text.splitlines())) <= 60
    assert "…" not in text
    assert "1.2500(21)" in text


@pytest.mark.parametrize(("exit_status", "word"), [("success", "complete"), ("abort", "aborted"), ("fail", "failed")])
def test_how_a_run_ended_is_told(exit_status, word):
    assert word in shown(start(), stop(exit_status)).text


def test_without_a_plan_the_frames_are_counted():
    text = shown(start(n_frames=None), ledger(2000), stop()).text
    assert "run run-1: 2000 frames" in text
    assert "2,000 frames" in text


def test_frames_and_other_runs_are_left_out():
    frames = FrameBatch(run="run-1", first=0, frames=np.zeros((1, 2, 2), np.uint16), timestamp_ns=0)
    assert shown(ledger(1), frames, stop()).text == ""
    assert "999" not in shown(start(), frames, ledger(999, run="other"), stop()).text


def test_one_run_after_the_other_is_shown():
    second = RunStop(run="run-2", n_frames=1, exit_status="success")
    text = shown(start(), multitau(), stop(), start("run-2"), second).text
    assert text.count("complete") == 2
    assert text.count("q (1/Å)") == 1
