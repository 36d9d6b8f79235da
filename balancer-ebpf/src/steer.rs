//! sk_lookup: decides each look-up for a listener of a service's port.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{bpf_sk_lookup, bpf_sock};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::{bpf_loop, bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::SkLookupContext;
use balancer_common::abi::{
    ANY_NETNS, Address, Backend, BackendState, Counts, ExemptKey, NO_SERVICE, Policy, PortKey, REASON_SLOTS,
    ServicePort, ticks,
};
use balancer_common::admission::{
    Judgement, Observation, cookies_word, expected_word, full_word, judge,
};
use balancer_common::choice::{Cursor, Member, Request, Scan, Step};
use balancer_common::decide::{Attempt, Circumstances, Terms, World, decide, must_choose_by_tuple};
use balancer_common::{Reason, Verdict, hash};
use core::ffi::c_void;

use crate::kernel::{TcpSocket, constant, listens};
use crate::maps::{BACKENDS, COUNTS, EXEMPT, HEARTBEAT, LISTENERS, MEMBERS, POLICY, SERVICE_STATE, SERVICES, VERDICTS};
use crate::{atomic, events};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const TCP: u32 = 6;
const AF_INET: u32 = 2;
/// `BPF_SK_LOOKUP_F_NO_REUSEPORT`: otherwise the kernel chooses again inside a SO_REUSEPORT group.
const NO_REUSEPORT: u64 = 2;
const EEXIST: i64 = -17;

/// Who asks: what a [`Request`] does not hold.
struct Client {
    address: Address,
    port: u16,
}

#[inline(always)]
pub fn run(ctx: &SkLookupContext) -> u32 {
    let lookup = unsafe { &*ctx.lookup };
    if lookup.protocol != TCP {
        return SK_PASS;
    }
    let (to, client) = addresses(lookup);
    let Some(port) = service_of(to, lookup.local_port as u16) else { return SK_PASS };
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let circumstances = Circumstances {
        exempt: is_exempt(port.service, &client.address),
        stale: HEARTBEAT.get(0).is_none_or(|beat| beat.is_stale(now_ns)),
    };
    let mut scan = Scan::new(request_of(lookup, &port, to, &client, now_ns));
    let reason = decide(&mut Sockets { ctx }, &mut scan, circumstances).reason;
    count(port.service, reason);
    match reason.verdict() {
        Verdict::Pass | Verdict::Steer => SK_PASS,
        Verdict::Refuse => {
            refused(lookup, port.service, reason);
            SK_DROP
        }
    }
}

#[inline(always)]
fn addresses(lookup: &bpf_sk_lookup) -> (Address, Client) {
    // The remote port stands in network byte order in the lower half of its word.
    let port = u16::from_be(lookup.remote_port);
    if lookup.family == AF_INET {
        let client = Client { address: Address::from_v4_be(lookup.remote_ip4), port };
        return (Address::from_v4_be(lookup.local_ip4), client);
    }
    let l = &lookup.local_ip6;
    let r = &lookup.remote_ip6;
    let client = Client { address: Address([r[0], r[1], r[2], r[3]]), port };
    (Address([l[0], l[1], l[2], l[3]]), client)
}

/// The service of a port: an exact address wins over any.
#[inline(always)]
fn service_of(to: Address, port: u16) -> Option<ServicePort> {
    let any = *unsafe { SERVICES.get(PortKey::new(ANY_NETNS, Address::ANY, port)) }?;
    if any.flags & ServicePort::EXACT_ADDRESSES != 0
        && let Some(exact) = unsafe { SERVICES.get(PortKey::new(ANY_NETNS, to, port)) }
    {
        return Some(*exact);
    }
    (any.service != NO_SERVICE).then_some(any)
}

#[inline(always)]
fn request_of(lookup: &bpf_sk_lookup, port: &ServicePort, to: Address, client: &Client, now_ns: u64) -> Request {
    let policy = Policy::from_number(port.policy);
    let (high, low) = client.address.halves();
    let source = hash::of_source(high, low);
    let (to_high, to_low) = to.halves();
    Request {
        service: port.service,
        netns: constant!(NETNS),
        to,
        device: lookup.ingress_ifindex,
        v4: lookup.family == AF_INET,
        virtual_port: port.flags & ServicePort::VIRTUAL != 0,
        policy,
        quota: port.quota,
        source,
        tuple: hash::of_tuple(source, client.port, to_high ^ to_low, lookup.local_port as u16),
        ticket: if matches!(policy, Policy::RoundRobin) { next_ticket(port.service) } else { 0 },
        now: ticks(now_ns),
    }
}

/// A look-up's own ticket, so that no two CPUs have the same turn.
#[inline(always)]
fn next_ticket(service: u16) -> u64 {
    match SERVICE_STATE.get_ptr_mut(u32::from(service)) {
        Some(state) => unsafe { atomic::add(&raw mut (*state).turn, 1) },
        None => 0,
    }
}

/// Whether a source is exempt for a service. A function of its own: the key would crowd the caller's stack.
#[inline(never)]
pub fn is_exempt(service: u16, source: &Address) -> bool {
    EXEMPT.get(Key::new(ExemptKey::BITS, ExemptKey::new(service, *source))).is_some()
}

/// Tells the daemon, from a stack frame of its own.
#[inline(never)]
fn refused(lookup: &bpf_sk_lookup, service: u16, reason: Reason) {
    let (_, client) = addresses(lookup);
    events::refused(service, constant!(NETNS), client.address, client.port, reason);
}

#[inline(always)]
fn count(service: u16, reason: Reason) {
    let index = u32::from(service) * REASON_SLOTS as u32 + reason as u32;
    if let Some(counter) = VERDICTS.get_ptr_mut(index) {
        // Per CPU, and sk_lookup programs are not preempted by each other on one CPU.
        unsafe { *counter += 1 };
    }
}

/// The real world: the pinned maps and the listening sockets in them.
struct Sockets<'a> {
    ctx: &'a SkLookupContext,
}

impl World for Sockets<'_> {
    #[inline(always)]
    fn scan(&mut self, scan: &mut Scan) {
        let walk = visit as unsafe extern "C" fn(u32, *mut c_void) -> i64;
        unsafe { bpf_loop(Cursor::STEPS, walk as *mut c_void, core::ptr::from_mut(scan).cast(), 0) };
    }

    #[inline(always)]
    fn attempt(&mut self, slot: u32, request: &Request, terms: Terms) -> Attempt {
        let Some(member) = member(slot) else { return Attempt::Gone };
        if member.backend.flags & Backend::UNSTEERABLE != 0 {
            return attempt_blind(&member, request, terms);
        }
        let socket: *mut bpf_sock =
            unsafe { bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), (&raw const slot).cast()) }.cast();
        if socket.is_null() {
            return Attempt::Gone;
        }
        let attempt = attempt_socket(self.ctx, socket, &member, request, terms);
        unsafe { bpf_sk_release(socket.cast()) };
        attempt
    }
}

/// One step over the members; the callback of `bpf_loop`. 1 ends the loop.
unsafe extern "C" fn visit(_index: u32, scan: *mut c_void) -> i64 {
    let scan = unsafe { &mut *scan.cast::<Scan>() };
    let Some(members) = MEMBERS.get_ptr(u32::from(scan.request.service)) else { return 1 };
    match scan.cursor.step(|word| unsafe { core::ptr::read_volatile(&raw const (*members).words[word as usize & 15]) }) {
        Step::End => return 1,
        Step::Loaded => {}
        Step::Member(slot) => {
            if let Some(member) = member(slot) {
                scan.consider(&member);
            }
        }
    }
    0
}

/// A slot as the maps show it.
#[inline(always)]
fn member(slot: u32) -> Option<Member> {
    let (backend, policy, counts) = (BACKENDS.get(slot)?, POLICY.get(slot)?, COUNTS.get(slot)?);
    Some(Member { slot, backend: *backend, policy: *policy, counts: *counts })
}

/// An MPTCP listener can be neither looked at nor assigned; on its own port the kernel finds it without our help.
#[inline(always)]
fn attempt_blind(member: &Member, request: &Request, terms: Terms) -> Attempt {
    match judge(&Observation::BLIND, &member.counts, member.quota(request.quota), terms.enforce, request.now) {
        Judgement::Take => Attempt::Assigned,
        judgement => Attempt::Judged(judgement),
    }
}

#[inline(always)]
fn attempt_socket(
    ctx: &SkLookupContext,
    socket: *mut bpf_sock,
    member: &Member,
    request: &Request,
    terms: Terms,
) -> Attempt {
    if !listens(socket) || !member.backend.life().is(BackendState::Active) {
        return Attempt::Gone;
    }
    let Some(tcp) = TcpSocket::of(socket) else { return Attempt::Gone };
    let Some(counts) = COUNTS.get_ptr_mut(member.slot) else { return Attempt::Gone };
    let seen = tcp.observe();
    note_cookies(counts, &seen, request.now);
    if must_choose_by_tuple(seen.cookies(), terms) {
        return Attempt::Cookies;
    }
    let quota = member.quota(request.quota);
    match judge(&seen, &member.counts, quota, terms.enforce, request.now) {
        Judgement::QueueFull { since } if terms.mind_queue => {
            unsafe { atomic::store(&raw mut (*counts).full, full_word(since, request.now)) };
            Attempt::Judged(Judgement::QueueFull { since })
        }
        Judgement::OverQuota => {
            note_expected(counts, seen.pending(quota), request.now);
            Attempt::Judged(Judgement::OverQuota)
        }
        _ => {
            if terms.mind_queue && member.counts.full != 0 {
                unsafe { atomic::store(&raw mut (*counts).full, 0) };
            }
            assign(ctx, socket, counts, seen.pending(quota), request.now, terms)
        }
    }
}

#[inline(always)]
fn assign(
    ctx: &SkLookupContext,
    socket: *mut bpf_sock,
    counts: *mut Counts,
    pending: u32,
    now: u32,
    terms: Terms,
) -> Attempt {
    let word = expected_word(pending, now);
    match terms.unless_changed {
        Some(old) => {
            if !unsafe { atomic::replace(&raw mut (*counts).expected, old, word) } {
                return Attempt::Raced;
            }
        }
        None => unsafe { atomic::store(&raw mut (*counts).expected, word) },
    }
    match unsafe { bpf_sk_assign(ctx.as_ptr().cast(), socket.cast(), NO_REUSEPORT) } {
        0 => Attempt::Assigned,
        EEXIST => Attempt::Foreign,
        _ => Attempt::Failed,
    }
}

/// Corrects the hint that a look has found wrong.
#[inline(always)]
fn note_expected(counts: *mut Counts, pending: u32, now: u32) {
    let word = u64::from(now) << 32 | u64::from(pending);
    unsafe { atomic::store(&raw mut (*counts).expected, word) };
}

#[inline(always)]
fn note_cookies(counts: *mut Counts, seen: &Observation, now: u32) {
    let before = unsafe { core::ptr::read_volatile(&raw const (*counts).cookies) };
    if let Some(word) = cookies_word(seen, before, now) {
        unsafe { atomic::store(&raw mut (*counts).cookies, word) };
    }
}
