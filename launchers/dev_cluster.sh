#!/usr/bin/env bash
# A throw-away SLURM on this one machine, to try launcher=slurm without a cluster. The test suite runs on it too.
#
#   launchers/dev_cluster.sh up [knob=value ...]     start it; returns when every node is idle
#   . "$(launchers/dev_cluster.sh env)"              this shell's sbatch, squeue, ... talk to it
#   launchers/dev_cluster.sh status                  what runs (exit code 0), or that nothing does (3)
#   launchers/dev_cluster.sh down                    end it: jobs, daemons and the folder are gone
#   launchers/dev_cluster.sh install                 as root: its packages, and no more
#
# Knobs, as up takes them (`down`, `status` and `env` take folder= alone):
#   folder=DIR            where everything of it lies (default: supar-dev-cluster-<user> in $TMPDIR or /tmp); munge wants
#                         each folder above it to be passable for all (chmod +x)
#   nodes=2               pretended nodes, n1 n2 ..., all of them this machine
#   cpus=4 mem_mb=4000    of each node; memory is enforced: a job that takes more than it asked for is killed
#   gpus=2                fake GPUs of each node: they can be asked for and are handed out, and compute nothing
#   max_array_size=1001   as in slurm.conf: one more than the highest index of an array
#   max_job_count=20000   as in slurm.conf: jobs that the controller knows at once, array elements and ended jobs counted
#   min_job_age_s=300     as MinJobAge in slurm.conf: how long it knows a job that has ended
#   accounting=true       with slurmdbd and a private MariaDB, so that sacct answers; false: as sites without it
#   max_submit_jobs=0     jobs that a user may have in the queue, array elements counted; 0: any number; needs accounting
#   grace_s=10            a preempted job's seconds between SIGTERM and SIGKILL
#   port=17000            the first of its ports on 127.0.0.1: 11 + nodes from here on
#
# Partitions: gpu (the default; its jobs are preempted and requeued), urgent (preempts them), cancelling (as gpu, but its
# jobs are cancelled where gpu's are requeued).
#
# It needs Debian's or Ubuntu's packages. Missing ones are installed by root; anyone else is told their names. Once they
# are there it runs as any user, for that user's jobs alone. Only one can run on a machine, unless port= differs.
set -euo pipefail

fail() { printf 'dev_cluster.sh: %s\n' "$*" >&2; exit 1; }
say() { printf 'dev_cluster.sh: %s\n' "$*" >&2; }

declare -A knob=(
    [folder]="${TMPDIR:-/tmp}/supar-dev-cluster-$(id -un)" [nodes]=2 [cpus]=4 [mem_mb]=4000 [gpus]=2
    [max_array_size]=1001 [max_job_count]=20000 [min_job_age_s]=300 [accounting]=true [max_submit_jobs]=0 [grace_s]=10 [port]=17000
)

command="${1:-}"
[ $# -gt 0 ] && shift
case "$command" in
up | down | status | env | install) ;;
*) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "$command" = help ] || [ "$command" = --help ] || exit 2; exit 0 ;;
esac
for word in "$@"; do
    name="${word%%=*}"
    [ "$name" != "$word" ] && [ -n "${knob[$name]+there}" ] ||
        fail "no such knob: $word; knobs: $(printf '%s\n' "${!knob[@]}" | sort | tr '\n' ' ')"
    [ "$command" = up ] || [ "$name" = folder ] || fail "$command takes folder= alone, not $name="
    knob[$name]="${word#*=}"
done
for name in nodes cpus mem_mb gpus max_array_size max_job_count min_job_age_s max_submit_jobs grace_s port; do
    [[ "${knob[$name]}" =~ ^[0-9]+$ ]] || fail "$name=${knob[$name]}: must be a whole number"
done
for name in nodes cpus mem_mb; do
    [ "${knob[$name]}" -ge 1 ] || fail "$name=${knob[$name]}: must be at least 1"
done
for name in max_job_count min_job_age_s; do
    [ "${knob[$name]}" -ge 2 ] || fail "$name=${knob[$name]}: must be at least 2"
done
[ "${knob[max_array_size]}" -ge 2 ] || fail "max_array_size=${knob[max_array_size]}: must be at least 2"
case "${knob[accounting]}" in true | false) ;; *) fail "accounting=${knob[accounting]}: must be true or false" ;; esac
[ "${knob[max_submit_jobs]}" -eq 0 ] || [ "${knob[accounting]}" = true ] ||
    fail "max_submit_jobs=${knob[max_submit_jobs]}: needs accounting=true, where the limit is kept"

folder="$(realpath -m -- "${knob[folder]}")"
case "$folder" in *[[:space:]%]*) fail "folder=$folder: SLURM takes no blank or % in it" ;; esac
[ ${#folder} -le 80 ] || fail "folder=$folder: longer than the 80 characters that leave room for a socket's name"
marker="$folder/dev-cluster" # says that the folder is ours to delete, and holds the knobs
export SLURM_CONF="$folder/etc/slurm.conf"
knobs() { for name in $(printf '%s\n' "${!knob[@]}" | sort); do printf '%s=%s\n' "$name" "${knob[$name]}"; done; }

# ---------------------------------------------------------------- processes
# Daemons are known by a variable in their environment that no user's shell has; what runs in their jobs, by
# SLURM's own variables.
daemons() { grep -lsz "^SUPAR_DEV_CLUSTER=$folder\$" /proc/[0-9]*/environ | cut -d/ -f3 || true; }
in_jobs() {
    grep -lsz "^SLURM_CONF=$SLURM_CONF\$" /proc/[0-9]*/environ | xargs -r grep -lsz '^SLURMD_NODENAME=' | cut -d/ -f3 |
        grep -vx "$$" || true
}
daemon() { env -u LD_PRELOAD SUPAR_DEV_CLUSTER="$folder" "$@"; }
living() { # of the given process ids, those that are no zombies
    local pid
    for pid in "$@"; do
        [[ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null)" == [A-Y]* ]] && printf '%s\n' "$pid"
    done
    return 0
}
wait_for() { # wait_for SECONDS COMMAND...: until the command succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}
taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
is_up() { [ -f "$marker" ] && timeout 10 scontrol ping 2>/dev/null | grep -q UP; }
# awk, not grep -c: that fails on no match
n_idle() { timeout 10 sinfo -h -N -p gpu -o %T | awk '$1 == "idle" { n++ } END { print n + 0 }'; }
all_idle() { [ "$(n_idle)" -eq "${knob[nodes]}" ]; }

stop_all() { # jobs first, then what tells of them
    local pids
    if is_up; then
        squeue -h -o %A | sort -u | xargs -r timeout 20 scancel 2>/dev/null || true
        wait_for 10 sh -c '[ -z "$(squeue -h -t running,completing)" ]' || true
    fi
    for signal in TERM KILL; do
        mapfile -t pids < <(living $(daemons) $(in_jobs))
        [ ${#pids[@]} -gt 0 ] || return 0
        kill -s "$signal" "${pids[@]}" 2>/dev/null || true
        for _ in $(seq 100); do
            mapfile -t pids < <(living "${pids[@]}")
            [ ${#pids[@]} -gt 0 ] || break
            sleep 0.1
        done
    done
    mapfile -t pids < <(living $(daemons) $(in_jobs))
    [ ${#pids[@]} -eq 0 ] || fail "these processes do not end: ${pids[*]}"
}

# ---------------------------------------------------------------- packages
install_packages() {
    needs="munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins"
    [ "${knob[accounting]}" = false ] || needs="$needs slurmdbd slurm-wlm-mysql-plugin mariadb-server"
    missing=()
    if command -v dpkg-query >/dev/null; then
        for package in $needs; do
            [[ "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" == *"ok installed" ]] || missing+=("$package")
        done
    elif ! command -v slurmctld >/dev/null; then
        fail "needs Debian's or Ubuntu's packages ($needs), and this system has no dpkg"
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        [ "$(id -u)" -eq 0 ] || fail "packages are missing; as root: apt-get install --no-install-recommends ${missing[*]}"
        say "installing ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq || true # offline, what was fetched before may do
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || fail "apt-get could not install them"
    fi
}

# ---------------------------------------------------------------- down, status, env
show() {
    say "up in $folder: $(n_idle) of ${knob[nodes]} nodes idle, $(squeue -h -r | wc -l) jobs"
    say "talk to it:  . $folder/env"
}
read_knobs() {
    local line
    while IFS= read -r line; do knob["${line%%=*}"]="${line#*=}"; done <"$marker"
}
case "$command" in
down)
    if [ ! -f "$marker" ]; then
        [ ! -e "$folder" ] || fail "$folder was not made by dev_cluster.sh: left alone"
        say "nothing to end in $folder"
        exit 0
    fi
    stop_all
    rm -rf -- "$folder"
    say "ended; $folder is gone"
    exit 0
    ;;
status)
    if is_up; then read_knobs; show; sinfo; squeue; exit 0; fi
    say "not running in $folder"
    exit 3
    ;;
install)
    install_packages
    exit 0
    ;;
env)
    [ -f "$folder/env" ] || fail "not running in $folder: launchers/dev_cluster.sh up"
    printf '%s\n' "$folder/env"
    exit 0
    ;;
esac

# ---------------------------------------------------------------- up: what it needs
if is_up; then
    [ "$(knobs)" = "$(cat "$marker")" ] ||
        fail "already up in $folder with other knobs ($(tr '\n' ' ' <"$marker")): bring it down first"
    show
    exit 0
fi
if [ -e "$folder" ] && [ ! -f "$marker" ] && [ -n "$(ls -A "$folder")" ]; then
    fail "folder=$folder: there is something else in it"
fi
for port in $(seq "${knob[port]}" $((knob[port] + 2))) $(seq $((knob[port] + 11)) $((knob[port] + 10 + knob[nodes]))); do
    taken "$port" || continue
    # grep fails on processes of others
    other="$({ grep -ahsoz '^SUPAR_DEV_CLUSTER=.*' /proc/[0-9]*/environ || true; } | tr '\0' '\n' | sort -u | cut -d= -f2- | paste -sd ' ')"
    [ -z "$other" ] || fail "one dev cluster a machine, and one runs in $other: bring it down (down folder=...), or set port="
    fail "port $port is taken by another program: set port="
done
install_packages
export PATH="$PATH:/usr/sbin"
[ -d /sys/devices ] || fail "/sys is not mounted: slurmd reads the machine's CPUs there"

# ---------------------------------------------------------------- up: configuration
host="$(hostname -s)"
user="$(id -un)"
mkdir -p "$folder"/{etc,run,log,state,dev,db}
chmod 755 "$folder" "$folder"/run # munged refuses a socket that others cannot reach
knobs >"$marker"
printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" >"$folder/env"
head -c 128 /dev/urandom >"$folder/etc/munge.key"
chmod 400 "$folder/etc/munge.key"
socket="$folder/run/munge.socket"
for gpu in $(seq 0 $((knob[gpus] - 1))); do # any character device will do
    [ -e "$folder/dev/gpu$gpu" ] || mknod "$folder/dev/gpu$gpu" c 1 3 2>/dev/null || ln -s /dev/null "$folder/dev/gpu$gpu"
done
gres=""
if [ "${knob[gpus]}" -gt 0 ]; then
    gres="Gres=gpu:${knob[gpus]}"
    printf 'NodeName=n[1-%s] Name=gpu File=%s/dev/gpu[0-%s]\n' \
        "${knob[nodes]}" "$folder" $((knob[gpus] - 1)) >"$folder/etc/gres.conf"
fi
# Named outright: `autodetect` makes slurmd give up where no cgroup file system is mounted.
version="$(slurmd -V | awk '{ print $2 }')"
plugin=cgroup/v1
[ "$(printf '%s\n23.11\n' "$version" | sort -V | head -n 1)" != 23.11 ] || plugin=disabled
printf 'CgroupPlugin=%s\n' "$plugin" >"$folder/etc/cgroup.conf"
{
    cat <<CONF
ClusterName=dev
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${knob[port]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmdSpoolDir=$folder/state/%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
StateSaveLocation=$folder/state/slurmctld
# A trial wants a brisk scheduler and quick verdicts: a second where a cluster takes half a minute.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,preempt_send_user_signal
KillWait=5
SlurmdTimeout=20
UnkillableStepTimeout=300
MinJobAge=${knob[min_job_age_s]}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MaxArraySize=${knob[max_array_size]}
MaxJobCount=${knob[max_job_count]}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Memory is enforced by looking, each second: no cgroups needed.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n[1-${knob[nodes]}] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((knob[port] + 11))-$((knob[port] + 10 + knob[nodes]))] CPUs=${knob[cpus]} RealMemory=${knob[mem_mb]} $gres State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=256 PriorityTier=1 PreemptMode=REQUEUE GraceTime=${knob[grace_s]} State=UP
PartitionName=cancelling Nodes=ALL MaxTime=INFINITE DefMemPerCPU=256 PriorityTier=1 PreemptMode=CANCEL GraceTime=${knob[grace_s]} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefMemPerCPU=256 PriorityTier=10 PreemptMode=OFF State=UP
CONF
    if [ "${knob[accounting]}" = true ]; then
        printf '%s\n' AccountingStorageType=accounting_storage/slurmdbd AccountingStorageHost=127.0.0.1 \
            "AccountingStoragePort=$((knob[port] + 1))" "AccountingStoragePass=$socket" AccountingStorageTRES=gres/gpu
        [ "${knob[max_submit_jobs]}" -eq 0 ] || printf 'AccountingStorageEnforce=limits\n'
    else
        printf 'AccountingStorageType=accounting_storage/none\n'
    fi
} >"$SLURM_CONF"

# ---------------------------------------------------------------- up: daemons
give_up() {
    say "could not start: $1"
    tail -n 5 "$folder"/log/*.log >&2 2>/dev/null || true
    stop_all
    rm -rf -- "$folder"
    exit 1
}
trap 'give_up "interrupted"' INT TERM

daemon munged --key-file="$folder/etc/munge.key" --socket="$socket" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/etc/munge.seed" 2>"$folder/log/munged-start.log" ||
    give_up "munged"
wait_for 60 sh -c "munge --socket='$socket' -n | unmunge --socket='$socket'" || give_up "munged does not answer"

if [ "${knob[accounting]}" = true ]; then
    mysql_user=()
    [ "$(id -u)" -ne 0 ] || mysql_user=(--user=root)
    mariadb-install-db --no-defaults --datadir="$folder/db" "${mysql_user[@]}" --auth-root-authentication-method=normal \
        --skip-test-db >"$folder/log/mariadb-install.log" 2>&1 || give_up "mariadb-install-db"
    daemon mariadbd --no-defaults --datadir="$folder/db" "${mysql_user[@]}" --bind-address=127.0.0.1 \
        --port=$((knob[port] + 2)) --socket="$folder/run/mariadb.socket" --pid-file="$folder/run/mariadb.pid" \
        --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --skip-log-bin \
        </dev/null >"$folder/log/mariadb.log" 2>&1 &
    sql() { mariadb --no-defaults -uroot -S "$folder/run/mariadb.socket" "$@"; }
    wait_for 90 sql -e 'select 1' || give_up "mariadb does not answer"
    sql -e "create database slurm_acct_db; create user 'slurm'@'%' identified by 'slurm';
            grant all on slurm_acct_db.* to 'slurm'@'%'"
    cat >"$folder/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((knob[port] + 1))
SlurmUser=$user
PidFile=$folder/run/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((knob[port] + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
    chmod 600 "$folder/etc/slurmdbd.conf"
    daemon slurmdbd 2>"$folder/log/slurmdbd-start.log" || give_up "slurmdbd"
    wait_for 90 sacctmgr -n list cluster || give_up "slurmdbd does not answer" # its first start makes the tables
    sacctmgr -i add cluster dev >/dev/null || give_up "sacctmgr"
    if [ "${knob[max_submit_jobs]}" -gt 0 ]; then
        { # root is there from the start, with an account of its own
            { sacctmgr -i add account dev && sacctmgr -i add user "$user" account=dev; } || [ "$user" = root ]
            sacctmgr -i modify user where name="$user" set maxsubmitjobs="${knob[max_submit_jobs]}"
        } >"$folder/log/sacctmgr.log" 2>&1 || give_up "sacctmgr"
    fi
fi

daemon slurmctld 2>"$folder/log/slurmctld-start.log" || give_up "slurmctld"
wait_for 90 sh -c 'scontrol ping | grep -q UP' || give_up "slurmctld does not answer"
for node in $(seq "${knob[nodes]}"); do
    mkdir -p "$folder/state/n$node"
    daemon slurmd -N "n$node" 2>"$folder/log/slurmd-n$node-start.log" || give_up "slurmd of n$node"
done
wait_for 90 all_idle || give_up "not all nodes became idle: $(sinfo -h -N -o '%N is %T (%E)' | tr '\n' ' ')"
trap - INT TERM
show
