#!/usr/bin/env bash
# The images build without a container engine; serve, cache and client run with a read-only root as PID 1.
# shellcheck source=deploy/check/lib/steps.sh
. "$(dirname "$0")/lib/steps.sh"
need buildah buildah
need mmdebstrap mmdebstrap
need curl curl
run=("$PYTHON" "$LIB/container.py")

# The base: the one the Dockerfile names, or the same release of Debian from its packages.
base=docker.io/library/python:3.12-slim-bookworm
if ! timeout 60 buildah pull --quiet "$base" >/dev/null 2>&1; then
    base=localhost/scalekd-check-base
    if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
        echo "no image registry: a base from Debian's packages"
        mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$WORK/rootfs.tar"
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$WORK/rootfs.tar" / >/dev/null
        buildah commit --quiet --rm "$container" "$base" >/dev/null
        rm "$WORK/rootfs.tar"
    fi
fi
mapfile -t settings < <("$PYTHON" "$LIB/pip_settings.py" "$WORK")

# build TARGET: the image localhost/scalekd-check:TARGET.
build() {
    local begun=$SECONDS image=localhost/scalekd-check:$1
    buildah build --quiet --isolation chroot --format docker --layers --file "$ROOT/deploy/docker/Dockerfile" --target "$1" \
        --build-arg BASE="$base" --build-arg TORCH_BASE="$base" "${settings[@]}" --tag "$image" "$ROOT" >"$WORK/build.log" 2>&1 \
        || fail "$1: $(tail -20 "$WORK/build.log")"
    [ "$(buildah inspect --type image --format '{{.Docker.Config.User}}' "$image")" = 10001:10001 ] || fail "$1 runs as another user"
    echo "$1: built in $((SECONDS - begun)) s, $(buildah images --format '{{.Size}}' "$image")"
}

free_port() { "$PYTHON" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# served STORE: the serve image with this store answers, refuses, is healthy, and drains on SIGTERM.
served() {
    local port service code=0 begun check
    port=$(free_port)
    "${run[@]}" localhost/scalekd-check:serve --volume "$1:/data/store:ro" --volume "$WORK/state/tokens.jsonl:/run/secrets/tokens:ro" \
        -- serve --store /data/store --tokens /run/secrets/tokens --host 0.0.0.0 --port "$port" --drain-delay 2 --drain-seconds 10 \
        >"$WORK/serve.log" 2>&1 &
    service=$!
    wait_for 60 curl --fail --silent "http://127.0.0.1:$port/readyz"
    [ "$(curl --silent --output /dev/null --write-out '%{http_code}' "http://127.0.0.1:$port/v1/manifest")" = 401 ] || fail "no token is needed"
    curl --fail --silent --output /dev/null --oauth2-bearer "$(cat "$WORK/token")" "http://127.0.0.1:$port/v1/manifest" || fail "the token is refused"
    curl --fail --silent --output /dev/null --oauth2-bearer "$(cat "$WORK/token")" "http://127.0.0.1:$port/v1/units/0/views/0?start=0&count=1" \
        || fail "no row: $(tail -3 "$WORK/serve.log")"
    check=$(buildah inspect --type image --format '{{index .Docker.Config.Healthcheck.Test 3}}' localhost/scalekd-check:serve)
    "$PYTHON" -c "${check//8000/$port}" || fail "HEALTHCHECK fails: $check"
    begun=$SECONDS
    kill -TERM "$service"
    sleep 0.5
    [ "$(curl --silent --output /dev/null --write-out '%{http_code}' "http://127.0.0.1:$port/readyz")" = 503 ] || fail "ready while it drains"
    wait "$service" || code=$?
    [ "$code" -eq 0 ] || fail "serve ended with $code: $(tail -3 "$WORK/serve.log")"
    [ $((SECONDS - begun)) -le 13 ] || fail "drained for $((SECONDS - begun)) s"
    echo "serve: ready, 401 without token, rows with it, healthy, drained in $((SECONDS - begun)) s with exit code 0"
}

build client
build serve
mkdir "$WORK/state" "$WORK/job"
chown 10001:10001 "$WORK/state" "$WORK/job"
chmod 711 "$WORK"
code=0
"${run[@]}" localhost/scalekd-check:serve --volume "$WORK/state:/data" -- token create --name check --scope read --file /data/tokens.jsonl \
    >"$WORK/token" || code=$?
[ "$code" -ne 77 ] || skip "images were built; they cannot be run: namespaces are not permitted here"
[ "$code" -eq 0 ] || fail "token create ended with $code"
cp -r "$ROOT/tests/golden/store_v1" "$WORK/golden"
served "$WORK/golden"
"${run[@]}" localhost/scalekd-check:client --volume "$WORK/golden:/data/store:ro" -- verify /data/store
if "${run[@]}" localhost/scalekd-check:serve --entrypoint python3 -- -c 'import torch' 2>/dev/null; then fail "the serve image has torch"; fi

build cache
tiny=("${run[@]}" localhost/scalekd-check:cache --shm 256m --volume "$WORK/job:/data" --volume "$LIB:/check:ro")
"${tiny[@]}" --entrypoint python3 -- /check/tiny_job.py /data
mapfile -t teacher < <(tr ' ' '\n' <"$WORK/job/teacher.options")
job=(cache /data/images-0.tar /data/images-1.tar "${teacher[@]}" --checkpoint /data/teacher.safetensors --store /data/store
    --workers 2 --batch-size 4)
"${tiny[@]}" -- "${job[@]}" 2>/dev/null
"${tiny[@]}" -- "${job[@]}" 2>/dev/null | grep "0 units written, 2 already committed" || fail "the same job did not resume"
served "$WORK/job/store"

"${tiny[@]}" -- "${job[@]/%\/data\/store//data/long}" --views 1000 >"$WORK/long.log" 2>&1 &
long=$! code=0
wait_for 90 test -f "$WORK/job/long/zarr.json"
begun=$SECONDS
kill -TERM "$long"
wait "$long" || code=$?
[ "$code" -eq 143 ] || fail "cache ended with $code after SIGTERM, expected 143: $(tail -3 "$WORK/long.log")"
[ $((SECONDS - begun)) -le 12 ] || fail "cache took $((SECONDS - begun)) s to end"
echo "cache: ended $((SECONDS - begun)) s after SIGTERM with exit code 143"

build train
"${run[@]}" localhost/scalekd-check:train --shm 256m --volume "$WORK/job:/data" -- train --run /data/run --store /data/store \
    --tars /data/images-0.tar /data/images-1.tar --student test_resnet --epochs 1 --batch-size 4 --workers 2 --device cpu 2>/dev/null
[ -s "$WORK/job/run/last.pt" ] || fail "the run left no checkpoint"
buildah rmi --force localhost/scalekd-check:client localhost/scalekd-check:serve localhost/scalekd-check:cache localhost/scalekd-check:train >/dev/null
buildah rmi --prune >/dev/null 2>&1 || true
