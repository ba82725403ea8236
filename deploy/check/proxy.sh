#!/usr/bin/env bash
# nginx before the service for real, and the systemd units' command with the system calls that they allow.
# shellcheck source=deploy/check/lib/steps.sh
. "$(dirname "$0")/lib/steps.sh"
need nginx nginx-light
need strace strace
need systemd-analyze systemd
"$PYTHON" -c 'import pytest' 2>/dev/null || skip "the development environment is missing; run make test first"
cd "$ROOT"
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -rs tests/deploy/test_deploy_nginx.py tests/deploy/test_deploy_systemd.py | tee "$WORK/log"
if grep -q skipped "$WORK/log"; then fail "tests were skipped, see above"; fi
