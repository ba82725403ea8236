#!/usr/bin/env bash
# Rules and dashboards against a real Prometheus that scrapes the real service and a real cache job.
# Needs root for apt-get if prometheus is not installed, and the development environment (make test, or PYTHON=).
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v prometheus >/dev/null || apt-get install -y --no-install-recommends prometheus
output=$(OMP_NUM_THREADS=1 "${PYTHON:-.venv/bin/python}" -m pytest -q -rs tests/deploy/test_deploy_monitoring.py)
echo "$output"
if grep -q skipped <<<"$output"; then
  echo "monitoring: a test was skipped, see above" >&2
  exit 1
fi
