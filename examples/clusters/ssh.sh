#!/bin/bash
# Pretraining on machines that ssh reaches, started from one of them; Ctrl-C ends all.
#
#     GPUS=8 examples/clusters/ssh.sh "host1 host2" CONFIG [key=value ...]
#
# The folder that this is started in, with its .venv, output_dir and data must be on a file system that all machines share.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: GPUS=8 $0 \"HOST ...\" CONFIG [key=value ...]" >&2
  exit 2
fi
read -r -a hosts <<<"$1"
shift

printf -v command '%q ' .venv/bin/torchrun --nnodes="${#hosts[@]}" --nproc-per-node="${GPUS:-8}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:29400" --rdzv-id=fastmim -m fastmim pretrain "$@"
printf -v folder '%q' "$PWD"
# torchrun's own store would hand out addresses of dead processes after a restart
command="cd $folder && TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 OMP_NUM_THREADS=1 exec $command"

started=()
trap 'kill "${started[@]}" 2>/dev/null || true' EXIT
for host in "${hosts[@]}"; do
  # a terminal, so that the end of ssh ends torchrun
  ssh -tt -o BatchMode=yes "$host" "$command" &
  started+=($!)
done
status=0
for process in "${started[@]}"; do
  wait "$process" || status=$?
done
exit "$status"
