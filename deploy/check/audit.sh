#!/usr/bin/env bash
# The security audit of the dependencies and of the code, see lib/audit.py.
# shellcheck source=deploy/check/lib/steps.sh
. "$(dirname "$0")/lib/steps.sh"
cd "$ROOT"
make audit
