#!/usr/bin/env bash
# Proves the GPU path on one GPU in under eight minutes: bash tests/gpu/check.sh [--rehearse] [--only PART,...] [--help]
# Uses .venv if there is one, else the python of the PATH. A table at the end; figures in $OUT or runs/gpu_check.
cd "$(dirname "$0")/../.." || exit 2
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" tests/gpu/check.py "$@"
