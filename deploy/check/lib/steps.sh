# shellcheck shell=bash
# Settings and functions of the steps, which begin with: . "$(dirname "$0")/lib/steps.sh"
#
# ROOT is the repository, LIB this folder, WORK a folder of the step's own, removed at its end, PYTHON an interpreter >= 3.11.
set -euo pipefail
LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$LIB/../../.." && pwd)
PYTHON=${PYTHON:-$(command -v "$ROOT/.venv/bin/python" || command -v python3)}
WORK=$(mktemp -d "${TMPDIR:-/tmp}/scalekd-check.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

# skip REASON: leaves the step out.
skip() {
    printf '%s\n' "$*"
    exit 77
}

# fail WHAT: ends the step.
fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}

# part NAME: a heading in the log, with the seconds since the step began.
part() {
    printf -- '-- %s (%d s)\n' "$*" "$SECONDS"
}

# need PROGRAM PACKAGE...: installs Debian packages if a program is missing; skips the step where that is not possible.
need() {
    local program=$1
    shift
    command -v "$program" >/dev/null && return
    [ "$(id -u)" -eq 0 ] || skip "$program is not installed and this is not root; apt-get install $*"
    command -v apt-get >/dev/null || skip "$program is not installed and there is no apt-get; install $*"
    apt_install "$@" || { apt-get update >/dev/null 2>&1 && apt_install "$@"; } \
        || skip "$program cannot be installed (apt-get install $*)"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@" >/dev/null 2>&1
}

# venv FOLDER REQUIREMENT...: a new virtual environment with these packages, by uv, which unpacks a release once for all.
venv() {
    UV=$ROOT/build/deploy-check/uv/bin/uv
    if [ ! -x "$UV" ]; then
        "$PYTHON" -m venv "$ROOT/build/deploy-check/uv"
        "$ROOT/build/deploy-check/uv/bin/python" -m pip install -qq uv
    fi
    "$UV" venv --quiet --python "$PYTHON" "$1"
    install "$@"
}

# install FOLDER REQUIREMENT...: more packages for that environment.
install() {
    "$UV" pip install --quiet --python "$1" "${@:2}"
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "not within the time given: $*"
        sleep 0.2
    done
}

# refused CODE TEXT COMMAND...: the command must end with this exit code and say this on stderr, without a traceback.
refused() {
    local code=$1 text=$2 got=0 said
    shift 2
    said=$("$@" 2>&1 >/dev/null) || got=$?
    [ "$got" -eq "$code" ] || fail "$* ended with $got, expected $code: $said"
    case $said in
        *Traceback*) fail "$* printed a traceback: $said" ;;
        *"$text"*) ;;
        *) fail "$* said: $said; expected: $text" ;;
    esac
}
