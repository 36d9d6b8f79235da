//! The programs of the kernel half, one row each: loading, attaching, pinning, replacing, the trial
//! load and `doctor` go over this table.

use aya::programs::ProgramType;
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_SOCK_OPS, BPF_SK_LOOKUP,
};
use aya_obj::generated::bpf_func_id::{
    self, BPF_FUNC_get_current_task_btf, BPF_FUNC_get_netns_cookie, BPF_FUNC_jiffies64,
    BPF_FUNC_ktime_get_ns, BPF_FUNC_loop, BPF_FUNC_ringbuf_reserve, BPF_FUNC_sk_assign,
    BPF_FUNC_sk_lookup_tcp, BPF_FUNC_sk_release, BPF_FUNC_sk_storage_delete,
    BPF_FUNC_sk_storage_get, BPF_FUNC_skc_to_tcp_sock, BPF_FUNC_sock_map_update,
    BPF_FUNC_sock_ops_cb_flags_set,
};

/// Every program that is attached, in the order in which they are loaded and attached: a client
/// that is placed can be told at once what it connected to.
pub static PROGRAMS: [Program; 6] = [
    Program {
        name: "account",
        hook: Hook::SockOps,
        purpose: "registers listeners and counts connections",
        needs: "CONFIG_CGROUP_BPF",
        helpers: &[
            BPF_FUNC_get_netns_cookie,
            BPF_FUNC_get_current_task_btf,
            BPF_FUNC_loop,
            BPF_FUNC_sk_storage_get,
            BPF_FUNC_sk_storage_delete,
            BPF_FUNC_sock_map_update,
            BPF_FUNC_sock_ops_cb_flags_set,
            BPF_FUNC_ringbuf_reserve,
        ],
    },
    Program {
        name: "steer",
        hook: Hook::SkLookup,
        purpose: "chooses the backend of each new connection",
        needs: "Linux 5.9, CONFIG_BPF_SYSCALL and CONFIG_INET",
        helpers: &[
            BPF_FUNC_ktime_get_ns,
            BPF_FUNC_jiffies64,
            BPF_FUNC_loop,
            BPF_FUNC_sk_assign,
            BPF_FUNC_sk_release,
            BPF_FUNC_skc_to_tcp_sock,
            BPF_FUNC_ringbuf_reserve,
        ],
    },
    Program {
        name: "place_peer4",
        hook: Hook::GetPeerName4,
        purpose: "shows IPv4 clients the address that they connected to",
        needs: "Linux 5.8, CONFIG_CGROUP_BPF",
        helpers: &[BPF_FUNC_sk_storage_get],
    },
    Program {
        name: "place_peer6",
        hook: Hook::GetPeerName6,
        purpose: "shows IPv6 clients the address that they connected to",
        needs: "Linux 5.8, CONFIG_CGROUP_BPF",
        helpers: &[BPF_FUNC_sk_storage_get],
    },
    Program {
        name: "place_connect4",
        hook: Hook::Connect4,
        purpose: "sends connects of IPv4 clients to the endpoint that should have them",
        needs: "Linux 4.17, CONFIG_CGROUP_BPF",
        helpers: PLACING_HELPERS,
    },
    Program {
        name: "place_connect6",
        hook: Hook::Connect6,
        purpose: "sends connects of IPv6 clients to the endpoint that should have them",
        needs: "Linux 4.17, CONFIG_CGROUP_BPF",
        helpers: PLACING_HELPERS,
    },
];

/// What the programs call that choose at `connect()`.
const PLACING_HELPERS: &[bpf_func_id] = &[
    BPF_FUNC_ktime_get_ns,
    BPF_FUNC_get_netns_cookie,
    BPF_FUNC_loop,
    BPF_FUNC_sk_lookup_tcp,
    BPF_FUNC_sk_release,
    BPF_FUNC_sk_storage_get,
];

/// The iterator over the sockets that were placed. It is attached to nothing, and pinned nowhere:
/// the daemon runs it.
pub const PLACED_SOCKETS: &str = "placed_sockets";

/// The program that sees the messages of connections that are being moved. It is attached to a map
/// that only the daemon has.
pub const GOAWAY: &str = "goaway";

/// One program of the kernel half.
#[derive(Debug)]
pub struct Program {
    /// The name of its function, which the kernel shows too: at most 15 bytes.
    pub name: &'static str,
    /// Where the kernel calls it.
    pub hook: Hook,
    /// The purpose of the program, a verb with its object: it follows "it" in a sentence.
    pub purpose: &'static str,
    /// The version or the options of a kernel that has its hook.
    pub needs: &'static str,
    /// The helpers that the program calls.
    pub helpers: &'static [bpf_func_id],
}

impl Program {
    /// The row with that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        PROGRAMS.iter().find(|program| program.name == name)
    }

    /// What the name of its links' pins begins with; the target's number follows.
    pub fn pin_prefix(&self) -> String {
        format!("link_{}_", self.name)
    }
}

/// A place where the kernel calls a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Changes of a TCP socket: it listens, is established or closes.
    SockOps,
    /// The look-up of a listener for a SYN.
    SkLookup,
    /// `connect()` of an IPv4 socket.
    Connect4,
    /// `connect()` of an IPv6 socket.
    Connect6,
    /// `getpeername()` and `accept()` of an IPv4 socket.
    GetPeerName4,
    /// `getpeername()` and `accept()` of an IPv6 socket.
    GetPeerName6,
}

/// What a part of the programs is for. Each part is attached and detached as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Registers listeners and counts connections: always attached.
    Counting,
    /// Chooses backends: attached to each guarded netns.
    Steering,
    /// Chooses endpoints for clients: attached while there is a frontend.
    Placing,
}

impl Part {
    /// Its programs.
    pub fn programs(self) -> impl Iterator<Item = &'static Program> {
        PROGRAMS
            .iter()
            .filter(move |program| program.hook.part() == self)
    }
}

impl Hook {
    /// The name of the hook in the kernel's documentation.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SockOps => "sock_ops",
            Self::SkLookup => "sk_lookup",
            Self::Connect4 => "cgroup/connect4",
            Self::Connect6 => "cgroup/connect6",
            Self::GetPeerName4 => "cgroup/getpeername4",
            Self::GetPeerName6 => "cgroup/getpeername6",
        }
    }

    /// The type of the hook's programs.
    pub const fn program_type(self) -> ProgramType {
        match self {
            Self::SockOps => ProgramType::SockOps,
            Self::SkLookup => ProgramType::SkLookup,
            Self::Connect4 | Self::Connect6 | Self::GetPeerName4 | Self::GetPeerName6 => {
                ProgramType::CgroupSockAddr
            }
        }
    }

    /// The attach type of the hook's programs.
    pub const fn attach_type(self) -> bpf_attach_type {
        match self {
            Self::SockOps => BPF_CGROUP_SOCK_OPS,
            Self::SkLookup => BPF_SK_LOOKUP,
            Self::Connect4 => BPF_CGROUP_INET4_CONNECT,
            Self::Connect6 => BPF_CGROUP_INET6_CONNECT,
            Self::GetPeerName4 => BPF_CGROUP_INET4_GETPEERNAME,
            Self::GetPeerName6 => BPF_CGROUP_INET6_GETPEERNAME,
        }
    }

    /// The kind of object that the hook's programs are attached to.
    pub const fn target(self) -> Target {
        match self {
            Self::SkLookup => Target::Netns,
            _ => Target::Cgroup,
        }
    }

    /// What the hook's programs are for.
    pub const fn part(self) -> Part {
        match self {
            Self::SockOps => Part::Counting,
            Self::SkLookup => Part::Steering,
            Self::Connect4 | Self::Connect6 | Self::GetPeerName4 | Self::GetPeerName6 => {
                Part::Placing
            }
        }
    }
}

/// What programs are attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The cgroup whose sockets are counted, by its id: the inode of its directory.
    Cgroup,
    /// Each guarded netns, by its cookie.
    Netns,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_no_prefix_begins_another() {
        for program in &PROGRAMS {
            assert!(program.name.len() <= 15, "{}", program.name);
            let prefix = program.pin_prefix();
            let begun = |other: &&Program| other.pin_prefix().starts_with(&prefix);
            assert_eq!(PROGRAMS.iter().filter(begun).count(), 1);
        }
    }
}
