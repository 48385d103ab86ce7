"""A real Slurm of virtual nodes on this machine, for tests; it is gone afterwards, with all that it started."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.kafka import free_ports

DEADLINE = 90

NEEDED = ("slurmctld", "slurmd", "slurmdbd", "sacctmgr", "munged", "mariadbd", "mariadb-install-db", "setpriv")

ACCOUNT, SMALL_ACCOUNT = "aps-8idi", "aps-34ide"
SMALL_CPU_MINUTES = 60

# config_overrides: nodes may have more cores than the machine. cred_expire: a job that is requeued waits as long.
# linuxproc: nothing is mounted. preempt_send_user_signal: a job gets its --signal when it is to go.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=2
MinJobAge=300
JobRequeue=1
RequeueExit=85
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0,preempt_youngest_first
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PriorityType=priority/multifactor
PriorityWeightPartition=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={directory}/munge.socket
AccountingStorageEnforce=associations,limits,qos,safe
PartitionName=DEFAULT Nodes=ALL OverSubscribe=NO State=UP DefaultTime=00:05:00
PartitionName=demand PriorityTier=100 PriorityJobFactor=100 PreemptMode=OFF MaxTime=01:00:00
PartitionName=batch PriorityTier=10 PriorityJobFactor=10 PreemptMode=OFF MaxTime=04:00:00 Default=YES
PartitionName=preemptable PriorityTier=1 PriorityJobFactor=1 PreemptMode=REQUEUE GraceTime=15 MaxTime=72:00:00
"""

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000\n"

ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser=root
LogFile={directory}/slurmdbd.log
PidFile={directory}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""

# DenyOnLimit: what an account cannot pay is refused, rather than waiting for ever.
ACCOUNTS = (
    "add account aps",
    f"add account {ACCOUNT} parent=aps",
    f"add account {SMALL_ACCOUNT} parent=aps GrpTRESMins=cpu={SMALL_CPU_MINUTES}",
    f"add user root account={ACCOUNT},{SMALL_ACCOUNT} DefaultAccount={ACCOUNT}",
    f"add user daemon account={ACCOUNT}",
    "modify qos normal set flags=DenyOnLimit",
)


class Slurm:
    """Partitions demand (it preempts), batch and preemptable (it is preempted, with 15 s of grace), of all nodes.

    Attributes
    ----------
    directory
        Which everybody may read, with logs; `work` in it is where everybody may write.
    environment
        With which Slurm's commands find this Slurm.
    through
        The same, to be put before a command.
    nodes
        Names, of two cores each.
    """

    def __init__(self, directory, n_nodes=4):
        self.directory = Path(directory)
        self.work = self.directory / "work"
        self.nodes = tuple(f"node{i}" for i in range(1, n_nodes + 1))
        self.through = ("env", f"SLURM_CONF={self.directory}/slurm.conf")
        self.environment = os.environ | {"SLURM_CONF": f"{self.directory}/slurm.conf"}
        self._processes = {}

    def start(self):
        """Return when all nodes are idle."""
        host = socket.gethostname().split(".")[0]
        controller, accounting, database, *ports = free_ports(3 + len(self.nodes))
        where = {"directory": self.directory, "host": host, "controller": controller, "accounting": accounting}
        nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(self.nodes, ports, strict=True)]
        self._write("slurm.conf", CONFIGURATION.format(**where) + "".join(nodes))
        self._write("slurmdbd.conf", ACCOUNTING.format(**where, database=database), mode=0o600)
        self._write("cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        self.work.mkdir()
        self.work.chmod(0o1777)
        self._start_munge()
        self._start_database(database)
        self._start("slurmdbd", "slurmdbd", "-D")
        self._until("the accounting answers", lambda: self._says("sacctmgr", "-n", "show", "cluster"))
        for command in ("add cluster tests", *ACCOUNTS):  # slurmctld would not start without its cluster
            self.run("sacctmgr", "-i", *command.split())
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.until_idle()

    def stop(self):
        """End all processes, also those of jobs, and remove the folder."""
        with ExitStack() as last_first:  # whatever one of them raises
            last_first.callback(shutil.rmtree, self.directory)
            for name in ("munged", "mariadbd", "slurmdbd"):
                last_first.callback(self._stop, name)
            for node in self.nodes:
                last_first.callback(self.lose_node, node)
            last_first.callback(self.stop_controller)

    def start_controller(self):
        self._start("slurmctld", "slurmctld", "-D")
        self._until("the controller answers", lambda: self._says("squeue"))

    def stop_controller(self):
        self._stop("slurmctld")

    def start_accounting(self):
        self._start("slurmdbd", "slurmdbd", "-D")
        self._until("the accounting answers", lambda: self._says("sacctmgr", "-n", "show", "cluster"))

    def stop_accounting(self):
        self._stop("slurmdbd")

    def start_node(self, node):
        self._spool(node).mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node, cwd=self._spool(node))

    def lose_node(self, node):
        """Kill a node's daemon and all processes of its jobs, as when the power fails."""
        self._stop(node, signal.SIGKILL)
        while processes := list(self._on(node)):  # those that are being killed may just have begun others
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, DEADLINE)

    def clear(self):
        """Cancel all jobs; return when nothing runs and all nodes are idle."""
        if jobs := self.run("squeue", "-h", "-o", "%i").split():
            self.run("scancel", *jobs)
        self.until_idle()

    def until_idle(self):
        self._until("all nodes are idle", lambda: set(self.run("sinfo", "-h", "-N", "-o", "%t").split()) == {"idle"})

    def squeue(self):
        """Return the states of jobs, also of those over, by id."""
        return dict(line.split() for line in self.run("squeue", "-h", "-t", "all", "-o", "%i %T").splitlines())

    def sbatch(self, *arguments, script="exec sleep 300"):
        """Submit a script of shell; return its id."""
        arguments = ("--parsable", "-t", "1", "-D", self.work, *arguments)
        return self.run("sbatch", *arguments, script=f"#!/bin/bash\n{script}\n").strip()

    def run(self, *command, script=""):
        """Return what one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environment, input=script, capture_output=True, text=True, timeout=DEADLINE
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def _start_munge(self):
        key = self.directory / "munge.key"
        key.touch(0o400)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key} | {
            name: self.directory / f"munge.{name.split('-')[0]}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        }
        self._start("munged", "munged", "--foreground", *(f"--{option}={file}" for option, file in files.items()))
        self._until("munge answers", files["socket"].exists)

    def _start_database(self, port):
        data, temporary = self.directory / "db", self.directory / "db-tmp"
        for folder in (data, temporary):
            folder.mkdir()
            shutil.chown(folder, "mysql", "mysql")
        # A database that starts removes what another one has in their common folder for temporary tables.
        options = ("--no-defaults", f"--datadir={data}", f"--tmpdir={temporary}", "--innodb-log-file-size=8M")
        as_mysql = ("setpriv", "--reuid=mysql", "--regid=mysql", "--init-groups")
        self.run(
            *as_mysql, "mariadb-install-db", *options, "--auth-root-authentication-method=normal", "--skip-test-db"
        )
        first = data / "first.sql"
        first.write_text(
            "create database slurm;\ncreate user slurm@'127.0.0.1' identified by 'slurm';\n"
            "grant all on slurm.* to slurm@'127.0.0.1';\n"
        )
        self._start(
            "mariadbd", *as_mysql, "--pdeathsig=KILL", "mariadbd", *options, f"--port={port}", "--skip-name-resolve",
            "--bind-address=127.0.0.1", f"--socket={data}/socket", f"--init-file={first}",
            "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        said = self.directory / "mariadbd.out"
        self._until("the database answers", lambda: "ready for connections" in said.read_text())

    def _start(self, name, *command, cwd=None):
        with (self.directory / f"{name}.out").open("ab") as output:
            # Should the tests be killed, what they started goes as well.
            self._processes[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig=KILL", *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                cwd=cwd,
                start_new_session=True,
            )

    def _stop(self, name, by=signal.SIGTERM):
        if process := self._processes.pop(name, None):
            process.send_signal(by)
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _on(self, node):
        """Yield the daemons of the node's jobs, which are where its own daemon is, and the jobs' processes."""
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                environment = process.environ()
                of_job = (environment.get("SLURM_CONF"), environment.get("SLURMD_NODENAME"))
                if of_job == (self.environment["SLURM_CONF"], node) or process.cwd() == str(self._spool(node)):
                    yield process
            except psutil.Error:  # it has just ended
                continue

    def _spool(self, node):
        return self.directory / f"spool-{node}"

    def _says(self, *command):
        return subprocess.run(command, env=self.environment, capture_output=True, timeout=DEADLINE).returncode == 0

    def _until(self, what, is_so):
        deadline = time.monotonic() + DEADLINE
        while not is_so():
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} ended: {(self.directory / f'{name}.out').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"
            time.sleep(0.05)

    def _write(self, name, text, mode=0o644):
        file = self.directory / name
        file.touch(mode)
        file.write_text(text)


@contextmanager
def started(**options):
    """Start a Slurm; it stops whatever happens."""
    need_slurm()
    slurm = _on_free_ports(options)
    try:
        yield slurm
    finally:
        slurm.stop()


def _on_free_ports(options, tries=3):
    directory = Path(tempfile.mkdtemp(prefix="xpcs-slurm-"))  # munge wants all folders above it to be root's
    directory.chmod(0o755)
    slurm = Slurm(directory, **options)
    try:
        slurm.start()
    except BaseException as error:
        slurm.stop()
        if tries == 1 or "Address already in use" not in str(error):
            raise
        return _on_free_ports(options, tries - 1)
    return slurm


def need_slurm():
    # .ci/run looks for these words.
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"no Slurm without {', '.join(missing)}")
    if os.geteuid():
        pytest.skip("no Slurm unless by root")
