#!/usr/bin/env bash
# How does a job run on a cluster that is started by hand?
#
#     workflows/cluster_by_hand.sh job.toml              all on this machine; two workers
#     workflows/cluster_by_hand.sh job.toml --resume     any option of dask-ep run
#
# It prints what `dask-ep run` prints and has its exit code; scheduler and workers write log files,
# and if one of them fails, the end of its log is shown. On several machines, run each of the three
# commands where its comment says. For your own site, change:
#   1. SHARED     a directory that all machines see, as they must see the files of the job
#   2. HOST       the address at which the other machines reach the scheduler, instead of 127.0.0.1
#   3. WORKERS    workers per machine; one thread each, so one per core (per GPU on GPU machines)
#   4. MEMORY     of each worker: its experts and a few token chunks; above 0.8 of it a worker pauses
#   5. TLS        "--tls-ca-file ca.pem --tls-cert cert.pem --tls-key key.pem" on a shared network
set -euo pipefail
: "${1:?give a job file}"

SHARED=${SHARED:-$(mktemp -d)}
HOST=${HOST:-127.0.0.1}
WORKERS=${WORKERS:-2}
MEMORY=${MEMORY:-auto}
TLS=${TLS:-}

# Dask fails a task when this many of its workers have died: allow more than there are workers.
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=${ALLOWED_FAILURES:-100}

set -m # a process group for each command: Ctrl-C reaches only this script, which ends them in order
names=() started=() run=
start() { # NAME COMMAND...
    names+=("$1")
    "${@:2}" > "$SHARED/$1.log" 2>&1 &
    started+=($!)
}
check() { # fails if any process that was started has ended
    for i in "${!started[@]}"; do
        kill -0 "${started[i]}" 2> /dev/null && continue
        echo "${names[i]} ended; the end of $SHARED/${names[i]}.log:" >&2
        tail -n 5 "$SHARED/${names[i]}.log" >&2
        return 1
    done
}
stop() { # in reverse order: workers leave while the scheduler is still running
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do
        kill "${started[i]}" 2> /dev/null && wait "${started[i]}" || true
    done
}
trap stop EXIT
trap '[ -n "$run" ] || exit 1; kill "$run" 2> /dev/null || true' INT TERM HUP # the run reports its end

# 1. On one machine, the scheduler.
rm -f "$SHARED/scheduler.json"
start scheduler dask scheduler --host "$HOST" --port 0 --dashboard-address "$HOST:0" $TLS \
    --scheduler-file "$SHARED/scheduler.json"

# 2. On every machine, workers. Each has a nanny, which restarts a worker that dies.
start workers dask worker --scheduler-file "$SHARED/scheduler.json" --nworkers "$WORKERS" \
    --nthreads 1 --host "$HOST" --memory-limit "$MEMORY" --local-directory "${TMPDIR:-/tmp}" $TLS

# 3. On any machine, the job, which waits for the workers; whatever stops it, --resume continues it.
until [ -s "$SHARED/scheduler.json" ]; do check; sleep 0.1; done
python -m dask_ep run --scheduler-file "$SHARED/scheduler.json" --workers "$WORKERS" $TLS "$@" &
run=$!
while kill -0 "$run" 2> /dev/null; do
    wait -n || true # until one of the three ends, or a signal arrives
    check || { kill "$run" 2> /dev/null; wait "$run" || exit 1; }
done
wait "$run"
