#!/usr/bin/env bash
# Wheel and sdist build; each extra is installed into an environment of its own and its commands do one real thing.
# shellcheck source=deploy/check/lib/steps.sh
. "$(dirname "$0")/lib/steps.sh"
STORE=$ROOT/tests/golden/store_v1
MOST_MB=300 # of the environment without extras

venv "$WORK/build" build
"$WORK/build/bin/python" -m build --quiet --sdist --outdir "$WORK/dist" "$ROOT"
sdist=$(echo "$WORK"/dist/*.tar.gz)
tar -xzf "$sdist" -C "$WORK"
"$WORK/build/bin/python" -m build --quiet --wheel --outdir "$WORK/dist" "$WORK"/scalekd_cache-*/
wheel=$(echo "$WORK"/dist/*.whl)
rm -rf "$ROOT"/build/lib "$ROOT"/build/bdist.* "$ROOT"/scalekd_cache.egg-info
files=$("$PYTHON" -m zipfile -l "$wheel")
for name in feature_store/FORMAT.md feature_store/tools/plot.html teacher_service/serve/page/static/page.js \
    student_trainer/reports/page.html student_trainer/sweeps/ready/views.yaml; do
    grep -q "$name" <<<"$files" || fail "the wheel lacks $name"
done
if grep -qE '^(tests|demo|benchmarks)/' <<<"$files"; then fail "the wheel holds more than the three packages"; fi
echo "wheel: $(basename "$wheel"), sdist: $(basename "$sdist")"

part "without extras"
plain=$WORK/plain
venv "$plain" "$wheel"
megabytes=$(du -sm "$plain" | cut -f1)
"$UV" pip freeze --python "$plain" | grep -iqE '^(torch|timm|fastapi)==' && fail "torch, timm or fastapi is a plain dependency"
[ "$megabytes" -lt "$MOST_MB" ] || fail "the environment has $megabytes MB, expected under $MOST_MB"
echo "environment: $megabytes MB"
"$plain/bin/feature-store" --help >/dev/null
"$plain/bin/feature-store" info "$STORE" --json >/dev/null
"$plain/bin/feature-store" verify "$STORE"
"$plain/bin/teacher-service" serve --help >/dev/null
"$plain/bin/teacher-service" token create --name check --scope read admin --file "$WORK/tokens.jsonl" >"$WORK/token"
refused 2 "pip install 'scalekd-cache[teacher]'" "$plain/bin/teacher-service" cache x.tar --teacher t --store "$WORK/s"
refused 2 "pip install 'scalekd-cache[student]'" "$plain/bin/student-trainer" --help
refused 2 "pip install 'scalekd-cache[serve]'" "$plain/bin/teacher-service" serve --store "$STORE"
refused 2 "pip install 'scalekd-cache[plot]'" "$plain/bin/feature-store" plot "$STORE" --out "$WORK/plots"
refused 2 "pip install 'scalekd-cache[s3]'" "$plain/bin/feature-store" info s3://bucket/store

part "serve"
venv "$WORK/serve" "${wheel}[serve]"
"$WORK/serve/bin/teacher-service" serve --store "$STORE" --tokens "$WORK/tokens.jsonl" --port 0 >"$WORK/serve.log" &
service=$!
wait_for 30 grep -q url "$WORK/serve.log"
url=$("$PYTHON" -c 'import json, sys; print(json.loads(sys.stdin.readline())["url"])' <"$WORK/serve.log")
wait_for 30 curl --fail --silent "$url/readyz"
"$plain/bin/python" - "$url" "$WORK/token" <<'EOF'
import sys
from pathlib import Path

from feature_store import connect

client = connect(sys.argv[1], Path(sys.argv[2]).read_text().strip())
keys = client.store.keys(0)
rows = client.rows([keys[0]], view=0)
assert rows["stage4"].shape[0] == 1, rows["stage4"].shape
print("client without extras: one row of", client.manifest.teacher.name)
EOF
kill -TERM "$service"
wait "$service"

part "s3, over http"
venv "$WORK/s3" "${wheel}[s3]"
"$PYTHON" -m http.server --bind 127.0.0.1 --directory "$ROOT/tests/golden" 18431 >/dev/null 2>&1 &
files=$!
wait_for 10 curl --fail --silent http://127.0.0.1:18431/store_v1/zarr.json
refused 2 "" "$WORK/s3/bin/feature-store" info http://127.0.0.1:18431/nothing
"$WORK/s3/bin/python" -c 'import boto3, obstore'
kill "$files"

part "plot"
venv "$WORK/plot" "${wheel}[plot]"
"$WORK/plot/bin/feature-store" plot "$STORE" --out "$WORK/plots" --rows 4 --thumbnails 0
[ -s "$WORK/plots/index.html" ] || fail "no page: $(ls "$WORK/plots")"

part "hf"
venv "$WORK/hf" "${wheel}[hf]"
"$WORK/hf/bin/python" -c 'from huggingface_hub import HfFileSystem'

part "teacher"
venv "$WORK/teacher" "${wheel}[teacher]"
"$WORK/teacher/bin/python" "$LIB/tiny_job.py" "$WORK/job"
mapfile -t teacher < <(tr ' ' '\n' <"$WORK/job/teacher.options")
tars=("$WORK"/job/images-*.tar)
job=("${tars[@]}" "${teacher[@]}" --workers 2 --batch-size 4)
"$WORK/teacher/bin/teacher-service" plan "${job[@]}" --json >/dev/null
"$WORK/teacher/bin/teacher-service" cache "${job[@]}" --checkpoint "$WORK/job/teacher.safetensors" --store "$WORK/job/store" 2>/dev/null
"$WORK/teacher/bin/teacher-service" verify "${tars[@]}" --store "$WORK/job/store" --checkpoint "$WORK/job/teacher.safetensors" --device cpu --sample 4
refused 2 "pip install 'scalekd-cache[ray]'" "$WORK/teacher/bin/teacher-service" cache "${job[@]}" --store "$WORK/job/store-ray" \
    --checkpoint "$WORK/job/teacher.safetensors" --engine ray

part "ray"
install "$WORK/teacher" "${wheel}[ray]"
"$WORK/teacher/bin/teacher-service" cache "${job[@]}" --checkpoint "$WORK/job/teacher.safetensors" --store "$WORK/job/store-ray" \
    --engine ray --num-actors 1 2>"$WORK/ray.log" || fail "$(tail -5 "$WORK/ray.log")"
rm -rf "$WORK/teacher"

part "student, tensorboard, wandb, report, onnx, coco"
venv "$WORK/student" "${wheel}[student]"
"$WORK/student/bin/student-trainer" presets >/dev/null
run=(--tars "${tars[@]}" --student test_resnet --epochs 1 --batch-size 4 --workers 0 --device cpu --store "$WORK/job/store")
"$WORK/student/bin/student-trainer" train --run "$WORK/job/run" "${run[@]}" 2>/dev/null
"$WORK/student/bin/student-trainer" evaluate --run "$WORK/job/run" --tars "${tars[@]}" --workers 0 --device cpu >/dev/null
"$WORK/student/bin/student-trainer" export --run "$WORK/job/run" --out "$WORK/job/exported"
for option in --tensorboard "--wandb check"; do
    # shellcheck disable=SC2086 # two words
    refused 2 "$(cut -c3- <<<"${option%% *}")" "$WORK/student/bin/student-trainer" train --run "$WORK/job/refused" "${run[@]}" $option
done
install "$WORK/student" "${wheel}[tensorboard,wandb,report,onnx,coco]"
WANDB_MODE=offline WANDB_DIR=$WORK "$WORK/student/bin/student-trainer" train --run "$WORK/job/logged" "${run[@]}" --tensorboard --wandb check >/dev/null 2>&1
"$WORK/student/bin/student-trainer" export --run "$WORK/job/run" --out "$WORK/job/onnx" --onnx
"$WORK/student/bin/python" "$ROOT/examples/detection.py" --help >/dev/null
"$WORK/student/bin/python" -c 'import pycocotools.coco, matplotlib.figure'
