#!/usr/bin/env bash
# Every check that needs a GPU, in a few minutes, the most valuable first:
#
#   bash benchmarks/on_gpu.sh [seconds] [--dry-run]
#
# Needs a Python with PyTorch and Triton, and nothing else: no network, no installed package. If benchmarks/wheels has
# wheels of libraries to compare with, they are installed for this run alone. --dry-run goes through every stage without
# a GPU. See benchmarks/on_gpu.py.
set -euo pipefail
ON_GPU_BEGAN=$(date +%s.%N) # so that the time of importing PyTorch counts too
export ON_GPU_BEGAN
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -n ${OUT:-} && $OUT != /* ]]; then export OUT="$PWD/$OUT"; fi
cd "$checkout"
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

for python in ${PYTHON:-} python3 python; do
  if "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "triton"))))' 2>/dev/null; then
    exec "$python" -m benchmarks.on_gpu "$@"
  fi
done
echo "on_gpu.sh: no python3 here has torch and triton; set PYTHON to one that has" >&2
exit 2
