//! The kernel half: `account` counts and registers, `steer` admits and steers.
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
    use aya_ebpf::macros::{sk_lookup, sock_ops};
    use aya_ebpf::programs::{SkLookupContext, SockOpsContext};

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
