#!/usr/bin/env bash
# The Slurm scripts on a real Slurm of one node, started here and ended with this script.
# shellcheck source=deploy/check/lib/steps.sh
. "$(dirname "$0")/lib/steps.sh"
[ "$(id -u)" -eq 0 ] || skip "a Slurm of its own needs root"
need slurmctld slurm-wlm slurmctld slurmd munge slurm-client
"$PYTHON" -c 'import pytest' 2>/dev/null || skip "the development environment is missing; run make test first"
cd "$ROOT"

chmod 755 "$WORK"
export SLURM_CONF=$WORK/slurm.conf
stop() {
  local pid
  for name in slurmd slurmctld munged; do
    pid=$(cat "$WORK/$name.pid" 2>/dev/null) || continue
    kill "$pid" || continue
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done # it writes its state
  done
  rm -rf "$WORK"
}
trap stop EXIT

mkdir "$WORK/munge" "$WORK/state" "$WORK/spool"
chown munge: "$WORK/munge"
dd if=/dev/urandom of="$WORK/munge/key" bs=1024 count=1 status=none
chown munge: "$WORK/munge/key"
chmod 400 "$WORK/munge/key"
runuser -u munge -- munged --key-file="$WORK/munge/key" --socket="$WORK/munge/socket" --seed-file="$WORK/munge/seed" \
  --pid-file="$WORK/munge/pid" --log-file="$WORK/munge/log"
ln -s munge/pid "$WORK/munged.pid"

host=$(hostname -s)
cat >"$SLURM_CONF" <<END
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$WORK/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=15
MinJobAge=600
SlurmctldPort=17817
SlurmdPort=17818
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4
END
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
node_is_idle() { [[ $(sinfo --noheader --format=%T) == idle ]]; }
wait_for 30 node_is_idle
sinfo

if ! SCALEKD_TEST_SLURM=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -rs tests/deploy/test_deploy_slurm.py | tee "$WORK/log"; then
  tail -n 30 "$WORK/slurmctld.log" "$WORK/slurmd.log" >&2
  fail "the jobs, see above"
fi
if grep -q skipped "$WORK/log"; then fail "tests were skipped, see above"; fi
