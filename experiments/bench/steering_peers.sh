#!/usr/bin/env bash
# Makes .venvs/{repeng,steering_vectors} beside this file: each on the torch of the environment whose python is given as
# PYTHON (the project's own, which is not changed), with the older numpy or transformers that its requirements ask for.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-$here/../../.venv/bin/python}"
site="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"

make() { # name, packages...
  local home="$here/.venvs/$1"
  [ -x "$home/bin/python" ] || "$python" -m venv "$home"
  echo "$site" >"$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/project.pth"
  "$home/bin/python" -m pip install -q --no-deps "${@:2}"
  "$home/bin/python" -c "import numpy, torch, transformers; print('$1 ready, torch', torch.__version__, \
'transformers', transformers.__version__, 'numpy', numpy.__version__)"
}

make repeng repeng==0.4.0 gguf==0.19.0 'numpy<2'
make steering_vectors steering-vectors==0.12.2 'transformers==4.57.3' 'huggingface-hub<1' 'tokenizers<0.23'
