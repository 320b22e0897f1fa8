#!/usr/bin/env bash
# Makes .venvs/{saelens,sparsify,dictionary_learning} beside this file: one environment a peer, since their needs clash.
# All have one torch, pinned: with another one pip would also fetch gigabytes of CUDA.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

make() { # name, module, packages...
  local home="$here/.venvs/$1"
  [ -x "$home/bin/python" ] || "${PYTHON:-python3}" -m venv "$home"
  "$home/bin/pip" install -q torch==2.13.0 "${@:3}"
  # built for another torch it breaks the import of transformers, which is content without it
  "$home/bin/pip" uninstall -q -y torchvision 2>/dev/null
  "$home/bin/python" -c "import $2, torch; print('$1 ready, torch', torch.__version__)"
}

make saelens sae_lens sae-lens==6.54.12
make sparsify sparsify eai-sparsify==1.3.3
make dictionary_learning dictionary_learning dictionary-learning==0.1.0
