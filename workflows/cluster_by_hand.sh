#!/usr/bin/env bash
# How does a job run on a cluster that is started by hand?
#
#     workflows/cluster_by_hand.sh job.toml        all on this machine; two workers
#
# On several machines, run the three commands where they belong. For your own site, change:
#   1. SHARED     a directory that all machines see; the files of the job lie in such a one as well
#   2. HOST       the address of the scheduler's machine that the others reach, instead of 127.0.0.1
#   3. WORKERS    workers per machine; one thread each, so one per core (per GPU on GPU machines)
#   4. MEMORY     of each worker: its experts and a few token chunks; above 0.8 of it a worker pauses
#   5. TLS        "--tls-ca-file ca.pem --tls-cert cert.pem --tls-key key.pem" where others have access
set -euo pipefail

JOB=${1:?give a job file}
SHARED=${SHARED:-$(mktemp -d)}
HOST=${HOST:-127.0.0.1}
WORKERS=${WORKERS:-2}
MEMORY=${MEMORY:-auto}
TLS=${TLS:-}
RUN_OPTIONS=${RUN_OPTIONS:-}

# A task is given up when so many workers have died on which it waited: more than there are workers.
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=${ALLOWED_FAILURES:-100}

# Workers keep freed memory of a packet's size for the next packet: as Dask starts them, they do not.
export MALLOC_MMAP_THRESHOLD_=4194304 MALLOC_TRIM_THRESHOLD_=33554432

stop() { # the last started first: workers leave in good order while the scheduler is there
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do
        kill "${started[i]}" 2> /dev/null && wait "${started[i]}" || true
    done
}
started=()
trap stop EXIT

# 1. On one machine, the scheduler.
dask scheduler --host "$HOST" --port 0 --scheduler-file "$SHARED/scheduler.json" \
    --dashboard-address "$HOST:0" $TLS &
started+=($!)

# 2. On every machine, workers. Started with a nanny, a worker that dies comes again by itself.
dask worker --scheduler-file "$SHARED/scheduler.json" --nworkers "$WORKERS" --nthreads 1 \
    --host "$HOST" --memory-limit "$MEMORY" --local-directory "${TMPDIR:-/tmp}" $TLS &
started+=($!)

# 3. Anywhere, the job; stopped by anything, --resume goes on with it.
for _ in $(seq 300); do [ -s "$SHARED/scheduler.json" ] && break; sleep 0.1; done
python -m dask_ep run "$JOB" --scheduler-file "$SHARED/scheduler.json" \
    --world-size "${WORLD_SIZE:-$WORKERS}" $TLS $RUN_OPTIONS
