//! Reads of kernel structures at offsets that the daemon takes from the running kernel's BTF and sets before loading.

pub mod atomic;

use aya_ebpf::bindings::{bpf_sock, tcp_sock};
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_jiffies64, bpf_skc_to_tcp_sock};
use balancer_common::decision::admission::Observation;
use core::ptr::read_volatile;

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $($(#[$doc])* #[unsafe(no_mangle)] pub static $name: $type = 0;)*
    };
}

constants! {
    /// Cookie of the namespace that this instance of `steer` is attached to.
    NETNS: u64;
    /// Jiffies a second (`CONFIG_HZ`).
    HZ: u32;
    /// `inet_connection_sock.icsk_accept_queue.qlen`.
    AT_HALF_OPEN: u32;
    /// `inet_connection_sock.icsk_accept_queue.young`.
    AT_YOUNG: u32;
    /// `inet_connection_sock.icsk_accept_queue.fastopenq.qlen`.
    AT_FAST_OPEN: u32;
    /// `sock.sk_ack_backlog`.
    AT_QUEUE: u32;
    /// `sock.sk_max_ack_backlog`.
    AT_BACKLOG: u32;
    /// `tcp_sock.rx_opt.ts_recent_stamp`: the last overflow of a listener (`tcp_synq_overflow`, include/net/tcp.h).
    AT_OVERFLOW: u32;
    /// `sock.sk_reuseport_cb`.
    AT_REUSEPORT: u32;
    /// `sock_reuseport.synq_overflow_ts`: the same for a SO_REUSEPORT group.
    AT_GROUP_OVERFLOW: u32;
    /// `sock_common.skc_net.net`.
    AT_NET: u32;
    /// `net.ipv4.sysctl_tcp_syncookies`.
    AT_SYNCOOKIES: u32;
    /// `sock.sk_uid`.
    AT_UID: u32;
    /// The byte of `sock_common.skc_ipv6only`.
    AT_V6_ONLY: u32;
    /// Its bit in that byte.
    V6_ONLY_BIT: u32;
    /// `task_struct.tgid`.
    AT_TGID: u32;
    /// `task_struct.pid`.
    AT_PID: u32;
}

/// Reads a constant that the loader has set; volatile, because the compiler sees a zero.
macro_rules! constant {
    ($name:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $crate::kernel::$name) }
    };
}
pub(crate) use constant;

/// Reads a field of a program's context; volatile, because the verifier forbids what the compiler likes to do: to choose
/// among fields by arithmetic on the pointer. Arrays are read word by word, as the verifier demands.
macro_rules! context {
    ($context:expr, local_ip6) => {
        $crate::kernel::words!($context, local_ip6)
    };
    ($context:expr, remote_ip6) => {
        $crate::kernel::words!($context, remote_ip6)
    };
    ($context:expr, $field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const (*$context).$field) }
    };
}
pub(crate) use context;

macro_rules! words {
    ($context:expr, $field:ident) => {
        unsafe {
            [
                core::ptr::read_volatile(&raw const (*$context).$field[0]),
                core::ptr::read_volatile(&raw const (*$context).$field[1]),
                core::ptr::read_volatile(&raw const (*$context).$field[2]),
                core::ptr::read_volatile(&raw const (*$context).$field[3]),
            ]
        }
    };
}
pub(crate) use words;

macro_rules! field {
    ($base:expr, $offset:ident as $type:ty) => {{
        let offset = constant!($offset) as usize;
        unsafe { read_volatile($base.add(offset).cast::<$type>()) }
    }};
}

const TCP_LISTEN: u32 = 10;

/// A TCP socket that the verifier knows the type of.
pub struct TcpSocket(*const u8);

impl TcpSocket {
    /// `None` where it is no TCP socket.
    #[inline(always)]
    pub fn of(socket: *mut bpf_sock) -> Option<Self> {
        let tcp: *const tcp_sock = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
        if tcp.is_null() {
            None
        } else {
            Some(Self(tcp.cast()))
        }
    }

    /// Owner.
    #[inline(always)]
    pub fn uid(&self) -> u32 {
        field!(self.0, AT_UID as u32)
    }

    /// An IPv6 socket that takes no IPv4.
    #[inline(always)]
    pub fn is_v6_only(&self) -> bool {
        let byte: u8 = field!(self.0, AT_V6_ONLY as u8);
        u32::from(byte) & constant!(V6_ONLY_BIT) != 0
    }

    /// The half-open connections and queues of a listener.
    #[inline(always)]
    pub fn observe(&self) -> Observation {
        let hz = constant!(HZ);
        let overflow = self.overflow();
        let age = (unsafe { bpf_jiffies64() } as u32).wrapping_sub(overflow);
        // 0 is never. It would be a moment ago when the low half of jiffies wraps around, which is also five minutes after each boot
        // (`INITIAL_JIFFIES`, include/linux/jiffies.h).
        let unknown = hz == 0 || overflow == 0;
        Observation {
            half_open: field!(self.0, AT_HALF_OPEN as u32),
            young: field!(self.0, AT_YOUNG as u32),
            fast_open: field!(self.0, AT_FAST_OPEN as u32),
            queue: field!(self.0, AT_QUEUE as u32),
            backlog: field!(self.0, AT_BACKLOG as u32),
            syncookies: self.syncookies(),
            overflow_age: if unknown { u32::MAX } else { age / hz },
        }
    }

    /// Jiffies (32 bits) of the last overflow of its SYN queue.
    #[inline(always)]
    fn overflow(&self) -> u32 {
        // Both are read before the choice: the compiler would merge two conditional reads into one of an unknown type.
        // A read through a null pointer gives 0 (BPF_PROBE_MEM).
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

/// Whether a socket listens.
#[inline(always)]
pub fn listens(socket: *mut bpf_sock) -> bool {
    unsafe { (*socket).state == TCP_LISTEN }
}

/// Thread group id and thread id of the current task, in the initial pid namespace.
#[inline(always)]
pub fn current_task() -> (u32, u32) {
    let task: *const u8 = unsafe { bpf_get_current_task_btf() }.cast();
    if task.is_null() {
        (0, 0)
    } else {
        (field!(task, AT_TGID as u32), field!(task, AT_PID as u32))
    }
}
