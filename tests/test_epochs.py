"""Checkpoints of a region that changes hands."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from stream import checkpoint
from stream.checkpoint import KEPT, Acknowledged, Checkpoint, Epochs, save
from stream.errors import CheckpointError, Superseded


def at(n):
    return Checkpoint(position={"topic:0": n}, running=None)


def files(directory):
    return sorted(path for path in directory.glob("*/*") if path.is_file())


def test_a_region_that_nobody_had_has_no_checkpoint(tmp_path):
    assert Epochs(tmp_path / "region").load() is None


def test_the_next_owner_goes_on_where_the_last_one_was(tmp_path):
    first = Epochs(tmp_path)
    for n in range(5):
        first.save(at(n))
    assert Epochs(tmp_path).load() == at(4)


def test_what_a_former_owner_writes_changes_nothing_and_tells_it_so(tmp_path):
    zombie = Epochs(tmp_path)
    zombie.save(at(1))
    heir = Epochs(tmp_path)
    assert heir.load() == at(1)
    with pytest.raises(Superseded, match="another owner has taken over"):
        zombie.save(at(2))
    heir.save(at(10))
    assert Epochs(tmp_path).load() == at(10)


def test_a_former_owner_that_was_about_to_write_changes_nothing_either(tmp_path, monkeypatch):
    zombie = Epochs(tmp_path)
    zombie.save(at(1))
    heir = Epochs(tmp_path)
    heir.save(at(10))
    monkeypatch.setattr(zombie, "_check_whose", lambda: None)
    zombie.save(at(2))
    assert Epochs(tmp_path).load() == at(10)


def test_a_checkpoint_that_the_next_owner_did_not_find_is_not_acknowledged(tmp_path, monkeypatch):
    found, acknowledged = [], []
    zombie = Acknowledged(Epochs(tmp_path), SimpleNamespace(acknowledge=acknowledged.append))
    zombie.save(at(1))

    def too_late(path, what):
        found.append(Epochs(tmp_path).load())
        save(path, what)

    monkeypatch.setattr(checkpoint, "save", too_late)
    with pytest.raises(Superseded):
        zombie.save(at(2))
    assert (found, acknowledged) == ([at(1)], [at(1).position])


def test_an_owner_that_died_before_its_first_checkpoint_leaves_those_before(tmp_path):
    Epochs(tmp_path).save(at(3))
    Epochs(tmp_path)
    assert Epochs(tmp_path).load() == at(3)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[::-1]])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, caplog, damage):
    owner = Epochs(tmp_path)
    owner.save(at(1))
    owner.save(at(2))
    newest = files(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert Epochs(tmp_path).load() == at(1)
    assert str(newest) in caplog.text


def test_if_all_are_damaged_that_is_an_error_not_a_new_beginning(tmp_path):
    Epochs(tmp_path).save(at(1))
    for path in files(tmp_path):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        Epochs(tmp_path).load()


def test_old_checkpoints_and_epochs_are_removed(tmp_path):
    for _ in range(3):
        owner = Epochs(tmp_path)
        for n in range(5):
            owner.save(at(n))
    assert len(files(tmp_path)) == KEPT
    assert len(list(tmp_path.iterdir())) == 1


def test_no_two_owners_have_the_same_epoch(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        owners = list(pool.map(lambda _: Epochs(tmp_path), range(64)))
    for n, owner in enumerate(owners):
        owner._check_whose = lambda: None
        owner.save(at(n))
    assert len(list(tmp_path.iterdir())) >= 1
    newest = max(owners, key=lambda owner: owner._own.name)
    assert Epochs(tmp_path).load() == at(owners.index(newest))


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="file/region"):
        Epochs(tmp_path / "file" / "region")


class Hands(RuleBasedStateMachine):
    """A region goes from hand to hand; owners may wake up at any time and write what they know."""

    owners = Bundle("owners")

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name)
        self.reached = {}
        self.newest = None
        self.counted = 0

    def teardown(self):
        self.folder.cleanup()

    @initialize(target=owners)
    def first(self):
        return self.take_over()

    @rule(target=owners)
    def take_over(self):
        owner = Epochs(self.directory)
        saved = owner.load()
        self.reached[owner] = 0 if saved is None else saved.position["topic:0"]
        assert self.reached[owner] == self.counted, "nothing that counted is done again or left out"
        self.newest = owner
        return owner

    @rule(owner=owners, frames=st.integers(1, 9))
    def write(self, owner, frames):
        self.reached[owner] += frames
        if owner is self.newest:
            owner.save(at(self.reached[owner]))
            self.counted = self.reached[owner]
        else:
            with pytest.raises(Superseded):
                owner.save(at(self.reached[owner]))

    @rule(owner=consumes(owners))
    def die(self, owner):
        """Without a word; whoever takes over knows what was written last."""

    @invariant()
    def few_files_are_kept(self):
        assert len(files(self.directory)) <= KEPT + 1


TestHands = Hands.TestCase
