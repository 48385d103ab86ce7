"""What is done with the disk for runs that go by file."""

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Event, Thread

import pytest

from hpc_bridge.bulk import Hash, Release
from hpc_bridge.bulk_disk import Disk, DropFolder, Failed, Hashed, Released
from hpc_bridge.bulk_files import known, runs_of
from hpc_bridge.bulk_record import Origin, Run, Stage

WITHIN = 30


@pytest.fixture
def disk():
    disk = Disk()
    yield disk
    disk.close()


@pytest.fixture
def run(tmp_path):
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).write_bytes(os.urandom(10_000))
    return Run(
        beamline="8idi", name="one", run="one", origin=Origin.STREAM, lost=False, folder=PurePosixPath(tmp_path),
        files=(known(tmp_path / "a.h5"), known(tmp_path / "b.h5")), asked=None, priority=0, created=0.0, deadline=1e12,
        stage=Stage.HASHING, since=0.0, refused={},
    )  # fmt: skip


def test_files_are_read_for_what_they_are_now(disk, run, tmp_path):
    (tmp_path / "b.h5").write_bytes(b"grown since it was seen")
    disk.order(Hash(run))
    hashed = disk.answers.get(timeout=WITHIN)
    assert isinstance(hashed, Hashed)
    assert hashed.is_all
    for file in hashed.files:
        content = (tmp_path / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_file_that_was_read_and_has_not_changed_is_not_read_again(disk, run):
    read = replace(run.files[0], sha256="f" * 64)
    disk.order(Hash(replace(run, files=(read, run.files[1]))))
    assert disk.answers.get(timeout=WITHIN).files[0].sha256 == "f" * 64
    changed = replace(read, mtime_ns=0)
    disk.order(Hash(replace(run, files=(changed, run.files[1]))))
    assert disk.answers.get(timeout=WITHIN).files[0].sha256 != "f" * 64


def test_a_file_that_is_still_written_is_not_taken(disk, run, tmp_path):
    file, is_over = tmp_path / "a.h5", Event()
    file.write_bytes(bytes(50_000_000))

    def write():
        with file.open("ab", buffering=0) as growing:
            while not is_over.is_set():
                growing.write(b"more")
                time.sleep(0.001)

    writer = Thread(target=write)
    writer.start()
    disk.order(Hash(run))
    answer = disk.answers.get(timeout=WITHIN)
    is_over.set()
    writer.join()
    assert answer == Failed(run.key, f"{file}: it is still written")


def test_what_cannot_be_read_says_so_and_others_are(disk, run, tmp_path):
    gone = replace(run, name="gone", priority=1, files=(replace(run.files[0], name="gone.h5"),))
    disk.order(Hash(gone))
    disk.order(Hash(run))
    answers = {answer.key[1]: answer for answer in (disk.answers.get(timeout=WITHIN) for _ in range(2))}
    assert answers["gone"].why == f"{tmp_path}/gone.h5: No such file or directory"
    assert answers["one"].is_all


@pytest.mark.parametrize("name", ["pipe.h5", "a\0b.h5", "folder.h5"])
def test_what_is_no_file_is_not_opened_and_others_are_read(disk, run, tmp_path, name):
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "folder.h5").mkdir()
    disk.order(Hash(replace(run, name="odd", priority=1, files=(replace(run.files[0], name=name),))))
    disk.order(Hash(run))
    answers = {answer.key[1]: answer for answer in (disk.answers.get(timeout=WITHIN) for _ in range(2))}
    assert str(tmp_path) in answers["odd"].why
    assert answers["one"].is_all


def test_neither_other_beamlines_nor_the_spool_wait_until_a_long_run_is_read(disk, run, tmp_path):
    with (tmp_path / "a.h5").open("wb") as long:
        long.truncate(2 * 10**12)
    disk.order(Hash(run))
    disk.order(Hash(replace(run, beamline="4id", files=run.files[1:])))
    disk.order(Release(run))
    answers = [disk.answers.get(timeout=WITHIN) for _ in range(2)]
    assert {(type(answer), answer.key[0]) for answer in answers} == {(Hashed, "4id"), (Released, "8idi")}


def test_a_run_that_is_gone_from_its_spool_needs_no_release_but_a_spool_that_is_away_is_waited_for(disk, run, tmp_path):
    disk.order(Release(replace(run, folder=PurePosixPath(tmp_path / "gone"))))
    assert disk.answers.get(timeout=WITHIN) == Released(run.key)
    disk.order(Release(replace(run, folder=PurePosixPath(tmp_path / "spool" / "one"))))
    assert isinstance(disk.answers.get(timeout=WITHIN), Failed)


def test_a_run_in_the_spool_is_released_by_a_file(disk, run, tmp_path):
    disk.order(Release(run))
    assert disk.answers.get(timeout=WITHIN) == Released(run.key)
    assert (tmp_path / "safe").exists()


def test_a_file_in_the_drop_folder_is_told_of_when_it_grows_no_more(tmp_path):
    found = SimpleQueue()
    file = tmp_path / "one.h5"
    file.write_bytes(b"1")
    drop = DropFolder("8idi", tmp_path, found, still=2.0)
    for _ in range(8):  # it grows for longer than it has to be still
        with file.open("ab") as growing:
            growing.write(b"1")
        with pytest.raises(Empty):
            found.get(timeout=0.5)
    assert found.get(timeout=WITHIN).files == (known(file),)
    with pytest.raises(Empty):
        found.get(timeout=1.5)
    file.write_bytes(b"another one")
    assert found.get(timeout=WITHIN).files == (known(file),)
    drop.close()


def test_a_drop_folder_may_come_later(tmp_path):
    found = SimpleQueue()
    drop = DropFolder("8idi", tmp_path / "drop", found, still=0.1)
    with pytest.raises(Empty):
        found.get(timeout=0.5)
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop" / "one.h5").write_bytes(b"1")
    assert found.get(timeout=WITHIN).run == "one"
    drop.close()


def test_whatever_lies_in_a_drop_folder_the_files_of_runs_there_are_taken(tmp_path, caplog):
    (tmp_path / "secret").write_bytes(b"of others")
    drop = tmp_path / "drop"
    drop.mkdir()
    (drop / "a.h5").symlink_to(tmp_path / "gone")
    (drop / "b.h5").symlink_to(tmp_path / "secret")
    os.mkfifo(drop / "c.h5")
    (drop / "d.h5").mkdir()
    Path(os.fsdecode(bytes(drop) + b"/e\xff.h5")).write_bytes(b"1")
    (drop / "f\n.h5").write_bytes(b"1")
    for name in ("one_master.h5", "one_data_000002.h5", "one_data_000001.h5", "two_data_000001.h5", "z.h5"):
        (drop / name).write_bytes(b"1")
    found = SimpleQueue()
    folder = DropFolder("8idi", drop, found, still=0.1)
    runs = {each.run: [file.name for file in each.files] for each in (found.get(timeout=WITHIN) for _ in range(2))}
    folder.close()
    assert runs == {"one": ["one_master.h5", "one_data_000001.h5", "one_data_000002.h5"], "z": ["z.h5"]}
    assert found.empty()
    assert len([record for record in caplog.records if str(drop) in record.getMessage()]) == 6


def test_a_drop_folder_with_many_runs_is_looked_at_once_for_all(tmp_path):
    names = [f"r{i}_{part}.h5" for i in range(3000) for part in ("master", "data_000001", "data_000002")]
    began = time.monotonic()
    assert len(runs_of(names)) == 3000
    assert time.monotonic() - began < 20
