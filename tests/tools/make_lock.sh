#!/usr/bin/env bash
# Write requirements.lock anew from requirements.txt, with markers for the platforms. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/../.."
# One version of torch for the whole course. Its CUDA packages are left out: torch itself pins them exactly on the
# platforms that have them, and a CPU build of torch must not draw them in.
echo "torch==${TORCH:-2.13.0}" > .torch-constraint
trap 'rm -f .torch-constraint' EXIT
{
  echo "# Every package at one version, for Python 3.11 to 3.13 on Linux, macOS and Windows. Made by tests/tools/make_lock.sh"
  echo "# from requirements.txt. torch brings its own CUDA packages where the platform has them."
  uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --constraint .torch-constraint \
    requirements.txt | grep -vE '^(nvidia-|cuda-|triton)' | sed 's/^torch==\([0-9.]*\).*/torch==\1/' | uniq
} > requirements.lock.new
mv requirements.lock.new requirements.lock
