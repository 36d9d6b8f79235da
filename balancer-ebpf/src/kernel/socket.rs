//! Sockets and tasks, as the running kernel has them in its memory.

use aya_ebpf::bindings::{bpf_sock, tcp_sock};
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_jiffies64, bpf_skc_to_tcp_sock};
use balancer_common::decision::admission::Observation;

use super::context::context;
use super::offsets::{constant, field};

const TCP_LISTEN: u32 = 10;

/// A TCP socket that the verifier knows the type of.
pub struct TcpSocket(*const u8);

impl TcpSocket {
    /// `None` where it is no TCP socket.
    #[inline(always)]
    pub fn of(socket: *mut bpf_sock) -> Option<Self> {
        // SAFETY: the socket lives as long as the program runs; the verifier checks that it is one.
        let tcp: *const tcp_sock = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
        if tcp.is_null() {
            None
        } else {
            Some(Self(tcp.cast()))
        }
    }

    /// User id of the owner.
    #[inline(always)]
    pub fn uid(&self) -> u32 {
        field!(self.0, AT_UID as u32)
    }

    /// Id of the cgroup that it was made in (`cgroup_sk_alloc`, kernel/cgroup/cgroup.c).
    #[inline(always)]
    pub fn cgroup(&self) -> u64 {
        let cgroup: *const u8 = field!(self.0, AT_CGROUP as *const u8);
        let node: *const u8 = field!(cgroup, AT_CGROUP_NODE as *const u8);
        field!(node, AT_NODE_ID as u64)
    }

    /// An IPv6 socket that takes no IPv4.
    #[inline(always)]
    pub fn is_v6_only(&self) -> bool {
        let byte: u8 = field!(self.0, AT_V6_ONLY as u8);
        u32::from(byte) & constant!(V6_ONLY_BIT) != 0
    }

    /// What its owner, or that of the listener that it comes from, has set of keepalive.
    #[inline(always)]
    pub fn chosen(&self) -> Chosen {
        let probes: u8 = field!(self.0, AT_KEEP_PROBES as u8);
        Chosen {
            idle: field!(self.0, AT_KEEP_IDLE as u32) != 0,
            interval: field!(self.0, AT_KEEP_INTERVAL as u32) != 0,
            probes: probes != 0,
            user_timeout: field!(self.0, AT_USER_TIMEOUT as u32) != 0,
        }
    }

    /// The half-open connections and queues of a listener; `entered` is `Totals::entered`.
    #[inline(always)]
    pub fn observe(&self, entered: u64) -> Observation {
        let hz = constant!(HZ);
        let overflow = self.overflow();
        // SAFETY: a helper without arguments.
        let age = (unsafe { bpf_jiffies64() } as u32).wrapping_sub(overflow);
        // 0 is never. It would be a moment ago when the low half of jiffies wraps around, which is
        // also five minutes after each boot (`INITIAL_JIFFIES`, include/linux/jiffies.h).
        let unknown = hz == 0 || overflow == 0;
        Observation {
            half_open: field!(self.0, AT_HALF_OPEN as u32),
            young: field!(self.0, AT_YOUNG as u32),
            fast_open: field!(self.0, AT_FAST_OPEN as u32),
            queue: field!(self.0, AT_QUEUE as u32),
            backlog: field!(self.0, AT_BACKLOG as u32),
            syncookies: self.syncookies(),
            overflow_age: if unknown { u32::MAX } else { age / hz },
            entered,
        }
    }

    /// `sk_err` and `sk_shutdown`.
    #[inline(always)]
    pub fn end(&self) -> (u32, u8) {
        (
            field!(self.0, AT_ERROR as u32),
            field!(self.0, AT_SHUTDOWN as u8),
        )
    }

    /// Jiffies (32 bits) of the last overflow of its SYN queue.
    #[inline(always)]
    fn overflow(&self) -> u32 {
        // Both are read before the choice: the compiler would merge two conditional reads into one
        // of an unknown type. A read through a null pointer gives 0 (BPF_PROBE_MEM).
        let group: *const u8 = field!(self.0, AT_REUSEPORT as *const u8);
        let (own, shared) = (
            field!(self.0, AT_OVERFLOW as u32),
            field!(group, AT_GROUP_OVERFLOW as u32),
        );
        if group.is_null() { own } else { shared }
    }

    #[inline(always)]
    fn syncookies(&self) -> u8 {
        let net: *const u8 = field!(self.0, AT_NET as *const u8);
        field!(net, AT_SYNCOOKIES as u8)
    }
}

/// Which options of keepalive a socket has values of its own for.
pub struct Chosen {
    /// `TCP_KEEPIDLE`.
    pub idle: bool,
    /// `TCP_KEEPINTVL`.
    pub interval: bool,
    /// `TCP_KEEPCNT`.
    pub probes: bool,
    /// `TCP_USER_TIMEOUT`.
    pub user_timeout: bool,
}

/// Whether a socket listens.
#[inline(always)]
pub fn listens(socket: *mut bpf_sock) -> bool {
    context!(socket, state) == TCP_LISTEN
}

/// Thread group id and thread id of the current task, in the initial pid namespace.
#[inline(always)]
pub fn current_task() -> (u32, u32) {
    // SAFETY: a helper without arguments.
    let task: *const u8 = unsafe { bpf_get_current_task_btf() }.cast();
    if task.is_null() {
        (0, 0)
    } else {
        (field!(task, AT_TGID as u32), field!(task, AT_PID as u32))
    }
}
