//! What there is on this machine: the kernel's structure layouts, mounts, netns, listening sockets
//! and who has them.

mod cgroups;
mod kernel_offsets;
mod listeners;
mod mounts;
mod netns;
mod pod_cgroups;
mod pod_netns;
mod pods;
mod processes;

pub use cgroups::{cgroup_ids, cgroups};
pub use kernel_offsets::kernel_offsets;
pub use listeners::{Listener, has_address, listeners, listening};
pub use mounts::{cgroup, cgroup2_mount, ensure_bpffs, is_bpffs, is_cgroup2, stays_here};
pub use netns::{
    FoundNetns, Look, Netns, NetnsHint, OpenNetns, Place, Progress, Search, Thread,
    UnreachableNetns, find_netns, live_netns, look_everywhere,
};
pub use pod_cgroups::pod_cgroups;
pub use pod_netns::pod_netns;
pub use pods::{addresses, pod_of_process, source_towards};
pub use processes::{Owners, SocketOwner, is_ending, owned_by, owners, process_name};
