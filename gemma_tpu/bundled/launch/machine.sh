#!/usr/bin/env bash
# On each machine of the slice: prepare, start (in the background, the token comes by stdin), follow, run.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ENVIRONMENT=${GEMMA_TPU_ENVIRONMENT:-$HOME/gemma-tpu-env}
PACKAGE='' EXTRAS='' MIRROR=''
# shellcheck source=/dev/null
. "$HERE/settings.sh"

# The image of a TPU VM has Python 3.10; uv brings 3.12 beside it.
prepare() {
  python3 -m pip install --user --quiet uv
  local uv="$HOME/.local/bin/uv" package=$PACKAGE
  if [ -f "$HERE/source.tgz" ]; then
    rm -rf "$HERE/source"
    mkdir "$HERE/source"
    tar -C "$HERE/source" -xzf "$HERE/source.tgz"
    package="$HERE/source[$EXTRAS]"
  fi
  [ -x "$ENVIRONMENT/bin/python" ] || "$uv" venv --quiet --python 3.12 "$ENVIRONMENT"
  "$uv" pip install --quiet --python "$ENVIRONMENT/bin/python" "$package"
  "$ENVIRONMENT/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
  "$ENVIRONMENT/bin/gemma-tpu" --version
}

running() { [ -f "$HERE/pid" ] && kill -0 "$(cat "$HERE/pid")" 2>/dev/null; }

# The token is read from stdin into the environment of the run: it stands in no file and on no command line.
start() {
  local token=
  IFS= read -r token || true
  if running; then
    echo "already running on $(hostname)"
    return
  fi
  rm -f "$HERE/exit" "$HERE/pid"
  : >"$HERE/train.log"
  if [ -n "$token" ]; then export HF_TOKEN=$token; fi
  nohup setsid bash "$HERE/machine.sh" run >"$HERE/train.log" 2>&1 </dev/null &
  echo "started on $(hostname)"
}

run() {
  local code=0
  cd "$HERE"
  echo $$ >pid
  [ -n "${HF_TOKEN:-}" ] || unset HF_TOKEN
  export PYTHONUNBUFFERED=1
  "$ENVIRONMENT/bin/gemma-tpu" train config.yaml --mirror "$MIRROR" || code=$?
  echo "$code" >exit.part
  mv exit.part exit
  exit "$code"
}

# The log from its line $1 on (or its last lines, as `tail -n` has it), until the run has ended.
follow() {
  local tries
  for ((tries = 0; tries < 30; tries++)); do
    [ -f "$HERE/pid" ] && break
    sleep 1
  done
  [ -f "$HERE/pid" ] || exit 3
  tail -n "${1:-+1}" --pid="$(cat "$HERE/pid")" -F "$HERE/train.log" 2>/dev/null
}

"$@"
