"""Files by copying them, and by rsync, whose far end is this machine: its remote shell is a script, no ssh."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import pytest
from pydantic import ValidationError

from hpc_bridge.transfer import File, Place, State
from hpc_bridge.transfer_copy import Copy
from hpc_bridge.transfer_here import Here
from hpc_bridge.transfer_record import Moves
from hpc_bridge.transfer_rsync import Rsync
from tests.transfers import WITHIN, Driven, make_request

CHILD = """
import sys, threading, time
from pathlib import Path
from hpc_bridge.transfer import Request
from hpc_bridge.transfer_copy import Copy
from hpc_bridge.transfer_here import Here
from hpc_bridge.transfer_mover import Mover
from hpc_bridge.transfer_record import Moves
from hpc_bridge.transfer_rsync import Rsync
from hpc_bridge.transfer_run import run

path, request, *shell = sys.argv[1:]
with Here(Rsync(shell) if shell else Copy()) as transfer, Moves.open(Path(path)) as moves:
    mover = Mover(moves, transfer.most_active, poll=0.02, backoff=0.05)
    mover.add(Request.model_validate_json(request), 0, time.time())
    run(mover, transfer, threading.Event(), until_done=True)
"""


@pytest.fixture
def shell(tmp_path):
    """As ssh does, it has a shell read the words after the host."""
    script = tmp_path / "shell"
    script.write_text(
        '#!/bin/sh\n[ "$1" = gone ] && { echo "no route to host" >&2; exit 255; }\nshift\nexec sh -c "$*"\n'
    )
    script.chmod(0o755)
    return (str(script),)


@pytest.fixture(params=["copy", "rsync"])
def way(request, shell):
    return Copy() if request.param == "copy" else Rsync(shell)


@pytest.fixture
def driven(way, tmp_path):
    with Here(way) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        yield driven
        driven.moves.close()


@pytest.fixture
def request_of(way, tmp_path):
    def request_of(run="42", host="here", **changes):
        endpoint = "" if isinstance(way, Copy) else host
        there = Place(endpoint=endpoint, path=PurePosixPath(tmp_path / "it's there" / run))
        return make_request(tmp_path, run, destination=there, **changes)

    return request_of


def source(request):
    return Path(request.source.path / request.files[0].name)


def arrived(request):
    return Path(request.destination.path / request.files[0].name)


def change_a_byte(path):
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def has_arrived(request):
    return all(
        Path(request.source.path / file.name).read_bytes() == Path(request.destination.path / file.name).read_bytes()
        for file in request.files
    )


def left_over(request):
    """Files at the destination that were not asked for."""
    found = {path for path in Path(request.destination.path).rglob("*") if path.is_file()}
    return found - {Path(request.destination.path / file.name) for file in request.files}


def test_files_arrive_whole_and_nothing_else_does(driven, request_of):
    request = request_of(sizes=(5_000_000, 0, 17))
    done = driven.until_done(driven.add(request))
    assert has_arrived(request)
    assert not left_over(request)
    assert (done.files, done.bytes) == (3, 5_000_017)


def test_a_byte_that_changed_on_the_way_is_sent_again(driven, request_of):
    request = request_of()
    move = driven.add(request)
    driven.until(lambda: driven.moves.get(move).message.startswith("arrived"))
    change_a_byte(arrived(request))
    driven.until_said(move, "on arrival", "42.h5")
    assert not driven.moves.get(move).may_release
    assert driven.until_done(move).attempt == 2
    assert has_arrived(request)


def test_a_source_that_is_not_what_was_written_never_counts_as_arrived(driven, request_of, way):
    request = request_of()
    change_a_byte(source(request))
    move = driven.add(request)
    driven.until(lambda: driven.moves.get(move).attempt == 3)
    assert not driven.moves.get(move).may_release
    assert isinstance(way, Rsync) or not arrived(request).exists()


def test_a_source_that_is_gone_is_told_by_name_and_tried_until_the_deadline(driven, request_of, tmp_path):
    request = request_of(within=5000)
    elsewhere = source(request).rename(tmp_path / "elsewhere")
    move = driven.add(request)
    driven.until_said(move, "42.h5")
    driven.until(lambda: driven.moves.get(move).attempt >= 3)
    driven.step(5000)
    over = driven.until_over(move)
    assert over.state is State.FAILED
    assert "deadline" in over.message
    elsewhere.rename(source(request))
    driven.add(request.model_copy(update={"deadline": driven.now + 5000}))
    driven.until_done(move)
    assert has_arrived(request)


def test_a_copy_that_was_begun_goes_on_where_it_was(tmp_path):
    request = make_request(tmp_path, sizes=(9_000_000,))
    content = source(request).read_bytes()
    with Here(Copy()) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        part = begun_copy(driven, request, content[:8_000_000])
        move = driven.add(request)
        assert driven.until_done(move).bytes == 1_000_000
        driven.moves.close()
    assert has_arrived(request)
    assert not part.exists()


def test_a_copy_that_was_begun_with_something_else_is_begun_anew(tmp_path):
    request = make_request(tmp_path, sizes=(9_000_000,))
    with Here(Copy()) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        begun_copy(driven, request, bytes(8_000_000))
        move = driven.add(request)
        assert driven.until_done(move).faults == 1
        driven.moves.close()
    assert has_arrived(request)
    assert not left_over(request)


def begun_copy(driven, request, content):
    """Leave what a copy leaves that was killed: find its name by one whose source was cut short."""
    whole = source(request).read_bytes()
    source(request).write_bytes(whole[:10])
    first = driven.add(request.model_copy(update={"run": "first"}))
    driven.until(lambda: driven.moves.get(first).attempt == 2)
    driven.mover.cancel(first, "only to see the name")
    driven.until_over(first)
    source(request).write_bytes(whole)
    [part] = left_over(request)
    part.write_bytes(content)
    return part


def test_who_cancels_leaves_no_file_that_looks_whole(driven, request_of):
    request = request_of(sizes=(100_000_000,))
    move = driven.add(request)
    driven.until(lambda: driven.moves.get(move).task is not None)
    driven.mover.cancel(move, "the sample was upside down")
    over = driven.until_over(move)
    assert (over.state, over.may_release) == (State.CANCELED, False)
    assert not arrived(request).exists()


def test_whoever_is_killed_goes_on(way, shell, request_of, tmp_path):
    request = request_of(sizes=(150_000_000,))
    words = [sys.executable, "-c", CHILD, str(tmp_path / "moves"), request.model_dump_json()]
    words += [] if isinstance(way, Copy) else shell
    with subprocess.Popen(words) as first:
        end = time.monotonic() + WITHIN
        while not any(part.stat().st_size for part in left_over(request)):
            assert time.monotonic() < end
            assert first.poll() is None
            os.sched_yield()
        first.send_signal(signal.SIGKILL)
    assert not arrived(request).exists()
    subprocess.run(words, check=True, timeout=WITHIN)
    with Moves.look(tmp_path / "moves") as moves:
        [move] = moves.all()
    assert move.may_release
    assert has_arrived(request)


def test_the_same_document_again_is_the_same_task(way, request_of):
    with Here(way) as transfer:
        document = transfer.prepare(request_of(), "a name")
        first = transfer.submit(document)
        assert transfer.submit(document) == transfer.find(document) == first
        while not transfer.progress(first).state.is_final:
            os.sched_yield()
        transfer.submit(document)
        assert transfer.progress(first).state is State.DONE


def test_a_machine_that_cannot_be_reached_loses_nothing(shell, tmp_path):
    there = Place(endpoint="gone", path=PurePosixPath(tmp_path / "there"))
    with Here(Rsync(shell)) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        move = driven.add(make_request(tmp_path, destination=there))
        driven.until_said(move, "no route to host")
        assert driven.moves.get(move).ended is None
        driven.moves.close()


def test_rsync_brings_files_back_and_reads_them_again(shell, tmp_path):
    there = Place(endpoint="host", path=PurePosixPath(tmp_path / "data" / "42"))
    request = make_request(tmp_path, source=there)
    with Here(Rsync(shell)) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        move = driven.add(request)
        driven.until(lambda: driven.moves.get(move).message.startswith("arrived"))
        change_a_byte(arrived(request))
        assert driven.until_done(move).attempt == 2
        driven.moves.close()
    assert has_arrived(request)


@pytest.mark.parametrize(("way", "there"), [(Copy(), "host"), (Rsync(), "")])
def test_a_way_that_does_not_lead_there_says_so(way, there, tmp_path):
    place = Place(endpoint=there, path=PurePosixPath(tmp_path / "there"))
    with Here(way) as transfer:
        driven = Driven(tmp_path / "moves", transfer)
        over = driven.until_over(driven.add(make_request(tmp_path, destination=place)))
        driven.moves.close()
    assert over.state is State.FAILED
    assert there in over.message


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", ".", "", "a\nb", "a\0b", "a\\b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name):
    with pytest.raises(ValidationError):
        File(name=name, size=1, sha256="0" * 64)


@pytest.mark.parametrize(
    ("endpoint", "path"), [("", "data"), ("", "/a/../b"), ("-oProxyCommand=x", "/data"), ("a b", "/d")]
)
def test_a_place_that_is_none_is_refused(endpoint, path):
    with pytest.raises(ValidationError):
        Place(endpoint=endpoint, path=PurePosixPath(path))
