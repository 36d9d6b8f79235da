//! sk_lookup: decides each look-up for a listener of a service's port.

use aya_ebpf::bindings::{bpf_sk_lookup, bpf_sock};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::{bpf_loop, bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::SkLookupContext;
use balancer_common::abi::{
    Address, Backend, Counts, ExemptKey, Health, Heartbeat, MAX_SLOTS, MEMBER_WORDS, Members,
    Policy, PortKey, REASON_SLOTS, ServicePort, SlotPolicy, ticks,
};
use balancer_common::decision::attempt::{LEAVE, Writes};
use balancer_common::decision::cursor::{Cursor, Step};
use balancer_common::decision::member::Member;
use balancer_common::decision::request::{Arrival, Request};
use balancer_common::decision::scan::Scan;
use balancer_common::decision::{
    Attempt, BackendAccess, Decision, DecisionState, LookupFlags, MAX_ROUNDS, advance,
};
use balancer_common::{Reason, Verdict, opaque};
use core::convert::Infallible;
use core::ffi::c_void;
use core::ptr::{read_volatile, write_volatile};

use crate::events;
use crate::kernel::atomic;
use crate::kernel::context::context;
use crate::kernel::offsets::constant;
use crate::kernel::scratch::Scratch;
use crate::kernel::shared::shared;
use crate::kernel::socket::{TcpSocket, listens};
use crate::maps::{
    BACKENDS, COUNTS, EXEMPT, HEALTH, HEARTBEAT, LISTENERS, MEMBERS, POLICY, SERVICE_STATE,
    SERVICES, TOTALS, VERDICTS,
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const TCP: u32 = 6;
const AF_INET: u32 = 2;
/// `BPF_SK_LOOKUP_F_NO_REUSEPORT`: otherwise the kernel chooses again inside a SO_REUSEPORT group.
const NO_REUSEPORT: u64 = 2;
/// `BPF_SK_LOOKUP_F_REPLACE`: takes the place of a socket that is assigned already.
const REPLACE: u64 = 1;
const EEXIST: i64 = -17;

#[inline(always)]
pub fn run(ctx: &SkLookupContext) -> u32 {
    let lookup: *const bpf_sk_lookup = ctx.lookup;
    if context!(lookup, protocol) != TCP {
        return SK_PASS;
    }
    let Some(port) = service_of(lookup) else {
        return SK_PASS;
    };
    if port.counts_only() {
        count(port.service, Reason::CountOnly);
        return SK_PASS;
    }
    if has_chosen(lookup) {
        count(port.service, Reason::ForeignSkLookup);
        return SK_PASS;
    }
    // SAFETY: a helper without arguments.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let decision = match Scratch::take() {
        Some(scratch) => {
            start(scratch.state, lookup, port, now_ns);
            decide(ctx, scratch.state)
        }
        None => unjudged(ctx, &port),
    };
    if let Some(slot) = decision.slot {
        keep_turn(&port, slot);
    }
    count(port.service, decision.reason);
    if port.is_dry_run() {
        unassign(ctx.lookup);
        return SK_PASS;
    }
    match decision.verdict {
        Verdict::Pass | Verdict::Steer => SK_PASS,
        Verdict::Refuse => {
            refused(lookup, port.service, decision.reason, ticks(now_ns));
            SK_DROP
        }
    }
}

/// Takes back what was assigned: the kernel looks for a listener as it would without the balancer
/// (`bpf_sk_lookup_assign`, net/core/filter.c).
#[inline(always)]
fn unassign(lookup: *mut bpf_sk_lookup) {
    // SAFETY: the context lives as long as the program runs; without a socket there is nothing to
    // own.
    unsafe { bpf_sk_assign(lookup.cast(), core::ptr::null_mut(), REPLACE) };
}

/// Writes down what is asked. A function of its own: what it needs would crowd the stack of the
/// chain of calls that decides.
#[inline(never)]
fn start(state: &mut DecisionState, lookup: *const bpf_sk_lookup, port: ServicePort, now_ns: u64) {
    let arrival = arrival_of(lookup);
    let flags = LookupFlags {
        exempt: is_exempt(port.service, &arrival.from),
        stale: heartbeat().is_none_or(|beat| beat.is_stale(now_ns)),
    };
    let (ticket, weights) = next_ticket(&port);
    let request = Request::new(&port, &arrival, ticket, weights, ticks(now_ns));
    state.start(request, flags);
}

/// When the daemon last lived.
#[inline(always)]
pub fn heartbeat() -> Option<Heartbeat> {
    let beat = HEARTBEAT.get_ptr(0)?;
    Some(Heartbeat {
        last_ns: shared!(beat, last_ns),
        limit_ns: shared!(beat, limit_ns),
    })
}

/// Whether a program that ran before has chosen a socket: its choice stands, whatever this one says
/// (`bpf_sk_lookup_run_v4`, include/linux/filter.h).
#[inline(always)]
fn has_chosen(lookup: *const bpf_sk_lookup) -> bool {
    // SAFETY: the context lives as long as the program runs.
    let chosen =
        unsafe { read_volatile(&raw const (*lookup).__bindgen_anon_1.__bindgen_anon_1.sk) };
    !chosen.is_null()
}

#[inline(always)]
fn arrival_of(lookup: *const bpf_sk_lookup) -> Arrival {
    let (local, remote) = (context!(lookup, local_ip6), context!(lookup, remote_ip6));
    let (local_v4, remote_v4) = (context!(lookup, local_ip4), context!(lookup, remote_ip4));
    let (to, from) = if context!(lookup, family) == AF_INET {
        (
            Address::from_v4_be(local_v4),
            Address::from_v4_be(remote_v4),
        )
    } else {
        (Address(local), Address(remote))
    };
    Arrival {
        netns: constant!(NETNS),
        device: context!(lookup, ingress_ifindex),
        from,
        // Unlike the local one, the remote port stands in network byte order.
        from_port: u16::from_be(context!(lookup, remote_port)),
        to,
        to_port: context!(lookup, local_port) as u16,
    }
}

/// The service of a look-up's destination.
#[inline(always)]
fn service_of(lookup: *const bpf_sk_lookup) -> Option<ServicePort> {
    let read = |key: &PortKey| {
        Ok::<_, Infallible>(SERVICES.get_ptr(key).map(|port| ServicePort {
            service: shared!(port, service),
            policy: shared!(port, policy),
            flags: shared!(port, flags),
            quota: shared!(port, quota),
        }))
    };
    let address = || arrival_of(lookup).to;
    let Ok(found) = ServicePort::of_destination(address, context!(lookup, local_port) as u16, read);
    found
}

/// The ticket of a look-up, and what the weights added up to. For round-robin the ticket is its
/// own, so that no two CPUs have the same turn.
#[inline(always)]
fn next_ticket(port: &ServicePort) -> (u64, u64) {
    let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(port.service)) else {
        return (0, 0);
    };
    match Policy::from_number(port.policy) {
        Policy::RoundRobin => {
            // SAFETY: the pointer is to an element of a map, which lives as long as the program.
            let ticket = unsafe { atomic::add(&raw mut (*state).turn, 1) };
            (ticket, shared!(state, weights))
        }
        Policy::LeastConnections => (shared!(state, turn), 0),
        Policy::SourceHash => (0, 0),
    }
}

/// With least-connections, the slot after this one comes first among those that have as few.
#[inline(always)]
fn keep_turn(port: &ServicePort, slot: u32) {
    if matches!(Policy::from_number(port.policy), Policy::LeastConnections)
        && let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(port.service))
    {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program. A word
        // is written as one.
        unsafe { write_volatile(&raw mut (*state).turn, u64::from(slot) + 1) };
    }
}

/// Whether a source is exempt for a service.
#[inline(always)]
pub fn is_exempt(service: u16, source: &Address) -> bool {
    EXEMPT
        .get(Key::new(ExemptKey::BITS, ExemptKey::new(service, *source)))
        .is_some()
}

/// Tells the daemon, from a stack frame of its own.
#[inline(never)]
fn refused(lookup: *const bpf_sk_lookup, service: u16, reason: Reason, now: u64) {
    let arrival = arrival_of(lookup);
    events::refused(service, &arrival, reason, now);
}

#[inline(always)]
fn count(service: u16, reason: Reason) {
    let index = u32::from(service) * REASON_SLOTS as u32 + reason as u32;
    if let Some(counter) = VERDICTS.get_ptr_mut(index) {
        // Per CPU: only a SYN that interrupts a process's look-up right here can make a count get
        // lost. SAFETY: the element is that of this CPU.
        unsafe { *counter += 1 };
    }
}

/// What the rounds of a decision need, on the stack of the program.
struct Rounds {
    ctx: *mut bpf_sk_lookup,
    state: *mut DecisionState,
    decision: u64,
}

/// No decision yet: what [`Decision::encode`] never gives.
const UNDECIDED: u64 = u64::MAX;

/// `balancer_common::decision::decide`, with `bpf_loop` for its loop.
#[inline(always)]
fn decide(ctx: &SkLookupContext, state: &mut DecisionState) -> Decision {
    if let Some(decision) = state.without_looking() {
        return decision;
    }
    // Most end with the first. Opaque, because the compiler knows what values there are and would
    // leave out the check that the verifier wants.
    let first = opaque(steer_round(ctx.lookup, state));
    let mut rounds = Rounds {
        ctx: ctx.lookup,
        state,
        decision: first,
    };
    if first == UNDECIDED {
        let round = round as unsafe extern "C" fn(u32, *mut c_void) -> i64;
        // SAFETY: the callback gets a pointer to `rounds`, which outlives the loop.
        unsafe {
            bpf_loop(
                MAX_ROUNDS - 1,
                round as *mut c_void,
                (&raw mut rounds).cast(),
                0,
            )
        };
    }
    // SAFETY: a variable of this function. Volatile, because the callback has written it.
    let decision = unsafe { read_volatile(&raw const rounds.decision) };
    Decision::decode(decision).unwrap_or_else(|| state.out_of_rounds())
}

/// One round; the callback of `bpf_loop`. 1 ends the loop.
///
/// # Safety
/// `rounds` points to [`Rounds`] that nobody else uses.
unsafe extern "C" fn round(_index: u32, rounds: *mut c_void) -> i64 {
    // SAFETY: by this function's contract.
    let rounds = unsafe { &mut *rounds.cast::<Rounds>() };
    rounds.decision = steer_round(rounds.ctx, rounds.state);
    i64::from(rounds.decision != UNDECIDED)
}

/// One round; the decision in a word, or [`UNDECIDED`]. Global functions are looked at by the
/// verifier once, by themselves, and not on every path that leads to them.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn steer_round(ctx: *mut bpf_sk_lookup, state: *mut DecisionState) -> u64 {
    // SAFETY: for an argument of a global function the verifier takes null or a pointer to the
    // whole structure. Nobody else has it meanwhile.
    let Some(state) = (unsafe { state.as_mut() }) else {
        return UNDECIDED;
    };
    match advance(&mut Sockets { ctx }, state) {
        Some(decision) => decision.encode(),
        None => UNDECIDED,
    }
}

/// Without a place for a decision: lets everybody in. On a virtual port nobody else listens, so
/// that takes a backend.
#[inline(always)]
fn unjudged(ctx: &SkLookupContext, port: &ServicePort) -> Decision {
    let virtual_port = port.flags & ServicePort::VIRTUAL != 0;
    let assigned = if virtual_port {
        let slot = opaque(steer_unjudged(ctx.lookup, port.service.into(), port.quota));
        (slot < MAX_SLOTS as u32).then_some(slot)
    } else {
        None
    };
    Decision::unjudged(virtual_port, assigned)
}

/// What the search for any backend needs, on the stack of the program.
struct Search {
    ctx: *mut bpf_sk_lookup,
    service: u32,
    quota: u32,
    found: u32,
}

/// Assigns the first backend that takes it, unless it was closed by hand. Its slot, or a number
/// that is none. Global like [`steer_round`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn steer_unjudged(ctx: *mut bpf_sk_lookup, service: u32, quota: u32) -> u32 {
    let mut search = Search {
        ctx,
        service,
        quota,
        found: u32::MAX,
    };
    let visit = give as unsafe extern "C" fn(u32, *mut c_void) -> i64;
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
    unsafe { read_volatile(&raw const search.found) }
}

/// The callback of `bpf_loop` over all slots; 1 ends the loop.
///
/// # Safety
/// `search` points to a [`Search`] that nobody else uses.
unsafe extern "C" fn give(slot: u32, search: *mut c_void) -> i64 {
    // SAFETY: by this function's contract.
    let search = unsafe { &mut *search.cast::<Search>() };
    let Some(members) = MEMBERS.get_ptr(search.service) else {
        return 1;
    };
    if shared!(members, words[(slot / 64) as usize & (MEMBER_WORDS - 1)]) >> (slot % 64) & 1 == 0 {
        return 0;
    }
    let takes = member(slot).is_some_and(|member| {
        member.takes_unjudged(constant!(NETNS), search.quota)
            && matches!(
                with_socket(slot, |socket| assign(search.ctx, socket)),
                Attempt::Assigned
            )
    });
    if takes {
        search.found = slot;
    }
    i64::from(takes)
}

/// The pinned maps and the listening sockets in them.
struct Sockets {
    ctx: *mut bpf_sk_lookup,
}

impl BackendAccess for Sockets {
    #[inline(always)]
    fn begin(&mut self, scan: &mut Scan) {
        if let Some(members) = MEMBERS.get_ptr(u32::from(scan.request.service)) {
            scan.cursor = Cursor::new(|word| load(members, word));
        }
    }

    #[inline(always)]
    fn walk(&mut self, scan: &mut Scan) {
        // The verifier takes only a pointer to the stack here; what it points to is the pointer to
        // the scan.
        let mut scan = core::ptr::from_mut(scan);
        let visit = visit as unsafe extern "C" fn(u32, *mut c_void) -> i64;
        let calls = Cursor::STEPS.div_ceil(STEPS_A_CALL);
        // SAFETY: the callback gets a pointer to the pointer to the scan, which outlive the loop.
        unsafe { bpf_loop(calls, visit as *mut c_void, (&raw mut scan).cast(), 0) };
    }

    #[inline(always)]
    fn attempt(&mut self, slot: u32, state: &DecisionState) -> Attempt {
        Attempt::decode(steer_attempt(self.ctx, state, slot))
    }

    #[inline(always)]
    fn remember_weights(&mut self, service: u16, weights: u64) {
        if let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(service)) {
            // SAFETY: the pointer is to an element of a map, which lives as long as the program.
            unsafe { atomic::store(&raw mut (*state).weights, weights) };
        }
    }

    #[inline(always)]
    fn has_unregistered(&self, service: u16) -> bool {
        SERVICE_STATE
            .get_ptr(u32::from(service))
            .is_some_and(|state| shared!(state, unregistered) != 0)
    }
}

/// Steps over the members for one call. Returns are dear: where the kernel mitigates Speculative
/// Return Stack Overflow (AMD), none is predicted. More steps are more work for the verifier, which
/// goes through each.
const STEPS_A_CALL: u32 = 3;

/// Global like [`steer_round`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn steer_attempt(
    ctx: *mut bpf_sk_lookup,
    state: *const DecisionState,
    slot: u32,
) -> u64 {
    // SAFETY: for an argument of a global function the verifier takes null or a pointer to the
    // whole structure. Nobody changes it meanwhile: the caller waits for this function.
    let Some(state) = (unsafe { state.as_ref() }) else {
        return Attempt::Gone.encode();
    };
    attempt_slot(ctx, slot, state).encode()
}

#[inline(always)]
fn attempt_slot(ctx: *mut bpf_sk_lookup, slot: u32, state: &DecisionState) -> Attempt {
    let (Some(mut member), Some(counts), Some(health), Some(totals)) = (
        member(slot),
        COUNTS.get_ptr_mut(slot),
        HEALTH.get_ptr_mut(slot),
        TOTALS.get_ptr(slot),
    ) else {
        return Attempt::Gone;
    };
    let entered = shared!(totals, entered);
    // The scan does without these.
    member.counts.flood = shared!(counts, flood);
    member.counts.handshake = shared!(counts, handshake);
    member.health.queue = shared!(health, queue);
    if member.backend.flags & Backend::UNSTEERABLE != 0 {
        return state.judge(None, &member).attempt;
    }
    with_socket(slot, |socket| {
        let words = Words { counts, health };
        attempt_socket(ctx, socket, &member, entered, words, state)
    })
}

/// Does something with the listening socket of a slot.
#[inline(always)]
fn with_socket(slot: u32, work: impl FnOnce(*mut bpf_sock) -> Attempt) -> Attempt {
    // SAFETY: a map and a key of its size, on the stack.
    let socket: *mut bpf_sock = unsafe {
        bpf_map_lookup_elem(
            (&raw const LISTENERS).cast_mut().cast(),
            (&raw const slot).cast(),
        )
    }
    .cast();
    if socket.is_null() {
        return Attempt::Gone;
    }
    let attempt = if listens(socket) {
        work(socket)
    } else {
        Attempt::Gone
    };
    // SAFETY: the reference that the look-up in the map took, given back once.
    unsafe { bpf_sk_release(socket.cast()) };
    attempt
}

/// Reads a word of a service's bitmap of slots.
#[inline(always)]
fn load(members: *const Members, word: u32) -> u64 {
    shared!(members, words[word as usize & (MEMBER_WORDS - 1)])
}

/// A few steps over the members; the callback of `bpf_loop`. 1 ends the loop.
///
/// # Safety
/// `scan` points to a pointer to a [`Scan`] that nobody else uses.
unsafe extern "C" fn visit(_index: u32, scan: *mut c_void) -> i64 {
    // SAFETY: by this function's contract.
    let scan = unsafe { &mut **scan.cast::<*mut Scan>() };
    let Some(members) = MEMBERS.get_ptr(u32::from(scan.request.service)) else {
        return 1;
    };
    // Opaque, so that it stays a loop.
    let mut left = opaque(u64::from(STEPS_A_CALL));
    while left > 0 {
        match scan.cursor.step(|word| load(members, word)) {
            Step::End => return 1,
            Step::Nobody => {}
            Step::Member(slot) => consider(scan, slot),
        }
        left -= 1;
    }
    i64::from(scan.cursor.is_at_end())
}

/// Takes a backend into account.
#[inline(always)]
fn consider(scan: &mut Scan, slot: u32) {
    if let Some(member) = member(slot) {
        scan.consider(&member);
    }
}

/// A slot as the maps show it: what a scan asks for.
#[inline(always)]
fn member(slot: u32) -> Option<Member> {
    let backend = BACKENDS.get_ptr(slot)?;
    let policy = POLICY.get_ptr(slot)?;
    let counts = COUNTS.get_ptr(slot)?;
    let health = HEALTH.get_ptr(slot)?;
    let policy = SlotPolicy {
        quota: shared!(policy, quota),
        weight: shared!(policy, weight),
        adopted: shared!(policy, adopted),
        server: 0,
    };
    let counts = Counts {
        established: shared!(counts, established),
        expected: shared!(counts, expected),
        full: shared!(counts, full),
        cookies: shared!(counts, cookies),
        ..Counts::ZERO
    };
    let health = Health {
        stalled: shared!(health, stalled),
        failing: shared!(health, failing),
        hung: shared!(health, hung),
        ..Health::UNKNOWN
    };
    let backend = Backend {
        slot_state: shared!(backend, slot_state),
        netns: shared!(backend, netns),
        address: Address::of_words(shared!(backend, address as [u64; 2])),
        port: shared!(backend, port),
        weight: shared!(backend, weight),
        uid: shared!(backend, uid),
        device: shared!(backend, device),
        flags: shared!(backend, flags),
        ..Backend::EMPTY
    };
    Some(Member {
        slot,
        backend,
        policy,
        counts: counts.with_adopted(&policy),
        health,
    })
}

#[inline(always)]
fn attempt_socket(
    ctx: *mut bpf_sk_lookup,
    socket: *mut bpf_sock,
    member: &Member,
    entered: u64,
    words: Words,
    state: &DecisionState,
) -> Attempt {
    let Some(tcp) = TcpSocket::of(socket) else {
        return Attempt::Gone;
    };
    let outcome = state.judge(Some(&tcp.observe(entered)), member);
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    if !unsafe { write(&outcome.writes, words, member) } {
        return Attempt::Raced;
    }
    match outcome.attempt {
        Attempt::Assigned => assign(ctx, socket),
        attempt => attempt,
    }
}

/// Gives the look-up to a socket.
#[inline(always)]
fn assign(ctx: *mut bpf_sk_lookup, socket: *mut bpf_sock) -> Attempt {
    // SAFETY: the context and a socket with a reference, as the verifier demands.
    match unsafe { bpf_sk_assign(ctx.cast(), socket.cast(), NO_REUSEPORT) } {
        0 => Attempt::Assigned,
        EEXIST => Attempt::Foreign,
        _ => Attempt::Failed,
    }
}

/// The elements of a slot that a look writes to.
#[derive(Clone, Copy)]
struct Words {
    counts: *mut Counts,
    health: *mut Health,
}

/// Makes the writes of a look; false if another CPU was faster and the choice stands no more.
///
/// # Safety
/// `words` points to elements of COUNTS and HEALTH.
#[inline(always)]
unsafe fn write(writes: &Writes, words: Words, member: &Member) -> bool {
    let Words { counts, health } = words;
    // SAFETY: by this function's contract. Other CPUs change the words atomically, too.
    unsafe {
        if writes.cookies != LEAVE {
            atomic::store(&raw mut (*counts).cookies, writes.cookies);
        }
        if writes.full != LEAVE {
            atomic::store(&raw mut (*counts).full, writes.full);
        }
        if writes.flood != LEAVE {
            atomic::replace(&raw mut (*counts).flood, member.counts.flood, writes.flood);
        }
        let seen = &member.health;
        if writes.queue != seen.queue {
            atomic::store(&raw mut (*health).queue, writes.queue);
        }
        if writes.stalled != seen.stalled {
            atomic::store(&raw mut (*health).stalled, writes.stalled);
        }
        let expected = &raw mut (*counts).expected;
        if writes.expected != LEAVE {
            if writes.instead_of == LEAVE {
                atomic::store(expected, writes.expected);
            } else if !atomic::replace(expected, writes.instead_of, writes.expected) {
                return false;
            }
        }
        writes.failing == seen.failing
            || atomic::replace(&raw mut (*health).failing, seen.failing, writes.failing)
    }
}
