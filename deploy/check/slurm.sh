#!/usr/bin/env bash
# The Slurm scripts on a real Slurm of one node, started here and ended with this script.
# Needs root, two cores, and the development environment (make test, or PYTHON=).
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v slurmctld slurmd munged >/dev/null; then
  apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd munge slurm-client
fi

folder=$(mktemp -d)
chmod 755 "$folder"
export SLURM_CONF=$folder/slurm.conf
stop() {
  local pid
  for name in slurmd slurmctld munged; do
    pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
    kill "$pid" || continue
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done # it writes its state
  done
  rm -rf "$folder"
}
trap stop EXIT

mkdir "$folder/munge" "$folder/state" "$folder/spool"
chown munge: "$folder/munge"
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chown munge: "$folder/munge/key"
chmod 400 "$folder/munge/key"
runuser -u munge -- munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --seed-file="$folder/munge/seed" \
  --pid-file="$folder/munge/pid" --log-file="$folder/munge/log"
ln -s munge/pid "$folder/munged.pid"

host=$(hostname -s)
cat >"$SLURM_CONF" <<END
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
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
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4
END
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 30); do
  [[ $(sinfo --noheader --format=%T) == idle ]] && break
  sleep 1
done
sinfo

if ! output=$(SCALEKD_TEST_SLURM=1 OMP_NUM_THREADS=1 "${PYTHON:-.venv/bin/python}" -m pytest -q -rs tests/deploy/test_deploy_slurm.py); then
  echo "$output"
  tail -n 30 "$folder/slurmctld.log" "$folder/slurmd.log" >&2
  exit 1
fi
echo "$output"
if grep -q skipped <<<"$output"; then
  echo "slurm: a test was skipped, see above" >&2
  exit 1
fi
