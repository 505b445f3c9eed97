#!/bin/sh
# Installs the pinned torch: the CPU build on a machine without an NVIDIA GPU, which needs no CUDA packages.
# PIP is the pip command, TORCH the version.
set -eu
if $PIP show torch >/dev/null 2>&1; then exit 0; fi
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  exec $PIP install --quiet "torch==$TORCH"
fi
# From the configured indexes where they have a CPU build, else from PyTorch's own index of CPU builds. macOS wheels
# are CPU builds without a local version.
if [ "$(uname -s)" = Linux ]; then
  $PIP install --quiet "torch==$TORCH+cpu" 2>/dev/null ||
    $PIP install --quiet --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH"
else
  $PIP install --quiet "torch==$TORCH"
fi
