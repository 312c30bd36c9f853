# --- what every way to create machines shares ---

# shellcheck disable=SC2034  # nothing to wait for in some of the scripts
PAUSE=${GEMMA_TPU_PAUSE:-60} # seconds between two looks, and before another try
EVERY_ZONE=                    # set where a file names the zones: then none can be left out here
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

say() { printf '%s\n' "$*" >&2; }

fail() {
  local code=$1
  shift
  say "error: $*"
  exit "$code"
}

need() { command -v "$1" >/dev/null 2>&1 || fail 2 "$1 is not installed: $2"; }

cloud() {
  if [ -n "$PROJECT" ]; then gcloud "$@" --project="$PROJECT"; else gcloud "$@"; fi
}

confirm() {
  local answer=
  [ "$YES" = 1 ] && return 0
  printf '%s [y/N] ' "$1" >&2
  IFS= read -r answer || true
  [ "$answer" = y ] || [ "$answer" = yes ]
}

# The bucket must lie where the machines do: reads across regions are slow and cost. Keeps the zones that do.
check_bucket() {
  local bucket=${BUCKET#gs://} location zone
  local kept=() others=()
  bucket=${bucket%%/*}
  location=$(cloud storage buckets describe "gs://$bucket" --format='value(location)') ||
    fail 2 "gs://$bucket cannot be described: create it (gcloud storage buckets create gs://$bucket --location=${ZONES[0]%-*}), or get access to it"
  location=$(printf '%s' "$location" | tr '[:upper:]' '[:lower:]')
  for zone in "${ZONES[@]}"; do
    if near "$location" "${zone%-*}"; then kept+=("$zone"); else others+=("$zone"); fi
  done
  if [ "${#others[@]}" -gt 0 ] && [ "$ANY_REGION" = 1 ]; then
    say "warning: gs://$bucket is in $location; ${others[*]} read it across regions, slowly and at a price"
  elif [ "${#kept[@]}" -eq 0 ]; then
    fail 2 "gs://$bucket is in $location, and none of the zones is: ${ZONES[*]}. Take a bucket in one of their regions, or --any-region"
  elif [ "${#others[@]}" -gt 0 ] && [ -n "$EVERY_ZONE" ]; then
    fail 2 "gs://$bucket is in $location, and these zones are not: ${others[*]}. Name zones with --zone, or give --any-region"
  else
    [ "${#others[@]}" -eq 0 ] || say "left out, for gs://$bucket is in $location: ${others[*]}"
    ZONES=("${kept[@]}")
  fi
  say "bucket gs://$bucket is in $location; zones, in turn: ${ZONES[*]}"
}

near() {
  case $1 in
    "$2") return 0 ;;
    us | nam*) [ "${2%%-*}" = us ] ;;
    eu | eur*) [ "${2%%-*}" = europe ] ;;
    asia | asia[0-9]*) [ "${2%%-*}" = asia ] ;;
    *) return 1 ;;
  esac
}

# What a machine needs, in $WORK/gemma-tpu: the config, the settings, and the package where it is not had by name.
pack() {
  mkdir "$WORK/gemma-tpu"
  config >"$WORK/gemma-tpu/config.yaml"
  machine >"$WORK/gemma-tpu/machine.sh"
  printf 'PACKAGE=%q\nEXTRAS=%q\nMIRROR=%q\n' "$PACKAGE" "$EXTRAS" "$MIRROR" >"$WORK/gemma-tpu/settings.sh"
  if [ -n "$SOURCE" ]; then
    tar -C "$SOURCE" --exclude=__pycache__ -czf "$WORK/gemma-tpu/source.tgz" \
      pyproject.toml README.md LICENSE gemma_tpu recipes configs
  fi
}

# Why something was not created, from what gcloud said: 10 is no capacity, and another zone may have some.
judge() {
  if grep -Eiq 'quota' "$1"; then
    fail 1 "no quota for $ACCELERATOR${SPOT:+ on spot} in $2, and waiting does not help: ask for more at https://console.cloud.google.com/iam-admin/quotas (service: Cloud TPU API), or name zones that you have quota in with --zone"
  elif grep -Eiq 'no more capacity|insufficient (reserved )?capacity|RESOURCE_POOL_EXHAUSTED|stockout|out of capacity|currently unavailable|RESOURCE_EXHAUSTED|not have enough resources' "$1"; then
    say "no capacity in $2"
    return 10
  fi
  fail 1 "$NAME could not be created in $2; what gcloud says stands above"
}

told_results() {
  say "done. The run folder is in $MIRROR, checkpoints are in $CHECKPOINTS"
  say "  gcloud storage rsync --recursive $MIRROR $RUN_DIR && gemma-tpu merge $RUN_DIR"
}
