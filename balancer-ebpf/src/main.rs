//! The kernel half: `account` counts and registers, `steer` admits and steers, `place_…` choose for
//! clients, `goaway` tells clients to move.
//!
//! On the host this is an empty program, so that editors and `cargo check` work; `cargo xtask
//! build` makes the object.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    allow(internal_features, reason = "BPF has no AtomicU64::fetch_add in core")
)]

#[cfg(target_arch = "bpf")]
mod events;
#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(target_arch = "bpf")]
mod entry_points {
    use aya_ebpf::macros::{cgroup_sock_addr, sk_lookup, sk_msg, sock_ops};
    use aya_ebpf::programs::{SkLookupContext, SkMsgContext, SockAddrContext, SockOpsContext};

    /// What a cgroup_sock_addr program returns to let the call go on.
    const PROCEED: i32 = 1;
    /// What an sk_msg program returns to have the message sent.
    const SK_PASS: u32 = 1;

    /// Counts established connections and registers listeners; attached to a cgroup.
    #[sock_ops]
    pub fn account(ctx: SockOpsContext) -> u32 {
        crate::programs::account::run(&ctx);
        1
    }

    /// Decides each look-up for a service's port; attached to a netns.
    #[sk_lookup]
    pub fn steer(ctx: SkLookupContext) -> u32 {
        crate::programs::steer::run(&ctx)
    }

    /// Sends on connects of IPv4 sockets to frontends; attached to a cgroup.
    #[cgroup_sock_addr(connect4)]
    pub fn place_connect4(ctx: SockAddrContext) -> i32 {
        crate::programs::place::connect4(&ctx);
        PROCEED
    }

    /// Sends on connects of IPv6 sockets to frontends; attached to a cgroup.
    #[cgroup_sock_addr(connect6)]
    pub fn place_connect6(ctx: SockAddrContext) -> i32 {
        crate::programs::place::connect6(&ctx);
        PROCEED
    }

    /// Shows IPv4 clients the frontend that they connected to; attached to a cgroup.
    #[cgroup_sock_addr(getpeername4)]
    pub fn place_peer4(ctx: SockAddrContext) -> i32 {
        crate::programs::place::peer4(&ctx);
        PROCEED
    }

    /// Shows IPv6 clients the frontend that they connected to; attached to a cgroup.
    #[cgroup_sock_addr(getpeername6)]
    pub fn place_peer6(ctx: SockAddrContext) -> i32 {
        crate::programs::place::peer6(&ctx);
        PROCEED
    }

    /// Tells of each socket that was placed; read by the daemon.
    #[unsafe(link_section = "iter/bpf_sk_storage_map")]
    #[unsafe(no_mangle)]
    pub extern "C" fn placed_sockets(ctx: *const crate::programs::placed_sockets::Context) -> i32 {
        crate::programs::placed_sockets::run(ctx);
        0
    }

    /// Writes a GOAWAY between the messages of servers; attached to a map of sockets that only the
    /// daemon has.
    #[sk_msg]
    pub fn goaway(ctx: SkMsgContext) -> u32 {
        crate::programs::goaway::run(&ctx);
        SK_PASS
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo) -> ! {
        loop {}
    }

    /// Some helpers are for GPL-compatible programs alone.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!(
        "This is the kernel half of balancer, built for the host by mistake. Build it with: cargo xtask build"
    );
    std::process::exit(1);
}
