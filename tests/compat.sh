#!/usr/bin/env bash
# tests/compat.sh lowest|newest [PYTHON]: a fast part of the tests with the lowest versions that pyproject.toml allows, or
# the newest, in an environment of its own, which is removed again. PYTHON is by default python3.10 for the lowest, else
# python3. TORCH=2.13.0 takes this torch; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu its builds for the CPU.
set -euo pipefail
which=$1
python=${2:-$([ "$which" = lowest ] && echo python3.10 || echo python3)}
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
venv=$folder/venv/bin/python
touch "$folder/versions.txt"
if [ "$which" = lowest ]; then
    sed -n '/^dependencies = \[/,/^]/p; /^examples = /p; /^parquet = /p' pyproject.toml |
        grep -oE '[A-Za-z0-9_-]+>=[0-9.]+' | sed 's/>=/==/' > "$folder/versions.txt"
fi
if [ -n "${TORCH:-}" ]; then
    sed -i '/^torch==/d' "$folder/versions.txt"
    echo "torch==$TORCH" >> "$folder/versions.txt"
fi
"$venv" -m pip install -q -c "$folder/versions.txt" -e '.[examples,parquet]' 'pytest>=9' 'pytest-xdist>=3.6' safetensors
"$venv" -V
"$venv" -m pip list --format freeze | grep -E '^(torch|torchdata|hydra-core|omegaconf|numpy|tensorboard|fsspec)==' | xargs
# Formats, exact restores, the data, runs of an earlier version, kills; not what needs other packages or many minutes.
OMP_NUM_THREADS=1 "$venv" -m pytest -p no:cacheprovider tests/test_identity.py tests/test_rng.py tests/test_encoding.py \
    tests/test_store.py tests/test_update.py tests/test_earlier.py tests/test_lines.py tests/test_drift.py
