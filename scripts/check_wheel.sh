#!/bin/sh
# Build the wheel, install it in an empty environment, and run it from another folder: what a user gets works without
# the checkout. About 2 minutes on 2 cores; ends with "wheel: ok".
#
#   scripts/check_wheel.sh .venv/bin/python
set -eu
python=$(cd "$(dirname "$1")" && pwd)/python
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$root"

rm -rf dist
sh scripts/uv.sh "$python" build --quiet --wheel --out-dir dist
"$python" -m pip freeze --exclude-editable --disable-pip-version-check >"$place/versions.txt"  # what is downloaded already
sh scripts/uv.sh "$python" venv --quiet --python "$python" "$place/env"
sh scripts/uv.sh "$python" pip install --quiet --python "$place/env/bin/python" --constraints "$place/versions.txt" dist/*.whl

cd "$place"
unset PYTHONPATH
"$place/env/bin/clipkit" --help
"$place/env/bin/clipkit" pretrain --cfg job >settings.yaml
grep -q 'global_batch_size' settings.yaml
"$place/env/bin/clipkit" pretrain model=tiny train.samples=512 evaluation.tasks=[] evaluation.final_tasks=[emoji_val] \
    name=wheel device=cpu
test -f runs/wheel/model/open_clip_model.safetensors
echo "wheel: ok"
