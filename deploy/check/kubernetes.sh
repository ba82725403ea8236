#!/usr/bin/env bash
# The Kubernetes jobs: schemas, command lines, and the training job's script as two processes of which one is lost.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=$(SCALEKD_TEST_PODS=1 OMP_NUM_THREADS=1 "${PYTHON:-.venv/bin/python}" -m pytest -q -rs tests/deploy/test_deploy_kubernetes.py)
echo "$output"
if grep -q skipped <<<"$output"; then
  echo "kubernetes: a test was skipped, see above" >&2
  exit 1
fi
