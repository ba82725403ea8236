#!/usr/bin/env bash
# The security audit of the dependencies and of the code, see lib/audit.py.
# shellcheck source=deploy/check/lib/steps.sh
. "$(dirname "$0")/lib/steps.sh"
cd "$ROOT"
code=0
"$PYTHON" "$LIB/audit.py" build/audit | tee "$WORK/log" || code=$?
[ "$code" -ne 3 ] || skip "licences, code and bill of materials are in order; $(tail -n 1 "$WORK/log")"
exit "$code"
