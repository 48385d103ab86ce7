"""Nodes come, go, and are replaced, with a real Slurm, real workers and a real Kafka; the result never changes."""

import json
import os
import random
import signal
import time
import uuid
from contextlib import ExitStack, closing, suppress

import pytest

from hpc_bridge.leases import Leases
from tests.bridge import Bridge, processes, stand_in, worker
from tests.plane import Plane
from tests.slurm import ACCOUNT, SMALL_ACCOUNT
from tests.test_kill import N_FRAMES, assert_identical, frames, qmap, result_of_frames

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]

CYCLES = int(os.environ.get("HPC_BRIDGE_CYCLES", "4"))
"""Of up and down with faults, here, and a sixth as many on Slurm. 200 take an hour: once in a while."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, qmap):
    return result_of_frames(tmp_path_factory.mktemp("undisturbed"), qmap, range(N_FRAMES))


@pytest.fixture
def plane(broker, tmp_path, qmap):
    with ExitStack() as stack:
        yield Plane(f"kafka://{broker.bootstrap}/beamline-{uuid.uuid4().hex[:8]}", stack, tmp_path, qmap)


@pytest.fixture
def on_slurm(slurm, tmp_path):
    """Makes a `Bridge` of that Slurm."""
    with ExitStack() as stack:

        def make(command, **options):
            bridge = Bridge(tmp_path, command, scheduler="slurm", through=slurm.through, **options)
            return stack.enter_context(closing(bridge))

        yield make
        stack.close()
        slurm.clear()


def there(slurm):
    """Jobs that wait or run."""
    return {job for job, state in slurm.squeue().items() if state in ("RUNNING", "PENDING")}


def test_nodes_that_a_demand_job_takes_are_replaced_and_the_result_is_the_same(
    slurm, on_slurm, plane, frames, undisturbed
):
    queues = [{"name": "preemptable", "walltime": "10 min", "max_jobs": 8, "options": ["--exclusive"]}]
    bridge = on_slurm(worker(plane.address, plane.qmap, plane.folder), nodes=4, max_nodes=6, queues=queues)
    bridge.up()
    plane.replay(frames, "60 Hz")
    merger = plane.merger()
    before = {pilot["lease"] for pilot in bridge.until_serving(4)}
    asked = time.time()
    job = slurm.sbatch("-p", "demand", "-N", "2", "--exclusive", script="date +%s.%N; exec sleep 5")
    bridge.until(lambda: (slurm.work / f"slurm-{job}.out").is_file() and (slurm.work / f"slurm-{job}.out").read_text())
    began = float((slurm.work / f"slurm-{job}.out").read_text().split()[0])
    assert began - asked < 10  # not the 15 s of grace that Slurm gives
    # New jobs, not those requeued.
    bridge.until(lambda: len(now := bridge.pilots()) == 4 and len({pilot["lease"] for pilot in now} - before) >= 2)
    assert_identical(plane.result(merger), undisturbed)


def test_a_node_that_is_lost_with_all_on_it_is_replaced_long_before_slurm_notices(
    slurm, on_slurm, plane, frames, undisturbed
):
    bridge = on_slurm(worker(plane.address, plane.qmap, plane.folder), nodes=2, max_nodes=3, lost_after="5 s")
    bridge.up()
    plane.replay(frames, "60 Hz")
    merger = plane.merger()
    lost, other = bridge.until_serving(2)
    node = slurm.run("squeue", "-h", "-j", lost["job"], "-o", "%N").strip()
    slurm.lose_node(node)
    at = time.monotonic()
    bridge.until(lambda: {pilot["lease"] for pilot in bridge.pilots()} - {lost["lease"], other["lease"]})
    assert time.monotonic() - at < 60
    assert_identical(plane.result(merger), undisturbed)
    slurm.start_node(node)


def test_a_controller_that_is_away_for_a_while_costs_no_job_and_doubles_none(slurm, on_slurm):
    bridge = on_slurm(stand_in(), nodes=2, max_nodes=3)
    bridge.up()
    before = bridge.until_serving(2)
    slurm.stop_controller()
    bridge.until(lambda: "cannot be reached" in bridge.log())
    assert [pilot["lease"] for pilot in bridge.pilots()] == [pilot["lease"] for pilot in before]
    time.sleep(15)  # that it is away that long is what is tested
    slurm.start_controller()
    bridge.until(lambda: "is back" in bridge.log())
    assert [pilot["lease"] for pilot in bridge.pilots()] == [pilot["lease"] for pilot in before]
    assert there(slurm) == {pilot["job"] for pilot in before}


def test_a_manager_that_was_killed_adopts_its_jobs_and_doubles_none(slurm, on_slurm):
    bridge = on_slurm(stand_in(), nodes=3, max_nodes=4)
    manager = bridge.up()
    before = {pilot["job"] for pilot in bridge.until_serving(3)}
    manager.kill()
    manager.wait()
    assert bridge.status() is None
    bridge.up()
    assert {pilot["job"] for pilot in bridge.until_serving(3)} == before
    assert there(slurm) == before


def test_a_manager_that_is_killed_while_it_submits_starts_nothing_twice(slurm, on_slurm):
    bridge = on_slurm(stand_in(), nodes=4, max_nodes=4)
    dice = random.Random(5)
    for _ in range(4):
        manager = bridge.up()
        time.sleep(dice.uniform(0, 0.5))  # a random moment is what is wanted
        manager.kill()
        manager.wait()
    bridge.up()
    bridge.until_serving(4)
    assert len(there(slurm)) == 4


def test_pilots_whose_walltime_ends_hand_over_without_a_gap(on_slurm, plane, frames, undisturbed):
    queues = [{"name": "demand", "walltime": "60 s", "max_jobs": 4}]
    command = worker(plane.address, plane.qmap, plane.folder)
    bridge = on_slurm(command, nodes=1, max_nodes=2, queues=queues, site={"ahead": "30 s"})
    bridge.up()
    plane.replay(frames, f"{N_FRAMES / 120} Hz")
    bridge.until_serving(1)
    result = plane.result(plane.merger(), within=240)
    assert (result["xpcs/ledger/received"], result["xpcs/ledger/lost"]) == (N_FRAMES, 0)
    assert_identical(result, undisturbed)
    assert bridge.log().count("serves in its place") >= 2


def test_more_than_the_account_has_is_refused_at_once_with_the_numbers(on_slurm):
    accounts = {"here": {"account": ACCOUNT, "node_hours": 0.5}}
    bridge = on_slurm(stand_in(), nodes=4, max_nodes=4, accounts=accounts)
    files = [bridge.write("beamline.yaml", bridge.beamline), "--site", bridge.write("site.yaml", bridge.site)]
    refused = bridge.run("up", *files, check=False)
    assert refused.returncode == 1
    assert f"account {ACCOUNT} at here has 0.50 of 0.5 node hours left" in refused.stderr
    assert "0.67 are asked for" in refused.stderr


def test_what_slurm_refuses_is_said_in_its_words(on_slurm):
    queues = [{"name": "preemptable", "walltime": "3 h", "max_jobs": 8, "options": ["--cpus-per-task=2"]}]
    bridge = on_slurm(stand_in(), nodes=1, max_nodes=1, queues=queues, accounts={"here": {"account": SMALL_ACCOUNT}})
    bridge.up()
    bridge.until(lambda: bridge.status()["passed_by"])
    [told] = bridge.status()["passed_by"]
    assert SMALL_ACCOUNT in told["why"]
    assert "policy" in told["why"]


def test_what_a_run_cost_is_what_slurm_accounts(on_slurm):
    bridge = on_slurm(stand_in(), nodes=2, max_nodes=2, accounts={"here": {"account": ACCOUNT}})
    bridge.up()
    bridge.until_serving(2)
    bridge.down()
    [told] = json.loads(bridge.run("costs", "--json").stdout)[bridge.name]["accounts"]
    assert told["account"] == ACCOUNT
    assert told["node_seconds"] == pytest.approx(told["theirs"], abs=15)
    assert told["differences"] == []


@pytest.mark.parametrize("dials", ["pilots", "manager"])
def test_a_site_that_can_be_used_is_proved_and_what_cannot_be_reached_is_said(on_slurm, broker, tmp_path, dials):
    bridge = on_slurm(stand_in(), nodes=1, max_nodes=1)
    if dials == "manager":
        bridge.site["heartbeats"] = {"dials": "manager", "every": "0.5 s", "lost_after": "3 s"}
    files = (bridge.write("site.yaml", bridge.site), "--beamline", bridge.write("beamline.yaml", bridge.beamline))
    command = ("--run", "xpcs-stream --help", "--writable", tmp_path / "checkpoints")
    well = bridge.run("check", *files, *command, "--reach", broker.bootstrap, check=False)
    assert well.returncode == 0, well.stdout + well.stderr
    ill = bridge.run("check", *files, *command, "--reach", "127.0.0.1:1", check=False)
    assert ill.returncode == 1
    [failed] = [line for line in ill.stdout.splitlines() if line.startswith("FAILED")]
    assert "127.0.0.1:1 can be reached" in failed
    assert "Connection refused" in failed


@pytest.mark.timeout(300 + 120 * CYCLES)
@pytest.mark.parametrize(("scheduler", "cycles"), [("local", CYCLES), ("slurm", -(-CYCLES // 6))])
def test_again_and_again_up_and_down_with_faults_leaves_no_job_and_no_lease(scheduler, cycles, request, tmp_path):
    dice = random.Random(11)
    with ExitStack() as stack:
        slurm, options = None, {}
        if scheduler == "slurm":
            slurm = request.getfixturevalue("slurm")
            stack.callback(slurm.clear)
            options = {"scheduler": "slurm", "through": slurm.through}
        bridge = stack.enter_context(closing(Bridge(tmp_path, stand_in(), nodes=2, max_nodes=3, spares=1, **options)))
        address = bridge.site["heartbeats"]["address"]
        for _ in range(cycles):
            manager = bridge.up()
            bridge.until(bridge.pilots)
            for fault in dice.choices(["a pilot", "the manager", "nothing"], k=2):
                if fault == "a pilot":
                    found = bridge.until(lambda: processes(f"--manager {address}"))
                    with suppress(ProcessLookupError):  # one of them may end with another
                        os.kill(dice.choice(found), signal.SIGKILL)
                elif fault == "the manager":
                    manager.kill()
                    manager.wait()
                    manager = bridge.up()
            bridge.down()
            assert manager.wait(90) == 0
            assert processes(f"--manager {address}") == []
            assert slurm is None or there(slurm) == set()
            with Leases.look(bridge.state / "leases.sqlite") as leases:
                assert leases.open_leases() == []
