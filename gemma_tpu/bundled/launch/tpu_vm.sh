# --- TPU VMs: created one by one, through the queue, or on spot again and again ---

GRACE=${GEMMA_TPU_GRACE:-90} # seconds after which a machine that failed counts as still there
RECONNECTS=20                # in a row, to a machine that is there
ZONE=

tpu() { cloud compute tpus "$@"; }

on_machine() { tpu tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --quiet --command="$2"; }

check() {
  need gcloud 'https://cloud.google.com/sdk/docs/install, then gcloud auth login'
  check_bucket
}

# ready, waiting, gone, another word of the cloud's, or nothing where there is no such machine in the zone.
state_in() {
  local said errors=$WORK/describe
  if [ "$QUEUED" = 1 ]; then
    said=$(tpu queued-resources describe "$NAME" --zone="$1" --format='value(state.state)' 2>"$errors") || said=
  else
    said=$(tpu tpu-vm describe "$NAME" --zone="$1" --format='value(state)' 2>"$errors") || said=
  fi
  if [ -z "$said" ]; then
    grep -Eiq 'not.?found|does not exist' "$errors" && return 0
    cat "$errors" >&2
    fail 1 "whether $NAME is in $1 cannot be told; what gcloud says stands above"
  fi
  case $said in
    READY | ACTIVE) echo ready ;;
    CREATING | STARTING | WAITING_FOR_RESOURCES | PROVISIONING | ACCEPTED) echo waiting ;;
    PREEMPTED | TERMINATED | FAILED | SUSPENDED | SUSPENDING | DELETING) echo gone ;;
    *) echo "$said" ;;
  esac
}

# Sets ZONE and STATE to where the machine is.
locate() {
  local zone
  for zone in "${ZONES[@]}"; do
    STATE=$(state_in "$zone") || exit $?
    if [ -n "$STATE" ]; then
      ZONE=$zone
      return 0
    fi
  done
  return 1
}

ask_in() {
  local flags=(--zone="$1" --accelerator-type="$ACCELERATOR")
  [ -z "$SPOT" ] || flags+=(--spot)
  [ -z "$SERVICE_ACCOUNT" ] || flags+=(--service-account="$SERVICE_ACCOUNT")
  flags+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  if [ "$QUEUED" = 1 ]; then
    tpu queued-resources create "$NAME" --node-id="$NAME" --runtime-version="$RUNTIME" \
      --valid-until-duration="${WAIT_HOURS}h" "${flags[@]}"
  else
    tpu tpu-vm create "$NAME" --version="$RUNTIME" "${flags[@]}"
  fi
}

# 0: ready in ZONE; 10: no zone has room.
create() {
  local code
  for ZONE in "${ZONES[@]}"; do
    say "asking for $ACCELERATOR${SPOT:+ on spot} in $ZONE"
    code=0
    ask_in "$ZONE" 2>&1 | tee "$WORK/create" >&2 || code=$?
    if [ "$code" != 0 ]; then
      code=0
      judge "$WORK/create" "$ZONE" || code=$?
    elif [ "$QUEUED" = 1 ]; then
      await || code=$?
    fi
    if [ "$code" = 0 ]; then
      say "$NAME is ready in $ZONE"
      return 0
    fi
    [ "$code" = 10 ] || exit "$code"
  done
  return 10
}

await() {
  local state
  while :; do
    state=$(state_in "$ZONE") || exit $?
    case $state in
      ready) return 0 ;;
      waiting) say "$NAME waits in the queue of $ZONE (for at most $WAIT_HOURS h)" ;;
      *)
        say "the request in $ZONE has ended without a machine (${state:-it is not there any more})"
        remove
        return 10
        ;;
    esac
    sleep "$PAUSE"
  done
}

# The machine that is there, or a new one. 10: no zone has room.
obtain() {
  if locate; then
    say "$NAME is $STATE in $ZONE"
    case $STATE in
      ready)
        FOUND=1
        return 0
        ;;
      waiting)
        if [ "$QUEUED" = 1 ]; then
          await
          return
        fi
        fail 1 "$NAME is still being created in $ZONE; call again in a minute" ;;
      gone) remove ;;
      *) fail 1 "$NAME is $STATE in $ZONE: delete it first, or give another --name" ;;
    esac
  fi
  create
}

remove() {
  if [ "$QUEUED" = 1 ]; then
    tpu queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  else
    tpu tpu-vm delete "$NAME" --zone="$ZONE" --quiet
  fi
}

prepare() {
  say "preparing $HOSTS machine(s): Python 3.12, the package, the config"
  tpu tpu-vm scp --recurse "$WORK/gemma-tpu" "$NAME:." --zone="$ZONE" --worker=all --quiet &&
    on_machine all 'bash gemma-tpu/machine.sh prepare'
}

# Each machine by itself: gcloud gives its stdin to one of several alone, and the token comes by it.
start() {
  local worker code=0 pids=()
  for ((worker = 0; worker < HOSTS; worker++)); do
    printf '%s\n' "${HF_TOKEN:-}" | on_machine "$worker" 'bash gemma-tpu/machine.sh start' &
    pids+=($!)
  done
  for worker in "${pids[@]}"; do wait "$worker" || code=1; done
  return "$code"
}

# Sets CODE to how training ended; lost: the machine is gone.
follow() {
  local from=+1 tries
  for ((tries = 0; tries < RECONNECTS; tries++)); do
    on_machine 0 "bash gemma-tpu/machine.sh follow $from" </dev/null || true
    CODE=$(on_machine 0 'cat gemma-tpu/exit 2>/dev/null' </dev/null 2>/dev/null) || CODE=
    [ "$CODE" != 0 ] || return 0
    if vanished "${CODE:+$GRACE}"; then
      CODE=lost
      return 0
    fi
    [ -z "$CODE" ] || return 0
    say "the connection to $NAME was lost, not the machine; following again"
    from=20
    sleep "$PAUSE"
  done
  fail 1 "$NAME in $ZONE does not answer; training may go on there: gemma-tpu launch ... --logs --run"
}

# Whether the machine is gone; looked at for $1 seconds, since a preempted one is still `ready` for a while.
vanished() {
  local waited=0 state
  while :; do
    state=$(state_in "$ZONE") || exit $?
    [ "$state" = ready ] || return 0
    [ "$waited" -lt "${1:-0}" ] || return 1
    sleep 10
    waited=$((waited + 10))
  done
}

# A run that goes on there, started before: it is followed, and nothing under it is replaced.
started_before() {
  [ -n "$FOUND" ] && on_machine 0 'bash gemma-tpu/machine.sh running 2>/dev/null' </dev/null 2>/dev/null
}

run_it() {
  local restarts=0
  check
  pack
  trap 'say "stopped here; what was started on $NAME goes on there, and costs: --logs --run follows it, --delete --run ends it"; exit 130' INT
  while :; do
    FOUND=
    if obtain; then
      if started_before; then
        say "training goes on there already"
        follow
      elif prepare && start; then
        follow
      else
        vanished "$GRACE" || fail 1 "$NAME in $ZONE could not be prepared; it is there and costs: gemma-tpu launch ... --delete --run"
        CODE=lost
      fi
    else
      [ -n "$SPOT" ] || fail 1 "no capacity in ${ZONES[*]}: try again later, other zones (--zone), or --with queued-resource, which waits"
      CODE=none
    fi
    case $CODE in
      0) break ;;
      lost | none) [ -n "$SPOT" ] || fail 1 "$NAME in $ZONE is gone; run the same command again to go on from the last checkpoint" ;;
      *) fail "$([ "$CODE" = 2 ] && echo 2 || echo 1)" "training ended with exit code $CODE; $NAME is still there in $ZONE, and costs: gemma-tpu launch ... --delete --run" ;;
    esac
    restarts=$((restarts + 1))
    [ "$restarts" -le "$RESTARTS" ] || fail 1 "given up after $RESTARTS restarts (--restarts); the same command goes on from the last checkpoint"
    if [ "$CODE" = lost ]; then
      say "$NAME was taken away; restart $restarts of at most $RESTARTS, from the checkpoints in $CHECKPOINTS"
      locate && remove
    else
      say "no zone has room; asking again in $PAUSE s ($restarts of at most $RESTARTS)"
      sleep "$PAUSE"
    fi
  done
  told_results
  say "$NAME is still there in $ZONE, and costs until it is deleted"
  if [ -t 0 ] || [ "$YES" = 1 ]; then delete; else say "delete it: gemma-tpu launch ... --delete --run"; fi
}

logs() {
  need gcloud 'https://cloud.google.com/sdk/docs/install'
  locate || fail 2 "there is no $NAME in ${ZONES[*]}"
  [ "$STATE" = ready ] || fail 1 "$NAME is $STATE in $ZONE; the copy of its run folder is in $MIRROR"
  follow
  say "training on $NAME: exit code $CODE"
}

delete() {
  need gcloud 'https://cloud.google.com/sdk/docs/install'
  if ! locate; then
    say "there is no $NAME in ${ZONES[*]}: nothing to delete"
    return 0
  fi
  confirm "Delete $NAME ($ACCELERATOR, $STATE) in $ZONE? What is in $BUCKET stays." ||
    fail 1 "$NAME is kept in $ZONE, and goes on costing"
  remove
  say "$NAME is deleted; what is in $BUCKET stays"
}
