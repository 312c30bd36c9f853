# --- start, wait until /health is green, follow the log ---

say() { printf '%s\n' "$*" >&2; }

fail() {
  local code=$1
  shift
  say "error: $*"
  exit "$code"
}

PAUSE=${GEMMA_TPU_PAUSE:-5}
LOG=$(mktemp)
SERVER=
LOGGER=

running() {
  if [ -n "$CONTAINER" ]; then
    [ "$(docker inspect --format '{{.State.Running}}' "$NAME" 2>/dev/null)" = true ]
  else
    kill -0 "$SERVER" 2>/dev/null
  fi
}

# shellcheck disable=SC2317  # traps call it
stop() {
  [ -z "$LOGGER" ] || kill "$LOGGER" 2>/dev/null || true
  if [ -n "$CONTAINER" ]; then
    docker stop "$NAME" >/dev/null 2>&1 || true
    docker rm --force "$NAME" >/dev/null 2>&1 || true
  elif [ -n "$SERVER" ]; then
    kill "$SERVER" 2>/dev/null || true
  fi
  rm -f "$LOG"
}

command -v curl >/dev/null 2>&1 || fail 2 "curl is not installed, and asks the server whether it is ready"
if [ -n "$CONTAINER" ]; then
  command -v docker >/dev/null 2>&1 ||
    fail 2 "docker is not installed; or serve with a vLLM of your own environment: --bare"
  docker info >/dev/null 2>&1 ||
    fail 2 "docker does not answer: is its daemon running, and are you in its group (sudo usermod -aG docker \"\$USER\", then log in again)?"
  if docker inspect "$NAME" >/dev/null 2>&1; then
    fail 2 "a container $NAME is there already: docker rm --force $NAME, or another --port"
  fi
else
  command -v vllm >/dev/null 2>&1 ||
    fail 2 "vllm is not installed here: pip install vllm (vllm-tpu on a TPU) in an environment of its own, or leave --bare out"
fi
if curl --silent --max-time 2 --output /dev/null "$URL/health"; then
  fail 2 "something answers at $URL already: another --port"
fi
mkdir -p "$CACHE"
links || fail "$?" "the model could not be linked for the container"

trap stop EXIT
trap 'exit 130' INT TERM
if [ -n "$CONTAINER" ]; then
  begin >/dev/null || fail 1 "docker could not start $IMAGE; what it says stands above"
  docker logs --follow "$NAME" >"$LOG" 2>&1 &
  LOGGER=$!
else
  begin >"$LOG" 2>&1 &
  SERVER=$!
fi

say "starting $MODEL; the first start compiles for minutes, later ones take it from $CACHE"
READY=
for ((try = 1; try <= TRIES; try++)); do
  if curl --silent --fail --max-time 5 --output /dev/null "$URL/health"; then
    READY=1
    break
  fi
  if ! running; then
    tail -n 40 "$LOG" >&2 || true
    fail 1 "the server has ended; its last lines stand above"
  fi
  if ((try % 12 == 0)); then say "not ready after $SECONDS s: $(tail -n 1 "$LOG" | cut -c 1-160)"; fi
  sleep "$PAUSE"
done
[ -n "$READY" ] || fail 1 "the server was not healthy after $SECONDS s; it is stopped"

say "ready: $URL/v1, model $MODEL"
say "  curl $URL/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"$MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'"
say "  gemma-tpu sample $URL/v1 --prompt Hello"
if [ -n "$DETACH" ]; then
  trap - EXIT
  [ -z "$LOGGER" ] || kill "$LOGGER" 2>/dev/null || true
  if [ -n "$CONTAINER" ]; then say "it goes on; end it: docker rm --force $NAME"; else say "it goes on as process $SERVER; its log: $LOG"; fi
  exit 0
fi
say "Ctrl-C ends it; its log follows"
tail -n +1 -F "$LOG" 2>/dev/null &
FOLLOWER=$!
trap 'kill "$FOLLOWER" 2>/dev/null || true; stop' EXIT
while running; do sleep "$PAUSE"; done
fail 1 "the server has ended"
