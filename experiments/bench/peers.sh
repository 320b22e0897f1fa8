#!/usr/bin/env bash
# Makes .venv beside this file: the peers at the versions compared, the project's pins, and interp by path.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
[ -x "$here/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$here/.venv"
"$here/.venv/bin/pip" install -q -c "$root/.ci/constraints.txt" \
  torch==2.13.0 transformer-lens==4.3.0 nnsight==0.8.1 \
  einops jaxtyping plotly scikit-learn threadpoolctl jinja2 typer xxhash psutil pyarrow
"$here/.venv/bin/pip" install -q --no-deps -e "$root"
"$here/.venv/bin/python" -c "import interp, nnsight, torch, transformer_lens; print('peers ready, torch', torch.__version__)"
