#!/usr/bin/env bash
# Makes .venvs/{concept_erasure,gguf} beside this file: the packages alone, on the torch and numpy of the environment
# whose python is given as PYTHON (the project's own), which is not changed.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-$here/../../.venv/bin/python}"
site="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"

make() { # name, module, package
  local home="$here/.venvs/$1"
  [ -x "$home/bin/python" ] || "$python" -m venv "$home"
  echo "$site" >"$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/project.pth"
  "$home/bin/python" -m pip install -q --no-deps "$3"
  "$home/bin/python" -c "import $2, torch; print('$1 ready, torch', torch.__version__)"
}

make concept_erasure concept_erasure concept-erasure==0.2.4
make gguf gguf gguf==0.19.0
