//! What is there: the kernel's structure layouts, mounts, network namespaces, listening sockets and who has them.

mod kernel;
mod listeners;
mod mounts;
mod namespaces;
mod pods;
mod processes;

pub use kernel::{KernelOffsets, kernel_offsets};
pub use listeners::{Listener, listeners, listening};
pub use mounts::{cgroup2_mount, ensure_bpffs, is_bpffs, is_cgroup2};
pub use namespaces::{Namespace, Wanted, find, namespaces};
pub use pods::{addresses, pod_of_process, source_towards};
pub use processes::{Owner, owners};
