#!/bin/bash
# A "machine" made of namespaces, with containerd, kubelet and kube-proxy. Everything on it ends with its first process.
#
#   node.sh run CGROUP NAME STATE KUBEALL    started in the network namespace of the node
#   node.sh enter CGROUP PID COMMAND...      runs a command on the node whose first process is PID
#
# CGROUP is the node's cgroup below the root of every hierarchy. STATE is a directory with what the node needs to know, and its logs.
# The disk of the node is memory: nothing of it is left when it is gone.
set -eu
PATH=$PATH:/usr/sbin:/sbin
kit=$(cd "$(dirname "$0")" && pwd)

# The directory of the node's cgroup in every hierarchy.
cgroups() {
  local mount kind
  while read -r _ mount kind _; do
    case $kind in cgroup | cgroup2) echo "$mount/$1" ;; esac
  done < /proc/self/mounts
}

join() {
  local cgroup
  cgroups "$1" | while read -r cgroup; do
    if [ -d "$cgroup/init" ]; then cgroup=$cgroup/init; fi
    echo $$ > "$cgroup/cgroup.procs"
  done
}

make_cgroups() {
  local cgroup step
  cgroups "$1" | while read -r cgroup; do
    mkdir -p "$cgroup"
    for step in "${cgroup%/*}" "$cgroup"; do
      # Version 1: nothing runs in a cpuset that has neither.
      if [ -f "$step/cpuset.mems" ] && [ ! -f "$step/cgroup.controllers" ]; then
        cat "${step%/*}/cpuset.cpus" > "$step/cpuset.cpus"
        cat "${step%/*}/cpuset.mems" > "$step/cpuset.mems"
      fi
    done
    if [ -f "$cgroup/cgroup.controllers" ]; then share_out "${cgroup%/*}"; fi
  done
}

# Version 2: hands every controller on to the cgroups below.
share_out() {
  sed -E 's/[a-z_]+/+&/g' "$1/cgroup.controllers" > "$1/cgroup.subtree_control"
}

mount_cgroups() {
  local controllers each options
  # /proc is the node's, and its mounts still those of the machine.
  controllers=$(awk '$3 == "cgroup" { sub(".*/", "", $2); print $2 }' /proc/self/mounts)
  mount -t sysfs sysfs /sys
  if [ -z "$controllers" ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # A cgroup that hands controllers on has no processes of its own.
    mkdir /sys/fs/cgroup/init
    echo 1 > /sys/fs/cgroup/init/cgroup.procs
    share_out /sys/fs/cgroup
    return
  fi
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  for each in $controllers; do
    mkdir "/sys/fs/cgroup/$each"
    case $each in systemd) options=none,name=systemd ;; *) options=$each ;; esac
    mount -t cgroup -o "$options" cgroup "/sys/fs/cgroup/$each"
  done
  mkdir /sys/fs/cgroup/unified
  mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
}

case $1 in
  run)
    make_cgroups "$2"
    join "$2"
    exec unshare --cgroup --mount --pid --uts --ipc --fork --kill-child --propagation private "$0" first "${@:3}"
    ;;
  enter)
    join "$2"
    exec nsenter -t "$3" -n -m -p -u -i -C "${@:4}"
    ;;
  first) shift ;;
  *)
    echo "usage: node.sh run|enter ..." >&2
    exit 2
    ;;
esac

# The first process of the node.
name=$1 state=$2 kubeall=$3
exec > "$state/node.log" 2>&1
hostname "$name"
# A peer group of its own, so that mounts of containers show on the node (Bidirectional), and no further.
mount --make-rshared /
mount -t proc proc /proc
mount_cgroups
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null || true
mount -t tracefs tracefs /sys/kernel/tracing 2> /dev/null || true
# Where the machine has these files is nobody's business: /run and /var become the node's own, and they may be below.
disk=$state/disk
mkdir -p "$disk"
mount -t tmpfs -o mode=755 tmpfs "$disk"
mkdir -p "$disk"/run/{lock,node/{kit,state,cni,images}} "$disk"/var/{lib/{containerd,kubelet,cni},log/{pods,containers},tmp}
ln -s /run "$disk/var/run"
touch "$disk/run/node/kubeall"
mount --bind "$kubeall" "$disk/run/node/kubeall"
mount --bind "$kit" "$disk/run/node/kit"
mount --bind "$state" "$disk/run/node/state"
mount --bind "$state/../images" "$disk/run/node/images"
cp "$state/cni.conflist" "$disk/run/node/cni/10-pods.conflist"
mount --rbind "$disk/run" /run
mount --rbind "$disk/var" /var
cd /run/node/state
# kubelet insists on these values. They are the whole machine's: it is shown others instead of changing them.
for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
  file=/run/node/${setting%%=*}
  mkdir -p "${file%/*}"
  echo "${setting#*=}" > "$file"
  mount --bind "$file" "/proc/sys/${setting%%=*}"
done
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
# Without this module a pod can't reach itself through a Service.
if [ -e /proc/sys/net/bridge ]; then echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables; fi

containerd -c /run/node/kit/containerd.toml > containerd.log 2>&1 &
for _ in $(seq 300); do
  ctr version > /dev/null 2>&1 && break
  sleep 0.1
done
for image in /run/node/images/*.tar; do ctr -n k8s.io images import --digests=false "$image"; done
# Whoever started this node says when there is an API server.
while [ ! -e go ]; do sleep 0.1; done
/run/node/kubeall kubelet --config /run/node/kit/kubelet.yaml --kubeconfig kubelet.kubeconfig \
  --hostname-override "$name" --node-ip "$(< addresses)" --root-dir /var/lib/kubelet > kubelet.log 2>&1 &
/run/node/kubeall kube-proxy --config /run/node/kit/kube-proxy.yaml --hostname-override "$name" > kube-proxy.log 2>&1 &
# It also waits for what was left to it by others.
trap 'exit 0' TERM INT
while :; do wait -n || sleep 1; done
