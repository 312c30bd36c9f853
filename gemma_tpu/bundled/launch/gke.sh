# --- GKE: a node pool, and a JobSet that Kueue lets in ---

check() {
  need gcloud 'https://cloud.google.com/sdk/docs/install, then gcloud auth login'
  need kubectl 'gcloud components install kubectl gke-gcloud-auth-plugin'
  check_bucket
  connect
  kubectl get crd jobsets.jobset.x-k8s.io localqueues.kueue.x-k8s.io >/dev/null ||
    fail 2 "the cluster $CLUSTER lacks JobSet or Kueue: https://jobset.sigs.k8s.io/docs/installation, https://kueue.sigs.k8s.io/docs/installation"
}

# A context of our own: the user's current one stays as it is.
connect() {
  export KUBECONFIG="$WORK/kubeconfig"
  cloud container clusters get-credentials "$CLUSTER" --location="$LOCATION"
}

# 0: there is a node pool; fails where no zone has room.
create() {
  local zone code flags
  if cloud container node-pools describe "$NAME" --cluster="$CLUSTER" --location="$LOCATION" --format='value(status)' \
    >/dev/null 2>"$WORK/describe"; then
    say "the node pool $NAME is there"
    return 0
  fi
  grep -Eiq 'not.?found|does not exist' "$WORK/describe" || {
    cat "$WORK/describe" >&2
    fail 1 "whether the node pool $NAME is there cannot be told; what gcloud says stands above"
  }
  for zone in "${ZONES[@]}"; do
    if [ "${zone%-*}" != "$LOCATION" ] && [ "$zone" != "$LOCATION" ]; then
      say "left out: $zone is not in the cluster's location, $LOCATION"
      continue
    fi
    say "asking for $HOSTS node(s) of $MACHINE${SPOT:+ on spot} in $zone"
    flags=(--cluster="$CLUSTER" --location="$LOCATION" --node-locations="$zone" --machine-type="$MACHINE")
    flags+=(--num-nodes="$HOSTS" --scopes=https://www.googleapis.com/auth/cloud-platform)
    if [ "$HOSTS" -gt 1 ]; then flags+=(--tpu-topology="$TOPOLOGY"); fi
    if [ -n "$SPOT" ]; then flags+=(--spot); fi
    code=0
    cloud container node-pools create "$NAME" "${flags[@]}" --quiet 2>&1 | tee "$WORK/create" >&2 || code=$?
    [ "$code" != 0 ] || return 0
    code=0
    judge "$WORK/create" "$zone" || code=$?
    # A pool that got no machines stays behind, empty: the next zone needs its name.
    cloud container node-pools delete "$NAME" --cluster="$CLUSTER" --location="$LOCATION" --quiet || true
  done
  fail 1 "no capacity in ${ZONES[*]} of $LOCATION: try again later, or another cluster"
}

build() {
  if cloud artifacts docker images describe "$IMAGE" >/dev/null 2>&1; then
    say "the image $IMAGE is there"
    return
  fi
  say "building $IMAGE"
  dockerfile >"$WORK/gemma-tpu/Dockerfile"
  cloud builds submit "$WORK/gemma-tpu" --tag="$IMAGE"
}

# The token goes from the environment into a Secret through pipes.
secret() {
  kubectl get namespace "$NAMESPACE" >/dev/null 2>&1 || kubectl create namespace "$NAMESPACE"
  [ -n "${HF_TOKEN:-}" ] || return 0
  printf '%s' "$HF_TOKEN" |
    kubectl create secret generic "$NAME-hf" --namespace="$NAMESPACE" --from-file=token=/dev/stdin \
      --dry-run=client --output=yaml | kubectl apply --filename=- >/dev/null
}

run_it() {
  check
  pack
  create
  build
  secret
  kubectl get localqueue "$QUEUE" --namespace="$NAMESPACE" >/dev/null 2>&1 || queue | kubectl apply --filename=-
  jobset | kubectl apply --filename=-
  follow
  told_results
  say "the node pool $NAME is still there, and costs until it is deleted"
  if [ -t 0 ] || [ "$YES" = 1 ]; then delete; else say "delete it: gemma-tpu launch ... --delete --run"; fi
}

# The log of its first machine, through restarts, until the JobSet has ended.
follow() {
  local ended=
  say "waiting until Kueue lets $NAME in"
  while :; do
    ended=$(kubectl get jobset "$NAME" --namespace="$NAMESPACE" --output=jsonpath='{.status.terminalState}')
    [ -z "$ended" ] || break
    kubectl logs --namespace="$NAMESPACE" --follow --tail=-1 \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" || true
    sleep "$PAUSE"
  done
  [ "$ended" = Completed ] ||
    fail 1 "the JobSet $NAME is $ended; its node pool is still there, and costs: gemma-tpu launch ... --delete --run"
}

logs() {
  need gcloud 'https://cloud.google.com/sdk/docs/install'
  need kubectl 'gcloud components install kubectl gke-gcloud-auth-plugin'
  connect
  follow
}

delete() {
  need gcloud 'https://cloud.google.com/sdk/docs/install'
  need kubectl 'gcloud components install kubectl gke-gcloud-auth-plugin'
  confirm "Delete the JobSet $NAME and its node pool ($HOSTS x $MACHINE) in $CLUSTER? What is in $BUCKET stays." ||
    fail 1 "$NAME is kept, and goes on costing"
  connect
  kubectl delete jobset "$NAME" --namespace="$NAMESPACE" --ignore-not-found
  kubectl delete secret "$NAME-hf" --namespace="$NAMESPACE" --ignore-not-found
  cloud container node-pools delete "$NAME" --cluster="$CLUSTER" --location="$LOCATION" --quiet
  say "$NAME is deleted; what is in $BUCKET stays"
}
