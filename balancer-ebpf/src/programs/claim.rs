//! Giving slots to listeners: the first that is free, and to strangers no more than a few.

use core::ffi::c_void;
use core::ptr::read_volatile;

use aya_ebpf::helpers::generated::bpf_loop;
use balancer_common::abi::{
    Backend, BackendId, BackendState, ListenRule, MAX_MEMBERS, MAX_SLOTS, MEMBER_WORDS, SlotPolicy,
    SlotState,
};
use balancer_common::pool::Pool;

use super::account::{change_state, slot_state};
use crate::kernel::shared::shared;
use crate::maps::{BACKENDS, MEMBERS, POLICY};

/// No rule, no slot.
pub const NONE: u64 = u64::MAX;
/// Compare-and-swaps that may be lost to other CPUs before a listener is given up.
const CLAIMS: u32 = 4;

/// Claims the first free slot that a listener of that rule may have.
#[inline(always)]
pub fn claim(netns: u64, rule: &ListenRule) -> Option<BackendId> {
    let is_candidate = rule.flags & ListenRule::CANDIDATE != 0;
    let limited = if is_candidate { netns } else { 0 };
    let packed = account_claim(limited, u32::from(rule.service));
    (packed != NONE).then_some(BackendId::unpack(packed))
}

/// What one walk over all slots looks for.
#[repr(C)]
struct Search {
    /// The first free slot, or [`NONE`].
    free: u64,
    /// The netns of a candidate. 0: it is none, and needs only the first free slot.
    netns: u64,
    /// What rules for any netns have given away.
    pool: Pool,
}

/// A packed [`BackendId`], or [`NONE`]. Global functions are looked at by the verifier once, by
/// themselves, and not on every path that leads to them.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_claim(netns: u64, service: u32) -> u64 {
    if is_crowded(service as u16) {
        return NONE;
    }
    for _ in 0..CLAIMS {
        let free = account_search(netns);
        let Some(place) = BACKENDS.get_ptr_mut(free as u32) else {
            return NONE;
        };
        let state = slot_state(place);
        if state.is(BackendState::Free) && change_state(place, state, BackendState::Claimed) {
            let id = BackendId {
                slot: free as u32,
                generation: state.generation(),
            };
            return id.pack();
        }
    }
    NONE
}

/// The first free slot, or [`NONE`]: there is none, or there are too many of the listener's kind.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_search(netns: u64) -> u64 {
    let mut search = Search {
        free: NONE,
        netns,
        pool: Pool::default(),
    };
    let visit = visit_slot as unsafe extern "C" fn(u32, *mut c_void) -> i64;
    // SAFETY: the callback gets a pointer to `search`, which outlives the loop.
    unsafe {
        bpf_loop(
            MAX_SLOTS as u32,
            visit as *mut c_void,
            (&raw mut search).cast(),
            0,
        )
    };
    // SAFETY: a variable of this function. Volatile, because the callback has written it.
    let Search { free, pool, .. } = unsafe { read_volatile(&raw const search) };
    if netns != 0 && !pool.has_room() {
        return NONE;
    }
    free
}

/// Whether a service has all the backends that it may have.
#[inline(always)]
fn is_crowded(service: u16) -> bool {
    let Some(members) = MEMBERS.get_ptr(u32::from(service)) else {
        return true;
    };
    let mut count = 0;
    let mut word = 0;
    while word < MEMBER_WORDS {
        count += shared!(members, words[word]).count_ones();
        word += 1;
    }
    count >= MAX_MEMBERS as u32
}

/// The callback of `bpf_loop` over all slots; 1 ends the loop.
///
/// # Safety
/// `search` points to a [`Search`] that nobody else uses.
unsafe extern "C" fn visit_slot(slot: u32, search: *mut c_void) -> i64 {
    // SAFETY: by this function's contract.
    let search = unsafe { &mut *search.cast::<Search>() };
    let Some(backend) = BACKENDS.get_ptr(slot) else {
        return 1;
    };
    let state = slot_state(backend);
    if state.is(BackendState::Free) {
        if search.free == NONE {
            search.free = u64::from(slot);
        }
        if search.netns == 0 {
            return 1;
        }
    } else if shared!(backend, flags) & Backend::CANDIDATE != 0 {
        let here = shared!(backend, netns) == search.netns;
        search.pool.add(is_confirmed(slot, state), here);
    }
    0
}

/// Whether the backend of a slot may be anybody's: see [`Backend::is_strangers`].
#[inline(always)]
pub fn is_strangers(backend: *const Backend, slot: u32) -> bool {
    let is_confirmed = || is_confirmed(slot, slot_state(backend));
    Backend::is_strangers(shared!(backend, flags), is_confirmed)
}

/// Whether the daemon has confirmed the backend of a slot.
#[inline(always)]
fn is_confirmed(slot: u32, state: SlotState) -> bool {
    let Some(policy) = POLICY.get_ptr(slot) else {
        return false;
    };
    let policy = SlotPolicy {
        quota: shared!(policy, quota),
        weight: 0,
        adopted: 0,
        server: 0,
    };
    policy.is_for(state)
}

/// Whether the daemon has confirmed the backend of a slot, or counts connections there.
#[inline(always)]
pub fn is_policy_needed(slot: u32, state: SlotState) -> bool {
    let Some(policy) = POLICY.get_ptr(slot) else {
        return true;
    };
    shared!(policy, adopted) != 0 || is_confirmed(slot, state)
}
