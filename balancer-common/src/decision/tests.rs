//! The decision with a model of backends.

use super::admission::{
    Observation, QUEUE_GRACE, QUEUE_REMEMBERED, cookies_until, pack_cookies, pack_expected,
    pack_full,
};
use super::cursor::Cursor;
use super::health::{STALLED_FOR, look_at_queue};
use super::member::Member;
use super::request::Request;
use super::scan::Scan;
use super::*;
use crate::abi::{
    Address, Backend, BackendState, Breaker, Cookies, Counts, Health, MEMBER_WORDS, Policy,
    SlotPolicy, SlotState, UNLIMITED, stamped,
};
use crate::{Reason, Verdict, hash};
use proptest::prelude::*;
use std::vec::Vec;

const GENERATION: u32 = 3;
const NOW: u64 = 50_000;

/// Backends whose sockets say exactly what their counters say.
struct Model {
    members: Vec<Member>,
    sockets: Vec<Observation>,
    /// The kernel refuses to assign these.
    broken: Vec<u32>,
    /// These listen no more.
    gone: Vec<u32>,
    unregistered: bool,
    /// What round-robin added up last.
    weights: u64,
}

fn member(slot: u32, established: u32, quota: u32, weight: u32) -> Member {
    Member {
        slot,
        backend: Backend {
            slot_state: SlotState::new(GENERATION, BackendState::Active).0,
            netns: 1,
            address: Address([0, 0, 0xffff_u32.to_be(), 0x0100_007f]),
            port: 21_800 + u16::try_from(slot).unwrap(),
            weight,
            ..Backend::EMPTY
        },
        policy: SlotPolicy::new(GENERATION, quota, weight, 0),
        counts: Counts {
            established: u64::from(established),
            ..Counts::ZERO
        },
        health: Health::UNKNOWN,
    }
}

/// One that somebody closed by hand.
fn closed(slot: u32) -> Member {
    Member {
        policy: SlotPolicy::new(GENERATION, 0, 1, SlotPolicy::BY_HAND | SlotPolicy::CLOSED),
        ..member(slot, 0, 0, 1)
    }
}

const IDLE: Observation = Observation {
    half_open: 0,
    young: 0,
    fast_open: 0,
    queue: 0,
    backlog: 128,
    syncookies: 1,
    overflow_age: 1_000,
    entered: 0,
};

impl Model {
    fn of(members: impl IntoIterator<Item = Member>) -> Self {
        let members: Vec<Member> = members.into_iter().collect();
        let sockets = members.iter().map(|_| IDLE).collect();
        Self {
            members,
            sockets,
            broken: Vec::new(),
            gone: Vec::new(),
            unregistered: false,
            weights: 0,
        }
    }

    fn index(&self, slot: u32) -> usize {
        self.members
            .iter()
            .position(|member| member.slot == slot)
            .unwrap()
    }

    fn decide(&mut self, request: Request) -> Decision {
        self.decide_in(request, NORMAL)
    }

    fn decide_in(&mut self, request: Request, flags: LookupFlags) -> Decision {
        let request = Request {
            weights: self.weights,
            ..request
        };
        decide(self, &mut DecisionState::new(request, flags))
    }

    /// A connection comes and is established at once.
    fn connect(&mut self, request: Request) -> Decision {
        let decision = self.decide(request);
        if let Some(slot) = decision.slot {
            let index = self.index(slot);
            self.members[index].counts.established += 1;
        }
        decision
    }

    fn bitmap(&self) -> [u64; MEMBER_WORDS] {
        let mut words = [0; MEMBER_WORDS];
        for member in &self.members {
            words[member.slot as usize / 64] |= 1 << (member.slot % 64);
        }
        words
    }

    fn established(&self) -> Vec<u32> {
        self.members
            .iter()
            .map(|member| member.counts.established())
            .collect()
    }
}

impl BackendAccess for Model {
    fn begin(&mut self, scan: &mut Scan) {
        let members = self.bitmap();
        scan.cursor = Cursor::new(|word| members[word as usize]);
    }

    fn walk(&mut self, scan: &mut Scan) {
        let members = self.bitmap();
        scan.walk(
            |word| members[word as usize],
            |slot| Some(&self.members[self.index(slot)]),
        );
    }

    fn attempt(&mut self, slot: u32, state: &DecisionState) -> Attempt {
        if self.gone.contains(&slot) {
            return Attempt::Gone;
        }
        let index = self.index(slot);
        let member = &mut self.members[index];
        let outcome = state.judge(Some(&self.sockets[index]), member);
        outcome.writes.apply(member);
        match outcome.attempt {
            Attempt::Assigned if self.broken.contains(&slot) => Attempt::Failed,
            attempt => attempt,
        }
    }

    fn remember_weights(&mut self, _service: u16, weights: u64) {
        self.weights = weights;
    }

    fn has_unregistered(&self, _service: u16) -> bool {
        self.unregistered
    }
}

const NORMAL: LookupFlags = LookupFlags {
    exempt: false,
    stale: false,
};

fn request(policy: Policy) -> Request {
    Request {
        service: 0,
        netns: 1,
        to: Address([0, 0, 0xffff_u32.to_be(), 0x0100_007f]),
        device: 0,
        v4: true,
        virtual_port: true,
        policy,
        quota: UNLIMITED,
        source: 7,
        tuple: 9,
        ticket: 0,
        weights: 0,
        health: true,
        now: NOW,
    }
}

fn from_source(policy: Policy, source: u64) -> Request {
    Request {
        source: hash::of_source(0, source),
        tuple: hash::of_tuple(source, 1, 2, 3),
        ticket: source,
        ..request(policy)
    }
}

fn any_policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::LeastConnections),
        Just(Policy::RoundRobin),
        Just(Policy::SourceHash)
    ]
}

fn any_members() -> impl Strategy<Value = Vec<Member>> {
    prop::collection::vec((0..20_u32, 0..20_u32, 1..5_u32), 1..40).prop_map(|rows| {
        rows.into_iter()
            .zip(0..)
            .map(|((established, quota, weight), slot)| member(slot, established, quota, weight))
            .collect()
    })
}

/// The mark of a queue out of which none has been taken for long.
const MARK: u64 = look_at_queue(0, 0, 1, NOW - STALLED_FOR - 1).queue;

/// The health of one that is avoided.
fn any_avoided() -> impl Strategy<Value = Health> {
    let until = NOW + 1;
    let failing = |breaker| stamped(until, breaker as u64);
    let avoided = [
        Health {
            stalled: look_at_queue(MARK, 0, 1, NOW).stalled,
            ..Health::UNKNOWN
        },
        Health {
            hung: until,
            ..Health::UNKNOWN
        },
        Health {
            failing: failing(Breaker::Open),
            ..Health::UNKNOWN
        },
        Health {
            failing: failing(Breaker::Trial),
            ..Health::UNKNOWN
        },
        Health {
            failing: failing(Breaker::Proving),
            ..Health::UNKNOWN
        },
    ];
    prop::sample::select(Vec::from(avoided))
}

/// A word of counters: often one of about now.
fn any_word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (NOW - 2_000..NOW + 2_000, 0..300_u64, 2..21_u32)
            .prop_map(|(tick, beside, bits)| tick << bits | beside),
    ]
}

fn any_observation() -> impl Strategy<Value = Observation> {
    (
        0..300_u32,
        0..300_u32,
        0..3_u32,
        0..10_u32,
        0..10_u32,
        0..3_u8,
        0..300_u32,
    )
        .prop_map(
            |(half_open, young, fast_open, queue, backlog, syncookies, overflow_age)| Observation {
                half_open,
                young,
                fast_open,
                queue,
                backlog,
                syncookies,
                overflow_age,
                entered: 0,
            },
        )
}

proptest! {
    #[test]
    fn a_sum_of_weights_from_before_changes_no_choice(members in any_members(), ticket: u64, weights: u64) {
        let choose = |weights| {
            let mut model = Model::of(members.clone());
            model.weights = weights;
            let decision = model.decide(Request { ticket, ..request(Policy::RoundRobin) });
            (decision, model.weights)
        };
        let (fresh, sum) = choose(0);
        prop_assert_eq!(choose(weights).0, fresh);
        prop_assert_eq!(choose(sum), (fresh, sum));
    }

    #[test]
    fn never_over_quota_and_refused_only_when_all_are(
        members in any_members(), policy in any_policy(), sources in prop::collection::vec(any::<u64>(), 1..200),
    ) {
        let mut model = Model::of(members);
        for source in sources {
            let before = model.established();
            let decision = model.connect(from_source(policy, source));
            let rooms = || before.iter().zip(&model.members).map(|(count, member)| *count < member.quota(UNLIMITED));
            match decision.slot {
                Some(slot) => prop_assert!(rooms().nth(slot as usize).unwrap()),
                None => prop_assert!(!rooms().any(|room| room), "{decision:?} though there is room"),
            }
            prop_assert_eq!(decision.slot.is_none(), decision.verdict == Verdict::Refuse);
        }
    }

    #[test]
    fn least_loaded_wins(members in any_members()) {
        let mut model = Model::of(members);
        let load = |member: &Member| f64::from(member.counts.established()) / f64::from(member.weight());
        let open = |member: &&Member| member.counts.established() < member.quota(UNLIMITED);
        let least = model.members.iter().filter(open).map(load).fold(f64::INFINITY, f64::min);
        if let Some(slot) = model.decide(request(Policy::LeastConnections)).slot {
            let chosen = load(&model.members[slot as usize]);
            prop_assert!((chosen - least).abs() < 1e-4, "{chosen} {least}");
        }
    }

    /// What the kernel is told is what the reason is said to mean: on a virtual port, where nobody
    /// else listens, who is let in has a backend. And who must not be refused is not.
    #[test]
    fn whatever_the_sockets_say_a_reason_says_what_was_done(
        members in any_members(), seen in prop::collection::vec(any_observation(), 40), policy in any_policy(), virtual_port: bool,
        exempt: bool, stale: bool, unregistered: bool, source: u64, words in prop::collection::vec(any_word(), 40),
        broken in prop::collection::vec(0..40_u32, 0..6), unsteerable in prop::collection::vec(0..40_usize, 0..6), all_hang: bool,
    ) {
        let mut model = Model { broken, unregistered, ..Model::of(members) };
        for ((member, socket), word) in model.members.iter_mut().zip(&mut model.sockets).zip(seen.iter().zip(&words)) {
            *socket = *word.0;
            if all_hang {
                socket.queue = socket.backlog + 1;
            }
            member.health = Health { queue: *word.1, stalled: word.1 >> 20, failing: *word.1, hung: word.1 >> 21, ..Health::UNKNOWN };
            socket.entered = word.1 >> 9;
            member.counts = Counts { established: *word.1 & 0xff, expected: *word.1, full: word.1 >> 3, cookies: *word.1, flood: word.1 >> 5, handshake: word.1 >> 7 };
        }
        for index in unsteerable {
            if let Some(member) = model.members.get_mut(index) {
                member.backend.flags |= Backend::UNSTEERABLE;
            }
        }
        let request = Request { virtual_port, ..from_source(policy, source) };
        let decision = model.decide_in(request, LookupFlags { exempt, stale });
        prop_assert_eq!(decision.verdict, decision.reason.verdict(virtual_port), "{:?}", decision);
        prop_assert_eq!(decision.slot.is_some(), decision.verdict == Verdict::Steer, "{:?}", decision);
        if exempt || stale {
            prop_assert_ne!(decision.verdict, Verdict::Refuse);
            let may_fail = model.members.iter().any(|member| model.broken.contains(&member.slot));
            let steerable = |member: &Member| member.backend.flags & Backend::UNSTEERABLE == 0;
            let nobody = virtual_port && !model.members.iter().any(steerable);
            prop_assert!(may_fail || nobody == (decision.reason == Reason::NoBackend), "{:?}", decision);
        }
    }

    /// A quota of 0 may be a listener's part of a server's.
    #[test]
    fn where_quotas_must_not_be_trusted_only_what_somebody_closed_stays_closed(
        members in any_members(), by_hand in prop::collection::vec(any::<bool>(), 40), policy in any_policy(), virtual_port: bool,
        unwritten: bool, source: u64,
    ) {
        let close = |(mut before, by_hand): (Member, &bool)| {
            if *by_hand {
                before.policy = closed(before.slot).policy;
                if unwritten {
                    before.policy = SlotPolicy::new(GENERATION + 1, 9, 1, 0);
                }
            }
            before.backend.port = 11_800;
            before
        };
        let members: Vec<Member> = members.into_iter().zip(&by_hand).map(close).collect();
        let open = members.iter().zip(&by_hand).filter(|(_, by_hand)| !**by_hand).count();
        let has_room = |member: &Member| member.counts.established() < member.quota(0);
        let room = members.iter().any(has_room);
        let mut model = Model { unregistered: true, ..Model::of(members.clone()) };
        let asked = Request { virtual_port, quota: 0, ..from_source(policy, source) };
        let decision = model.decide(asked);
        let expected = match (room, open) {
            (true, _) if virtual_port => Reason::Steered,
            (true, _) => Reason::Admitted,
            (false, 0) => Reason::ClosedByHand,
            (false, _) => Reason::FailOpenFull,
        };
        prop_assert_eq!(decision.reason, expected);
        prop_assert!(decision.slot.is_none_or(|slot| !by_hand[slot as usize]));
        for (member, by_hand) in members.iter().zip(&by_hand) {
            prop_assert_eq!(member.takes_unjudged(1, 0), !*by_hand);
        }
        let stale = model.decide_in(asked, LookupFlags { stale: true, ..NORMAL });
        prop_assert_ne!(stale.verdict, Verdict::Refuse, "a silent daemon opens all");
    }

    /// However seldom the SYNs come, up to what is remembered: those after the grace are refused.
    #[test]
    fn a_queue_that_stays_full_refuses_after_the_grace(
        pauses in prop::collection::vec(prop_oneof![1..QUEUE_REMEMBERED + 1, 1..2 * QUEUE_REMEMBERED], 1..12),
        policy in any_policy(), virtual_port: bool,
    ) {
        let mut model = Model::of([member(0, 0, UNLIMITED, 1)]);
        model.members[0].backend.port = 11_800;
        model.sockets[0].queue = IDLE.backlog + 1;
        let (mut since, mut now) = (NOW, NOW);
        for pause in core::iter::once(0).chain(pauses) {
            now += pause;
            if pause > QUEUE_REMEMBERED {
                since = now;
            }
            let decision = model.decide(Request { now, virtual_port, health: false, ..request(policy) });
            let expected = if now - since > QUEUE_GRACE {
                Reason::AcceptQueueFull
            } else {
                Reason::AcceptQueueGrace
            };
            prop_assert_eq!(decision.reason, expected);
        }
    }

    /// Health alone refuses nobody: whoever is avoided is the last resort.
    #[test]
    fn who_is_avoided_has_a_syn_only_where_no_other_has_room(
        members in any_members(), avoided in prop::collection::vec(any_avoided(), 40), policy in any_policy(), source: u64,
    ) {
        let mut model = Model::of(members.clone());
        let number = members.len() / 2;
        for (member, health) in model.members.iter_mut().zip(&avoided).take(number) {
            member.health = *health;
        }
        let has_room = |member: &Member| member.counts.established() < member.quota(UNLIMITED);
        let is_avoided = |slot: u32| (slot as usize) < number;
        let decision = model.decide(from_source(policy, source));
        let rooms = || members.iter().filter(|member| has_room(member));
        if rooms().any(|member| !is_avoided(member.slot)) {
            prop_assert_eq!(decision.reason, Reason::Steered);
            prop_assert!(!is_avoided(decision.slot.unwrap()), "{decision:?}");
        } else if rooms().next().is_some() {
            prop_assert_eq!(decision.reason, Reason::AvoidedBackend);
        } else {
            prop_assert_eq!(decision.verdict, Verdict::Refuse);
        }
    }

    #[test]
    fn where_more_than_half_are_avoided_nobody_is(
        members in any_members(), avoided in prop::collection::vec(any_avoided(), 40), policy in any_policy(), source: u64, off: bool,
    ) {
        let mut healthy = Model::of(members.clone());
        let mut model = Model::of(members);
        let number = if off { 1 } else { model.members.len() / 2 + 1 };
        for (member, health) in model.members.iter_mut().zip(&avoided).take(number) {
            member.health = *health;
        }
        let asked = Request { health: !off, ..from_source(policy, source) };
        prop_assert_eq!(model.decide(asked), healthy.decide(asked));
    }

    /// Connections one after the other, each closed before the next.
    #[test]
    fn ties_go_round(slots in prop::collection::btree_set(0..1_024_u32, 1..20), turn in 0..1_025_u64, rounds in 1..4_usize) {
        let mut model = Model::of(slots.iter().map(|slot| Member { slot: *slot, ..member(0, 3, UNLIMITED, 1) }));
        let mut ticket = turn;
        let mut had = Vec::new();
        for _ in 0..rounds * slots.len() {
            let decision = model.decide(Request { ticket, ..request(Policy::LeastConnections) });
            for member in &mut model.members {
                member.counts.expected = 0;
            }
            let slot = decision.slot.unwrap();
            ticket = u64::from(slot) + 1;
            had.push(slot);
        }
        had.sort_unstable();
        let each_as_often: Vec<u32> = slots.iter().flat_map(|slot| std::iter::repeat_n(*slot, rounds)).collect();
        prop_assert_eq!(had, each_as_often);
    }

    #[test]
    fn source_hash_moves_only_what_it_must(count in 2..30_u32, gone: prop::sample::Index, source: u64) {
        let members: Vec<Member> = (0..count).map(|slot| member(slot, 0, UNLIMITED, 1)).collect();
        let gone = gone.index(members.len());
        let request = from_source(Policy::SourceHash, source);
        let before = Model::of(members.clone()).decide(request).slot;
        let fewer = members.into_iter().enumerate().filter(|(index, _)| *index != gone).map(|(_, member)| member);
        let after = Model::of(fewer).decide(request).slot;
        if before != u32::try_from(gone).ok() {
            prop_assert_eq!(before, after);
        }
    }

    #[test]
    fn source_hash_follows_the_address_not_the_slot(source: u64) {
        let members: Vec<Member> = (0..8).map(|slot| member(slot, 0, UNLIMITED, 1)).collect();
        let moved: Vec<Member> = members.iter().map(|old| Member { slot: old.slot + 100, ..*old }).collect();
        let request = from_source(Policy::SourceHash, source);
        let (before, after) = (Model::of(members).decide(request).slot, Model::of(moved).decide(request).slot);
        prop_assert_eq!(before.unwrap() + 100, after.unwrap());
    }

    #[test]
    fn with_cookies_the_choice_depends_on_the_tuple_alone(
        policy in any_policy(), source: u64, at_syn in prop::collection::vec(0..100_u32, 5), at_ack in prop::collection::vec(0..100_u32, 5),
    ) {
        let choose = |counts: &[u32], ticket| {
            let mut model = Model::of((0..5).map(|slot| member(slot, counts[slot as usize], UNLIMITED, 1)));
            model.sockets[2].overflow_age = 1;
            model.members[2].counts.cookies = cookies_until(Cookies::InUse, NOW + 10);
            model.decide(Request { ticket, ..from_source(policy, source) }).slot
        };
        prop_assert_eq!(choose(&at_syn, 1), choose(&at_ack, 2));
    }
}

#[test]
fn weights_converge() {
    for policy in [
        Policy::LeastConnections,
        Policy::RoundRobin,
        Policy::SourceHash,
    ] {
        let mut model = Model::of(
            [1, 2, 5]
                .into_iter()
                .zip(0..)
                .map(|(weight, slot)| member(slot, 0, UNLIMITED, weight)),
        );
        for source in 0..8_000 {
            model.connect(from_source(policy, source));
        }
        let tolerance = if policy == Policy::SourceHash { 250 } else { 1 };
        for (count, expected) in model
            .established()
            .into_iter()
            .zip([1_000, 2_000, 5_000_u32])
        {
            assert!(
                count.abs_diff(expected) <= tolerance,
                "{}: {:?}",
                policy.name(),
                model.established()
            );
        }
    }
}

#[test]
fn siblings_of_one_address_share_its_clients() {
    let mut model = Model::of((0..4).map(|slot| {
        let mut sibling = member(slot, 0, UNLIMITED, 1);
        sibling.backend.port = 11_800;
        sibling
    }));
    for source in 0..4_000 {
        model.connect(from_source(Policy::SourceHash, source));
    }
    assert!(
        model
            .established()
            .iter()
            .all(|count| count.abs_diff(1_000) < 150),
        "{:?}",
        model.established()
    );
}

#[test]
fn pending_counts_and_the_next_candidate_is_taken() {
    let mut model = Model::of((0..2).map(|slot| member(slot, slot, 5, 1)));
    model.sockets[0] = Observation {
        half_open: 5,
        young: 5,
        ..IDLE
    };
    assert_eq!(
        model.decide(request(Policy::LeastConnections)).slot,
        Some(1)
    );
    model.sockets[1] = Observation {
        half_open: 4,
        young: 4,
        ..IDLE
    };
    let refused = model.decide(request(Policy::LeastConnections));
    assert_eq!(refused, Decision::refuse(Reason::OverQuota));
}

/// The first cookie of a listener: nobody has looked at its SYN queue since it began to fill. The
/// client takes the last place.
#[test]
fn the_ack_of_a_first_cookie_finds_the_listener_of_the_syn() {
    let of = |source| from_source(Policy::LeastConnections, source);
    for source in 0..200 {
        let mut model = Model::of((0..3).map(|slot| member(slot, 4, 5, 1)));
        let full = Observation {
            half_open: 129,
            ..IDLE
        };
        model.sockets.fill(full);
        let asked = model.decide(of(source)).slot.unwrap();
        let index = model.index(asked);
        model.sockets[index].overflow_age = 0;
        model.members[index].counts.expected = pack_expected(0, NOW);
        for (member, seen) in model.members.iter_mut().zip(&model.sockets) {
            member.counts.cookies = pack_cookies(seen, 0, NOW).unwrap();
        }
        assert_eq!(
            model.decide(of(source)).slot,
            Some(asked),
            "client {source}"
        );
    }
}

/// Their counters are not believed while cookies are about to be in use: each is looked at once.
#[test]
fn what_a_look_finds_counts_when_cookies_are_about_to_be_in_use() {
    let mut model = Model::of((0..3).map(|slot| member(slot, 0, 5, 1)));
    for member in &mut model.members {
        member.counts.cookies = cookies_until(Cookies::Soon, NOW + 10);
    }
    model.sockets.fill(Observation {
        half_open: 126,
        young: 126,
        ..IDLE
    });
    let asked = request(Policy::LeastConnections);
    assert_eq!(model.decide(asked).reason, Reason::OverQuotaCookie);
    model.sockets[1] = IDLE;
    assert_eq!(model.decide(asked).slot, Some(1));
}

#[test]
fn a_full_queue_is_steered_around_then_has_grace_then_is_refused() {
    let full = Observation {
        queue: 9,
        backlog: 8,
        ..IDLE
    };
    let mut model = Model::of((0..2).map(|slot| member(slot, slot, 5, 1)));
    model.sockets[0] = full;
    assert_eq!(
        model.decide(request(Policy::LeastConnections)).slot,
        Some(1)
    );
    model.sockets[1] = full;
    let grace = model.decide(request(Policy::LeastConnections));
    assert_eq!(grace.reason, Reason::AcceptQueueGrace);
    for member in &mut model.members {
        member.counts.full = pack_full(NOW - QUEUE_GRACE - 1, NOW - 1);
    }
    let refused = model.decide(request(Policy::LeastConnections));
    assert_eq!(refused, Decision::refuse(Reason::AcceptQueueFull));
}

#[test]
fn the_only_backend_with_room_is_found_behind_many_that_seem_to_have_some() {
    for busy in [
        Observation {
            queue: 9,
            backlog: 8,
            ..IDLE
        },
        Observation {
            half_open: 5,
            young: 5,
            ..IDLE
        },
    ] {
        for policy in Policy::ALL {
            let mut model = Model::of((0..30).map(|slot| member(slot, 0, 5, 1)));
            model.sockets.fill(busy);
            model.sockets[29] = IDLE;
            assert_eq!(
                model.decide(request(policy)).slot,
                Some(29),
                "{}",
                policy.name()
            );
        }
    }
}

#[test]
fn each_refusal_has_its_reason() {
    let decide = |quota, change: &dyn Fn(&mut Model)| {
        let mut model = Model::of([member(0, 5, quota, 1)]);
        change(&mut model);
        model.decide(request(Policy::LeastConnections)).reason
    };
    assert_eq!(decide(5, &|_| ()), Reason::OverQuota);
    assert_eq!(decide(0, &|_| ()), Reason::OverQuota);
    assert_eq!(
        decide(0, &|model| model.members[0] = closed(0)),
        Reason::ClosedByHand
    );
    assert_eq!(decide(6, &|_| ()), Reason::Steered);
    assert_eq!(
        decide(6, &|model| model.members[0].backend.netns = 2),
        Reason::NoBackend
    );
    assert_eq!(
        decide(6, &|model| model.members[0].backend.flags =
            Backend::CANDIDATE),
        Reason::Steered
    );
    assert_eq!(
        decide(5, &|model| {
            model.members[0].counts.cookies = cookies_until(Cookies::InUse, NOW + 10);
        }),
        Reason::OverQuotaCookie
    );
}

#[test]
fn a_candidate_waits_for_the_daemon() {
    let mut candidate = member(0, 0, 5, 1);
    candidate.backend.flags = Backend::CANDIDATE;
    candidate.policy = SlotPolicy {
        quota: 0,
        weight: 0,
        adopted: 0,
        server: 0,
    };
    assert_eq!(candidate.state(), BackendState::Candidate);
    let decision = Model::of([candidate]).decide(request(Policy::LeastConnections));
    assert_eq!(decision.reason, Reason::NoBackend);
}

#[test]
fn a_stale_daemon_and_an_exempt_source_are_not_refused() {
    let full = || Model::of((0..3).map(|slot| member(slot, 5 + slot, 5, 1)));
    let stale = LookupFlags {
        stale: true,
        ..NORMAL
    };
    let decision = full().decide_in(request(Policy::LeastConnections), stale);
    assert_eq!(decision, Decision::steer(0, Reason::FailOpenStale));
    let exempt = LookupFlags {
        exempt: true,
        ..NORMAL
    };
    let decision = full().decide_in(request(Policy::LeastConnections), exempt);
    assert_eq!(decision, Decision::steer(0, Reason::Exempt));
    let own_port = Request {
        virtual_port: false,
        ..request(Policy::LeastConnections)
    };
    let decision = full().decide_in(own_port, exempt);
    assert_eq!(decision, Decision::pass(Reason::Exempt));
}

fn computed(slot: u32, established: u32, quota: u32) -> Member {
    Member {
        policy: SlotPolicy::new(GENERATION, quota, 1, SlotPolicy::COMPUTED),
        ..member(slot, established, quota, 1)
    }
}

#[test]
fn computed_quotas_that_what_stands_contradicts_refuse_nobody() {
    let decide = |members: [Member; 2]| {
        Model::of(members)
            .decide(request(Policy::LeastConnections))
            .reason
    };
    // 100 + 100 allow for 25 more before they are taken for nonsense.
    assert_eq!(
        decide([computed(0, 113, 100), computed(1, 113, 100)]),
        Reason::FailOpenQuota
    );
    assert_eq!(
        decide([computed(0, 113, 100), computed(1, 112, 100)]),
        Reason::OverQuota
    );
    assert_eq!(
        decide([member(0, 500, 100, 1), member(1, 500, 100, 1)]),
        Reason::OverQuota,
        "what somebody wrote down is meant so"
    );
    assert_eq!(
        decide([computed(0, 500, 100), member(1, 500, 100, 1)]),
        Reason::OverQuota
    );
}

#[test]
fn nobody_is_refused_while_listeners_are_not_registered() {
    let mut model = Model::of([member(0, 9, 5, 1), member(1, 8, 5, 1), closed(2)]);
    model.unregistered = true;
    let decision = model.decide(request(Policy::LeastConnections));
    assert_eq!(
        decision,
        Decision::steer(1, Reason::FailOpenFull),
        "and one that somebody closed stays closed"
    );
    model = Model::of([closed(0)]);
    model.unregistered = true;
    let decision = model.decide(request(Policy::LeastConnections));
    assert_eq!(decision.reason, Reason::ClosedByHand);
}

#[test]
fn an_error_refuses_nobody() {
    let decide = |virtual_port| {
        let mut model = Model::of([member(0, 0, 5, 1), member(1, 5, 5, 1)]);
        model.broken = vec![0];
        model.decide(Request {
            virtual_port,
            ..request(Policy::LeastConnections)
        })
    };
    let steered = Decision::steer(1, Reason::FailOpenError);
    assert_eq!(decide(true), steered);
    let mut model = Model::of([member(0, 0, 5, 1), member(1, 5, 5, 1)]);
    model.broken = vec![0];
    let own = Request {
        virtual_port: false,
        to: model.members[0].backend.address,
        ..request(Policy::LeastConnections)
    };
    let passed = Decision::pass(Reason::FailOpenError);
    assert_eq!(model.decide(own), passed);
}

#[test]
fn on_an_own_port_only_listeners_of_the_destination_take_part() {
    let own = |address| Request {
        virtual_port: false,
        to: address,
        ..request(Policy::LeastConnections)
    };
    let bound = member(0, 4, 10, 1);
    let mut wildcard = member(1, 0, 10, 1);
    wildcard.backend.address = Address::ANY;
    let elsewhere = Address::from_v4_be(u32::from_ne_bytes([10, 0, 0, 9]));
    let mut model = Model::of([bound, wildcard]);
    assert_eq!(model.decide(own(bound.backend.address)).slot, Some(0));
    assert_eq!(model.decide(own(elsewhere)).slot, Some(1));
    let mut stranger = member(2, 0, 10, 1);
    stranger.backend.uid = 1_000;
    assert_eq!(
        Model::of([bound, stranger])
            .decide(own(bound.backend.address))
            .slot,
        Some(0)
    );
    let mut device = member(3, 9, 10, 1);
    device.backend.device = 5;
    assert_eq!(
        Model::of([bound, device])
            .decide(own(bound.backend.address))
            .slot,
        Some(0)
    );
    let arrived = Request {
        device: 5,
        ..own(bound.backend.address)
    };
    assert_eq!(Model::of([bound, device]).decide(arrived).slot, Some(3));
}

/// Every one of them looks free by its counters and is not.
fn sixty(seen: Observation) -> Model {
    let mut model = Model::of((0..60).map(|slot| member(slot, 0, 5, 1)));
    model.sockets.fill(seen);
    model
}

#[test]
fn after_many_looks_the_next_is_taken_without_one_and_the_next_syn_gets_further() {
    let mut model = sixty(Observation {
        half_open: 5,
        young: 5,
        ..IDLE
    });
    let asked = request(Policy::LeastConnections);
    let unjudged = Decision::steer(48, Reason::FailOpenError);
    assert_eq!(model.decide(asked), unjudged);
    // Each look has left what it found: the others are looked at, and then all were.
    let refused = Decision::refuse(Reason::OverQuota);
    assert_eq!(model.decide(asked), refused);

    let mut hanging = sixty(Observation {
        queue: 9,
        backlog: 8,
        ..IDLE
    });
    assert_eq!(hanging.decide(asked), unjudged);
    let grace = Reason::AcceptQueueGrace;
    assert_eq!(hanging.decide(asked).reason, grace);
}

#[test]
fn on_an_own_port_the_kernel_decides_after_many_looks() {
    let mut model = sixty(Observation {
        half_open: 5,
        young: 5,
        ..IDLE
    });
    let asked = Request {
        virtual_port: false,
        ..request(Policy::LeastConnections)
    };
    let left_to_it = Decision::pass(Reason::FailOpenError);
    assert_eq!(model.decide(asked), left_to_it);
    assert_eq!(model.decide(asked).verdict, Verdict::Refuse);
}

/// As many as there may be, of which all but one have gone without the kernel half seeing it.
#[test]
fn those_that_are_gone_hide_nobody() {
    let mut model = Model::of((0..40).map(|slot| member(slot, 0, 5, 1)));
    model.gone = (0..39).collect();
    let decision = model.decide(request(Policy::LeastConnections));
    assert_eq!(decision, Decision::steer(39, Reason::Steered));
}

/// For longer than the grace.
fn hanging() -> Model {
    let mut model = Model::of((0..8).map(|slot| member(slot, 0, 5, 1)));
    model.sockets.fill(Observation {
        queue: 9,
        backlog: 8,
        ..IDLE
    });
    for member in &mut model.members {
        member.counts.full = pack_full(NOW - QUEUE_GRACE - 1, NOW - 1);
    }
    model
}

#[test]
fn who_must_not_be_refused_is_given_to_one_that_hangs() {
    let stale = LookupFlags {
        stale: true,
        ..NORMAL
    };
    let exempt = LookupFlags {
        exempt: true,
        ..NORMAL
    };
    for policy in Policy::ALL {
        let decide = |flags| hanging().decide_in(request(policy), flags);
        let decision = decide(stale);
        assert_eq!(
            (decision.reason, decision.verdict),
            (Reason::FailOpenStale, Verdict::Steer)
        );
        let decision = decide(exempt);
        assert_eq!(
            (decision.reason, decision.verdict),
            (Reason::Exempt, Verdict::Steer)
        );
        assert_eq!(decide(NORMAL).reason, Reason::AcceptQueueFull);
    }
}

#[test]
fn with_nobody_to_take_it_nobody_is_said_to_be_let_in() {
    for flags in [(false, true), (true, false), (false, false)] {
        let flags = LookupFlags {
            exempt: flags.0,
            stale: flags.1,
        };
        let asked = request(Policy::LeastConnections);
        let mut broken = Model::of((0..8).map(|slot| member(slot, 0, 5, 1)));
        broken.broken = (0..8).collect();
        let nobody = Decision::pass(Reason::NoBackend);
        assert_eq!(broken.decide_in(asked, flags), nobody);
        let mut model = Model::of((0..8).map(|slot| member(slot, 0, 5, 1)));
        for member in &mut model.members {
            member.backend.flags |= Backend::UNSTEERABLE;
        }
        assert_eq!(model.decide_in(asked, flags), nobody);
        assert_eq!(Model::of([]).decide_in(asked, flags), nobody);
    }
}

/// A backend whose breaker has been open for long enough.
fn on_trial(slot: u32) -> Member {
    Member {
        health: Health {
            failing: stamped(NOW - 1, Breaker::Open as u64),
            ..Health::UNKNOWN
        },
        ..member(slot, 0, UNLIMITED, 1)
    }
}

#[test]
fn one_syn_is_the_trial_and_the_next_goes_elsewhere() {
    for policy in [Policy::LeastConnections, Policy::RoundRobin] {
        let others = (1..3).map(|slot| member(slot, 5, UNLIMITED, 1));
        let mut model = Model::of([on_trial(0)].into_iter().chain(others));
        let mut trials = 0;
        for ticket in 0..12 {
            let asked = Request {
                ticket,
                ..request(policy)
            };
            trials += u32::from(model.connect(asked).slot == Some(0));
        }
        assert_eq!(trials, 1, "{}", policy.name());
        assert_eq!(model.members[0].health.breaker(), Breaker::Trial);
        assert!((10..=11).contains(&model.members[1].counts.established()));
    }
}

/// The SYN of the trial was answered with a cookie: its ACK finds it.
#[test]
fn with_cookies_the_ack_of_a_trial_finds_the_listener_of_its_syn() {
    let mut trials = 0;
    for source in 0..100 {
        let others = (1..3).map(|slot| member(slot, 5, UNLIMITED, 1));
        let mut model = Model::of([on_trial(0)].into_iter().chain(others));
        for member in &mut model.members {
            member.counts.cookies = cookies_until(Cookies::InUse, NOW + 10);
        }
        let of = |ticket| Request {
            ticket,
            ..from_source(Policy::LeastConnections, source)
        };
        let at_syn = model.decide(of(1)).slot;
        assert_eq!(model.decide(of(2)).slot, at_syn, "client {source}");
        trials += u32::from(at_syn == Some(0));
    }
    assert!((15..60).contains(&trials), "{trials}");
}

#[test]
fn those_found_stalled_by_a_look_are_steered_around_until_most_are() {
    let mut model = Model::of((0..3).map(|slot| member(slot, slot, UNLIMITED, 1)));
    let waiting = Observation { queue: 1, ..IDLE };
    for index in 0..2 {
        model.sockets[index] = waiting;
        model.members[index].health.queue = MARK;
    }
    let asked = request(Policy::LeastConnections);
    // The first look finds one of three, the second another: two of three are more than half.
    model.sockets[1] = IDLE;
    assert_eq!(model.decide(asked), Decision::steer(1, Reason::Steered));
    model.sockets[1] = waiting;
    model.members[1].health.queue = MARK;
    assert_eq!(model.decide(asked), Decision::steer(0, Reason::Steered));
    assert!(
        model
            .members
            .iter()
            .filter(|member| member.health.stalled > NOW)
            .count()
            == 2
    );
}
