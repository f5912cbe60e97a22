#!/usr/bin/env bash
# Runs a training: as it is, or by `srun`, once on each node of this SLURM job, where `vlm train` starts the node's ranks.
#
#   start_training.sh LAUNCHER NODES CPUS GRES ATTEMPT OUT vlm train ...
#
# LAUNCHER is empty or `srun`, CPUS and GRES are those of a node, OUT is the folder of the stage.
set -euo pipefail
launcher=$1 nodes=$2 cpus=$3 gres=$4 attempt=$5 out=$6
shift 6

# A trainer outlives a snakemake that is killed, so the next one waits for it; a SLURM job would hold its GPUs idle.
[ -n "$launcher" ] || exec "$@" --wait

# Snakemake tries every failed job again. What a retry cannot mend is not tried: settings or data that were refused, or a
# fault that came twice without a new checkpoint between. A snakemake that is started anew begins with its attempt 1.
failures="$out/failures"
latest() { cat "$out/checkpoints/latest" 2> /dev/null || echo none; }
mkdir -p "$out"
[ "$attempt" -gt 1 ] || rm -f "$failures"
if [ -f "$failures" ]; then
    if grep -qx refused "$failures" || [ "$(grep -cxF "$(latest)" "$failures")" -ge 2 ]; then
        echo "Not tried again: it would end as the attempt before did (see the log of that job)." >&2
        exit 1
    fi
fi

head=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* BatchHost=\([^ ]*\).*/\1/p')
MASTER_ADDR=$(scontrol show node --oneliner "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# A node that ends with 75 must not take along the one that is still saving, whatever the site's KillOnBadExit; one that
# never comes up must not be waited for in vain.
code=0
"$launcher" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --gres="$gres" \
    --input=none --unbuffered --kill-on-bad-exit=0 --wait=60 "$@" || code=$?
case $code in
    2) echo refused >> "$failures" ;;
    1) latest >> "$failures" ;;
esac
exit "$code"
