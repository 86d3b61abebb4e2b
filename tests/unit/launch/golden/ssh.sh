#!/bin/bash
# math on 2 hosts; rendered by `rlhf3d launch ssh`. Run it on node-1, which reaches
# the others by ssh without a password; all have /shared/rlhf3d and what the configuration names.
set -uo pipefail
cd /shared/rlhf3d || exit 1
# shellcheck disable=SC1091
source .venv/bin/activate
export RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# Who knows the token can run code on the nodes.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}

workers=(node-2)
port=6379
# Short, whatever the host is called: sockets' paths below it have 107 characters at most.
ray_files=/tmp/rlhf3d-$port-$(hostname | cksum | cut -d ' ' -f 1)
ray=(--block --disable-usage-stats --temp-dir="$ray_files")
ray+=(--num-gpus=4)

case ${1:-run} in
start) # on a worker, by the head
    nohup ray start --address="$2" "${ray[@]}" >"$ray_files.log" 2>&1 </dev/null &
    echo $! >"$ray_files.pid"
    exit
    ;;
stop)
    [[ -f $ray_files.pid ]] && kill "$(<"$ray_files.pid")" 2>/dev/null
    rm -f "$ray_files.pid"
    exit
    ;;
esac

on() { # on HOST ARGUMENT...: this script there, with the token
    { echo "export RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN" && cat "$script"; } |
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$1" bash -s -- "${@:2}"
}
script=$(mktemp) && cp "${BASH_SOURCE[0]}" "$script"
ray_head=

# shellcheck disable=SC2317,SC2329
end_ray() { # called by the trap
    trap '' USR1 TERM INT
    for host in "${workers[@]}"; do
        on "$host" stop || echo "could not end Ray on $host" >&2
    done
    rm -f "$script"
    [[ -n $ray_head ]] && kill "$ray_head" 2>/dev/null
    wait
}
trap end_ray EXIT

fail() {
    echo "$1; see $ray_files.log" >&2
    exit 1
}

head_ip=$(python -c 'import ray; print(ray.util.get_node_ip_address())') || fail "python cannot import ray"
# A session of its own: Ctrl-C and what is sent to this script's processes is for the run, which needs Ray to save.
setsid ray start --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false "${ray[@]}" \
    >"$ray_files.log" 2>&1 &
ray_head=$!
deadline=$((SECONDS + 900))
until (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; do
    kill -0 "$ray_head" 2>/dev/null || fail "the head of Ray ended"
    ((SECONDS < deadline)) || fail "the head of Ray does not answer at $head_ip:$port after 900 s"
    sleep 1
done
for host in "${workers[@]}"; do
    on "$host" start "$head_ip:$port" || fail "could not start Ray on $host"
done

# The run waits until all nodes are there (cluster.startup_timeout_s) and names those that are not.
rlhf3d train configs/math.yaml trainer.output_dir=/shared/runs/math cluster.platform=cuda cluster.num_nodes=2 cluster.gpus_per_node=4 trainer.max_wall_clock_s=13200 cluster.ray_address="$head_ip:$port" &
driver=$!
trap 'kill -s USR1 "$driver"' USR1
trap 'kill -s TERM "$driver"' TERM
wait "$driver"
status=$?
while kill -0 "$driver" 2>/dev/null; do # a forwarded signal ends `wait` before the driver
    wait "$driver"
    status=$?
done
exit "$status"
