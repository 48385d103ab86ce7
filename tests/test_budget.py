"""What an account has left."""

import pytest

from hpc_bridge import budget
from hpc_bridge.budget import Difference
from hpc_bridge.config import Account
from hpc_bridge.errors import BudgetExceeded
from hpc_bridge.leases import Leases
from hpc_bridge.scheduler import Usage

HOUR = 3600.0
ACCOUNT = Account(account="xpcs::8id", node_hours=10)


@pytest.fixture
def leases(tmp_path):
    with Leases.open(tmp_path / "leases") as leases:
        yield leases


def ran(leases, job_id, started=None, ended=None, walltime=HOUR, nodes=1):
    lease = leases.begin(
        beamline="8ID", site="s", queue="q", account="a", walltime=walltime, nodes=nodes, now=started or 0.0
    ).lease
    leases.submitted(lease, job_id, started or 0.0)
    if started is not None:
        leases.started(lease, started, "n1")
    return leases.get(lease) if ended is None else leases.ended(lease, ended, "done")


def test_a_request_that_just_fits_is_let_through():
    budget.check(ACCOUNT, site="polaris", used_s=4 * HOUR, committed_s=5 * HOUR, request_s=HOUR)


def test_one_that_does_not_is_refused_with_the_account_and_the_numbers():
    with pytest.raises(BudgetExceeded) as refused:
        budget.check(ACCOUNT, site="polaris", used_s=4 * HOUR, committed_s=5.5 * HOUR, request_s=HOUR)
    said = (
        "account xpcs::8id at polaris has 0.50 of 10 node hours left (4.00 used, 5.50 promised to jobs that are there)"
    )
    assert str(refused.value) == f"{said}, 1.00 are asked for"


def test_an_account_without_a_limit_covers_all():
    budget.check(Account(account="a"), site="polaris", used_s=1e12, committed_s=1e12, request_s=1e12)


def test_a_lease_uses_its_nodes_from_start_to_end(leases):
    assert budget.used(ran(leases, "1"), now=500.0) == 0
    assert budget.used(ran(leases, "2", started=100.0, nodes=2), now=500.0) == 800
    assert budget.used(ran(leases, "3", started=100.0, ended=200.0), now=500.0) == 100
    assert budget.used(ran(leases, "4", started=100.0), now=9 * HOUR) == HOUR


def test_promised_is_what_is_left_of_walltimes(leases):
    waits, runs = ran(leases, "1"), ran(leases, "2", started=100.0, nodes=2)
    over = ran(leases, "3", started=100.0, ended=200.0)
    assert budget.committed([waits, runs, over], now=500.0) == HOUR + 2 * (HOUR - 400)


def test_used_and_promised_are_together_the_walltime_at_any_moment(leases):
    lease = ran(leases, "1", started=100.0)
    for now in (50.0, 100.0, 1000.0, 3 * HOUR):
        assert budget.used(lease, now) + budget.committed([lease], now) == HOUR


def usage(job_id, node_seconds):
    return Usage(id=job_id, name=f"xb-8ID-{job_id}", account="a", node_seconds=node_seconds)


def test_jobs_are_told_of_which_record_and_scheduler_count_differently(leases):
    same = ran(leases, "1", started=0.0, ended=1000.0)
    less = ran(leases, "2", started=0.0, ended=1000.0)
    lost = ran(leases, "3", started=0.0, ended=1000.0)
    idle = ran(leases, "4", ended=1000.0)
    rows = [usage("1", 1010.0), usage("2", 1900.0), usage("5", 300.0), usage("6", 0.0)]
    assert budget.differences([same, less, lost, idle], rows, now=2000.0) == [
        Difference(job_id="2", lease=less.lease, ours=1000.0, theirs=1900.0),
        Difference(job_id="3", lease=lost.lease, ours=1000.0, theirs=None),
        Difference(job_id="5", lease=None, ours=None, theirs=300.0),
    ]
