# --- a managed job of SkyPilot, which creates the machine, recovers it and deletes it ---

check() {
  need sky "pip install 'skypilot[gcp]', then sky check gcp"
  need gcloud 'https://cloud.google.com/sdk/docs/install, then gcloud auth login'
  EVERY_ZONE=1
  check_bucket
}

run_it() {
  local flags=(--name "$NAME")
  check
  pack
  task >"$WORK/task.yaml"
  # By name alone: sky takes the value from the environment.
  if [ -n "${HF_TOKEN:-}" ]; then flags+=(--secret HF_TOKEN); fi
  if [ "$YES" = 1 ]; then flags+=(--yes); fi
  cd "$WORK" # file_mounts of the task are relative to here
  sky jobs launch "${flags[@]}" task.yaml
  told_results
}

logs() {
  need sky "pip install 'skypilot[gcp]'"
  sky jobs logs --name "$NAME"
}

delete() {
  need sky "pip install 'skypilot[gcp]'"
  confirm "Cancel the job $NAME and delete its machine? What is in $BUCKET stays." ||
    fail 1 "$NAME is kept, and goes on costing"
  sky jobs cancel --name "$NAME" --yes
  say "$NAME is cancelled; what is in $BUCKET stays"
}
