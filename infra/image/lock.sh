#!/usr/bin/env bash
# Updates the *.lock files of this folder from the version ranges in pyproject.toml.
#
#   infra/image/lock.sh                           # the newest versions in the ranges
#   infra/image/lock.sh --constraint FILE         # the versions in FILE (`pip freeze` of a tested environment)
#
# Needs uv (`pip install uv`). TORCH_INDEX is the URL of a mirror of PyTorch's index of CPU builds.
set -euo pipefail
cd "$(dirname "$0")/../.."
TORCH=2.13.0
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

compile() {
    uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --output-file "infra/image/$1" "${@:2}"
    sed -i "1i # Written by infra/image/lock.sh for Python 3.11 on Linux x86-64; do not edit." "infra/image/$1"
}

# All packages except torch. They are resolved with its CPU build, because the CUDA build would add CUDA's libraries.
compile requirements.lock pyproject.toml --extra train --extra metrics \
    --extra synthesis --extra gguf --extra mlflow --extra otel \
    --find-links "$TORCH_INDEX/torch/" --override <(echo "torch==$TORCH+cpu") --no-emit-package torch "$@"
# The two builds of torch: the CUDA build is on PyPI, the CPU build only in PyTorch's index.
compile torch-cpu.lock <(echo "torch==$TORCH+cpu") --no-deps --default-index "$TORCH_INDEX"
sed -i "2i --index-url https://download.pytorch.org/whl/cpu" infra/image/torch-cpu.lock
compile torch-cuda.lock <(echo "torch==$TORCH") --constraint infra/image/requirements.lock
