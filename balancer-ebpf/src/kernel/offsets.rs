//! Constants that the loader sets: offsets from the running kernel's BTF, and what a program is
//! attached to.

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $($(#[$doc])* #[unsafe(no_mangle)] pub static $name: $type = 0;)*
    };
}

constants! {
    /// Cookie of the netns that this instance of `steer` is attached to.
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
    /// `tcp_sock.rx_opt.ts_recent_stamp`: the last overflow of a listener (`tcp_synq_overflow`,
    /// include/net/tcp.h).
    AT_OVERFLOW: u32;
    /// `sock.sk_reuseport_cb`.
    AT_REUSEPORT: u32;
    /// `sock_reuseport.synq_overflow_ts`: the last overflow in a SO_REUSEPORT group.
    AT_GROUP_OVERFLOW: u32;
    /// `sock_common.skc_net.net`.
    AT_NET: u32;
    /// `net.ipv4.sysctl_tcp_syncookies`.
    AT_SYNCOOKIES: u32;
    /// `sock_common.skc_state`.
    AT_STATE: u32;
    /// `sock.sk_err`.
    AT_ERROR: u32;
    /// `sock.sk_shutdown`.
    AT_SHUTDOWN: u32;
    /// `sock.sk_uid`.
    AT_UID: u32;
    /// The byte of `sock_common.skc_ipv6only`.
    AT_V6_ONLY: u32;
    /// The bit of `skc_ipv6only` in that byte.
    V6_ONLY_BIT: u32;
    /// `tcp_sock.keepalive_time`: jiffies, 0 where the sysctl holds.
    AT_KEEP_IDLE: u32;
    /// `tcp_sock.keepalive_intvl`: jiffies, 0 where the sysctl holds.
    AT_KEEP_INTERVAL: u32;
    /// `tcp_sock.keepalive_probes`: 0 where the sysctl holds.
    AT_KEEP_PROBES: u32;
    /// `inet_connection_sock.icsk_user_timeout`: ms, 0 where none is set.
    AT_USER_TIMEOUT: u32;
    /// `sock.sk_cgrp_data.cgroup`.
    AT_CGROUP: u32;
    /// `cgroup.kn`.
    AT_CGROUP_NODE: u32;
    /// `kernfs_node.id`.
    AT_NODE_ID: u32;
    /// `task_struct.tgid`.
    AT_TGID: u32;
    /// `task_struct.pid`.
    AT_PID: u32;
}

/// Reads a constant that the loader has set; volatile, because the compiler sees a zero.
macro_rules! constant {
    ($name:ident) => {
        // SAFETY: a static of this object.
        unsafe { core::ptr::read_volatile(&raw const $crate::kernel::offsets::$name) }
    };
}
pub(crate) use constant;

/// Reads a field of a kernel structure at such an offset.
macro_rules! field {
    ($base:expr, $offset:ident as $type:ty) => {{
        let offset = $crate::kernel::offsets::constant!($offset) as usize;
        // SAFETY: the offset is that of a field of this type, by the BTF of the running kernel. The
        // verifier allows only reads within a structure that it knows, or reads that can't fault.
        unsafe { core::ptr::read_volatile($base.add(offset).cast::<$type>()) }
    }};
}
pub(crate) use field;
