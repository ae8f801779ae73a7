#!/usr/bin/env bash
# Writes the *.lock files of this folder again, from the ranges in pyproject.toml.
#
#   infra/image/lock.sh                           # the newest versions in the ranges
#   infra/image/lock.sh --constraint FILE         # those of FILE (`pip freeze` of an environment that was tested)
#
# Needs uv (`pip install uv`). TORCH_INDEX names a mirror of PyTorch's index of builds for CPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
TORCH=2.13.0
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

compile() {
    uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --output-file "infra/image/$1" "${@:2}"
    sed -i "1i # Written by infra/image/lock.sh for Python 3.11 on Linux x86-64; do not edit." "infra/image/$1"
}

# Everything but torch. Its build for CPUs resolves here, since the other one brings CUDA's libraries into the list.
compile requirements.lock pyproject.toml --extra train --extra metrics \
    --extra synthesis --extra gguf --extra mlflow --extra otel \
    --find-links "$TORCH_INDEX/torch/" --override <(echo "torch==$TORCH+cpu") --no-emit-package torch "$@"
# The two builds of torch. PyPI has the one with CUDA; the other stands in PyTorch's own index alone.
compile torch-cpu.lock <(echo "torch==$TORCH+cpu") --no-deps --default-index "$TORCH_INDEX"
sed -i "2i --index-url https://download.pytorch.org/whl/cpu" infra/image/torch-cpu.lock
compile torch-cuda.lock <(echo "torch==$TORCH") --constraint infra/image/requirements.lock
