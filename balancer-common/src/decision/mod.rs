//! The decision for one look-up, in two phases: scan the packed numbers, then look at a few sockets in order.

pub mod admission;
pub mod reason;
pub mod scan;

use crate::abi::Cookies;
use crate::decision::admission::{Judgement, QUEUE_GRACE};
use crate::decision::scan::{Enforce, MAX_LOOKS, Request, Scan};
use crate::{Reason, opaque};

/// How one attempt at a backend ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The SYN is its.
    Assigned,
    /// Another CPU sent a SYN there since the scan: the choice must be made anew.
    Raced,
    /// SYN cookies are in use, which the scan did not know: the choice must be made anew, by four-tuple.
    Cookies,
    /// It was looked at and can't take it.
    Judged(Judgement),
    /// It does not listen any more.
    Gone,
    /// The kernel refused the assignment.
    Failed,
    /// Another `sk_lookup` program has chosen a socket.
    Foreign,
}

impl Attempt {
    /// Packed into one word, for a call between kernel functions, which return no structures.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Assigned => 0,
            Self::Raced => 1,
            Self::Cookies => 2,
            Self::Gone => 3,
            Self::Failed => 4,
            Self::Foreign => 5,
            Self::Judged(Judgement::OverQuota) => 6,
            Self::Judged(Judgement::QueueFull { since }) => 7 | (since as u64) << 32,
            Self::Judged(Judgement::Take) => 8,
        }
    }

    /// The attempt of a word; an unknown one failed.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        match word as u32 {
            0 => Self::Assigned,
            1 => Self::Raced,
            2 => Self::Cookies,
            3 => Self::Gone,
            5 => Self::Foreign,
            6 => Self::Judged(Judgement::OverQuota),
            7 => Self::Judged(Judgement::QueueFull {
                since: (word >> 32) as u32,
            }),
            8 => Self::Judged(Judgement::Take),
            _ => Self::Failed,
        }
    }
}

/// The maps and the sockets, or a picture of them.
pub trait BackendAccess {
    /// Puts the scan's cursor before every member of the service, in ascending order of slots.
    fn begin(&mut self, scan: &mut Scan);
    /// Feeds to the scan what its cursor leads to.
    fn walk(&mut self, scan: &mut Scan);
    /// Looks at the backend's socket, judges, and assigns the SYN to it where the judgement is to take it. What it finds
    /// out must show in the counters of the next scan (see [`full_word`](crate::decision::admission::full_word), [`over_word`](crate::decision::admission::over_word)).
    fn attempt(&mut self, slot: u32, decision: &DecisionState) -> Attempt;
    /// Keeps the sum of the weights for [`Request::weights`] of later look-ups.
    fn remember_weights(&mut self, service: u16, weights: u64);
    /// Whether listeners of the service serve without being registered, because a map was full.
    fn has_unregistered(&self, service: u16) -> bool;
}

/// What is known before anything is scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupFlags {
    /// The source is never refused.
    pub exempt: bool,
    /// The daemon has been silent for too long to refuse anybody.
    pub stale: bool,
}

/// Why somebody is let in whom the quotas would refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum FailOpenCause {
    /// None: quotas count.
    None,
    /// The daemon has been silent for too long.
    Stale,
    /// What the quotas were computed from is wrong.
    Nonsense,
    /// There are listeners that could not be registered.
    Unregistered,
    /// The kernel refused to assign a backend that had room.
    Error,
}

/// How a look-up ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Why.
    pub reason: Reason,
    /// The backend that has it, where one was chosen.
    pub slot: Option<u32>,
}

/// Rounds in all: looks, passes for the sum of the weights and for cookies, choices made anew because of other CPUs.
pub const MAX_ROUNDS: u32 = 48;
/// After so many rounds another CPU's SYN is no reason to choose anew.
const YIELDING_ROUNDS: u32 = 6;

/// The state of one decision. The kernel keeps it in a map: on the stack the verifier would follow every value in it.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, each noted where it is found out"
)]
pub struct DecisionState {
    /// The choice.
    pub scan: Scan,
    flags: LookupFlags,
    /// Give way to another CPU that has sent a SYN to the chosen backend since the choice.
    pub yielding: bool,
    /// The backend at hand is taken although its accept queue is full.
    pub last_resort: bool,
    /// What the first passes are for is known: whether cookies are in use, and the sum of the weights.
    cookies_known: bool,
    total_known: bool,
    looks: u32,
    rounds: u32,
    over: bool,
    over_with_cookies: bool,
    full: bool,
    failed: bool,
    cause: FailOpenCause,
    /// A backend with room whose queue has been full only for a moment, or [`NOBODY`].
    momentary: u32,
}

const NOBODY: u32 = u32::MAX;

impl DecisionState {
    /// Nothing is decided.
    pub fn new(request: Request, flags: LookupFlags) -> Self {
        let mut state = Self {
            scan: Scan::new(request),
            flags,
            yielding: true,
            last_resort: false,
            cookies_known: false,
            total_known: false,
            looks: 0,
            rounds: 0,
            over: false,
            over_with_cookies: false,
            full: false,
            failed: false,
            cause: FailOpenCause::None,
            momentary: NOBODY,
        };
        state.start(request, flags);
        state
    }

    /// Makes a used one new, in place: a copy of the whole would be a loop over its bytes in the kernel.
    #[inline(always)]
    pub fn start(&mut self, request: Request, flags: LookupFlags) {
        let enforce = if flags.exempt {
            Enforce::Nothing
        } else {
            Enforce::Quotas
        };
        self.scan.start(request, enforce);
        self.flags = flags;
        self.yielding = true;
        self.last_resort = false;
        let no = opaque(false);
        self.cookies_known = no;
        self.total_known = no;
        self.looks = 0;
        self.rounds = 0;
        self.over = no;
        self.over_with_cookies = no;
        self.full = no;
        self.failed = no;
        self.cause = FailOpenCause::None;
        self.momentary = NOBODY;
    }

    /// The decision that needs no look: an exempt source on an own port.
    #[inline(always)]
    pub fn without_looking(&self) -> Option<Decision> {
        if self.flags.exempt && !self.scan.request.virtual_port {
            return Some(Decision {
                reason: Reason::Exempt,
                slot: None,
            });
        }
        None
    }

    /// The decision when nothing is left to try.
    #[inline(always)]
    pub fn failure(&self) -> Decision {
        Decision {
            reason: self.reason_of_failure(),
            slot: None,
        }
    }

    /// Scans all members. Whether there must be another pass before the best of the scan means something.
    #[inline(always)]
    fn scan<W: BackendAccess>(&mut self, world: &mut W) -> bool {
        self.scan.again();
        world.begin(&mut self.scan);
        world.walk(&mut self.scan);
        self.needs_another_pass(world)
    }

    /// Whether another pass is needed before the best of the scan means something.
    #[inline(always)]
    fn needs_another_pass<W: BackendAccess>(&mut self, world: &mut W) -> bool {
        if !self.cookies_known {
            self.cookies_known = true;
            if self.scan.tally.cookies > 0 {
                self.scan.cookies = true;
                return true;
            }
        }
        if let Some(total) = self.scan.other_total() {
            world.remember_weights(self.scan.request.service, total);
            // Whoever comes or goes between two passes changes it again.
            let known = self.total_known;
            self.total_known = true;
            return !known;
        }
        false
    }

    #[inline(always)]
    fn next(&self) -> Option<u32> {
        if !self.last_resort {
            if self.looks < MAX_LOOKS as u32 {
                self.scan.best()
            } else {
                None
            }
        } else if self.momentary == NOBODY {
            None
        } else {
            Some(self.momentary)
        }
    }

    /// Nobody has room. Before a refusal: quotas that must not be trusted must not refuse, and a queue full for a moment is
    /// no end. False: there is nothing left to try.
    #[inline(always)]
    fn fail_open<W: BackendAccess>(&mut self, world: &W) -> bool {
        if matches!(self.scan.enforce, Enforce::Quotas) {
            self.cause = self.fail_open_cause(world);
            if !matches!(self.cause, FailOpenCause::None) {
                self.choose_without_quotas();
                return true;
            }
        }
        if !self.last_resort && self.momentary != NOBODY {
            self.last_resort = true;
            return true;
        }
        false
    }

    #[inline(always)]
    fn fail_open_cause<W: BackendAccess>(&self, world: &W) -> FailOpenCause {
        let tally = &self.scan.tally;
        if self.flags.stale {
            FailOpenCause::Stale
        } else if self.failed {
            // On an own port the kernel decides alone instead.
            if self.scan.request.virtual_port {
                FailOpenCause::Error
            } else {
                FailOpenCause::None
            }
        } else if !self.over && tally.over == 0 {
            FailOpenCause::None
        } else if tally.quotas_are_nonsense() {
            FailOpenCause::Nonsense
        } else if world.has_unregistered(self.scan.request.service) {
            FailOpenCause::Unregistered
        } else {
            FailOpenCause::None
        }
    }

    #[inline(always)]
    fn choose_without_quotas(&mut self) {
        self.scan.enforce = if matches!(self.cause, FailOpenCause::Stale) {
            Enforce::Nothing
        } else {
            Enforce::Closed
        };
        self.scan.forget_tried();
        self.cookies_known = false;
        self.total_known = false;
        self.looks = 0;
        self.momentary = NOBODY;
    }

    /// Notes an attempt that led to nothing.
    #[inline(always)]
    fn note(&mut self, attempt: Attempt, slot: u32) {
        match attempt {
            Attempt::Judged(Judgement::OverQuota) => {
                self.over = true;
                self.over_with_cookies |= self.scan.cookies;
            }
            Attempt::Judged(Judgement::QueueFull { since }) => {
                self.full = true;
                if self.momentary == NOBODY
                    && self.scan.request.now.wrapping_sub(since) <= QUEUE_GRACE
                {
                    self.momentary = slot;
                }
            }
            Attempt::Failed => self.failed = true,
            _ => {}
        }
        // A look that fails changes the counters, which put the backend behind those that may have room. Only one that was
        // there already, or has no counters to change, must be remembered.
        if self.scan.best_is_doubtful()
            || self.scan.best_has_no_hint()
            || matches!(attempt, Attempt::Gone | Attempt::Failed)
        {
            self.scan.mark_tried(self.looks as usize, slot);
            self.looks += 1;
        }
    }

    #[inline(always)]
    fn reason_of_success(&self) -> Reason {
        if self.flags.exempt {
            return Reason::Exempt;
        }
        match self.cause {
            FailOpenCause::Stale => return Reason::FailOpenStale,
            FailOpenCause::Nonsense => return Reason::FailOpenQuota,
            FailOpenCause::Unregistered => return Reason::FailOpenFull,
            FailOpenCause::Error => return Reason::FailOpenError,
            FailOpenCause::None => {}
        }
        if self.last_resort {
            Reason::AcceptQueueGrace
        } else if self.scan.request.virtual_port {
            Reason::Steered
        } else {
            Reason::Admitted
        }
    }

    /// Names the refusal, or the error that keeps it from being one.
    #[inline(always)]
    fn reason_of_failure(&self) -> Reason {
        let tally = &self.scan.tally;
        if self.flags.exempt {
            Reason::Exempt
        } else if tally.members == 0 {
            Reason::NoBackend
        } else if self.flags.stale || self.failed {
            // An error must not refuse anybody.
            Reason::FailOpenError
        } else if self.full {
            Reason::AcceptQueueFull
        } else if self.over || tally.over > 0 {
            if self.over_with_cookies || tally.over_with_cookies > 0 {
                Reason::OverQuotaCookie
            } else {
                Reason::OverQuota
            }
        } else if tally.closed > 0 {
            Reason::ClosedByHand
        } else {
            Reason::NoBackend
        }
    }
}

/// One round of a decision; `None`: there must be another, at most [`MAX_ROUNDS`] in all.
#[inline(always)]
pub fn advance<W: BackendAccess>(world: &mut W, state: &mut DecisionState) -> Option<Decision> {
    state.rounds += 1;
    if state.scan(world) {
        return None;
    }
    let Some(slot) = state.next() else {
        return if state.fail_open(world) {
            None
        } else {
            Some(state.failure())
        };
    };
    state.yielding &= state.rounds < YIELDING_ROUNDS && !state.last_resort;
    let attempt = world.attempt(slot, state);
    match attempt {
        Attempt::Assigned => {
            return Some(Decision {
                reason: state.reason_of_success(),
                slot: Some(slot),
            });
        }
        Attempt::Foreign => {
            return Some(Decision {
                reason: Reason::ForeignSkLookup,
                slot: None,
            });
        }
        Attempt::Raced => {}
        Attempt::Cookies => state.scan.cookies = true,
        attempt => {
            let last = state.last_resort;
            state.note(attempt, slot);
            if last {
                return Some(state.failure());
            }
        }
    }
    None
}

/// Decides one look-up for a service. The kernel program does the same with `bpf_loop` for the loop, which the verifier
/// follows once instead of for every round.
pub fn decide<W: BackendAccess>(world: &mut W, state: &mut DecisionState) -> Decision {
    if let Some(decision) = state.without_looking() {
        return decision;
    }
    for _ in 0..MAX_ROUNDS {
        if let Some(decision) = advance(world, state) {
            return decision;
        }
    }
    state.failure()
}

/// Whether a look must make the choice anew because cookies turn out to be in use, or about to be: a SYN queue that is found full,
/// and not nearly full first, answers the very SYN at hand with one.
#[inline(always)]
pub const fn must_choose_by_tuple(cookies: Cookies, state: &DecisionState) -> bool {
    !matches!(cookies, Cookies::Off) && !state.scan.cookies
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{
        Address, Backend, BackendState, Counts, MEMBER_WORDS, Policy, SlotPolicy, SlotState,
        UNLIMITED,
    };
    use crate::decision::admission::{
        Observation, cookies_word, expected_word, full_word, judge, over_word,
    };
    use crate::decision::scan::{Cursor, Member};
    use crate::{Verdict, hash};
    use proptest::prelude::*;
    use std::vec::Vec;

    const GENERATION: u32 = 3;
    const NOW: u32 = 50_000;

    /// Backends whose sockets say exactly what their counters say.
    struct Model {
        members: Vec<Member>,
        sockets: Vec<Observation>,
        /// The kernel refuses to assign these.
        broken: Vec<u32>,
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
    };

    impl Model {
        fn of(members: impl IntoIterator<Item = Member>) -> Self {
            let members: Vec<Member> = members.into_iter().collect();
            let sockets = members.iter().map(|_| IDLE).collect();
            Self {
                members,
                sockets,
                broken: Vec::new(),
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
            let index = self.index(slot);
            let (member, seen) = (&self.members[index], &self.sockets[index]);
            if must_choose_by_tuple(seen.cookies(), state) {
                return Attempt::Cookies;
            }
            let quota = member.quota(state.scan.request.quota);
            let pending = seen.pending(&member.counts, quota, NOW);
            let enforce = state.scan.enforces(quota);
            let judgement = judge(seen, &member.counts, quota, enforce, NOW);
            let counts = &mut self.members[index].counts;
            match judgement {
                Judgement::QueueFull { .. } if state.last_resort => Attempt::Assigned,
                Judgement::QueueFull { since } => {
                    counts.full = full_word(since, NOW);
                    Attempt::Judged(judgement)
                }
                Judgement::OverQuota => {
                    counts.expected = over_word(pending, NOW);
                    Attempt::Judged(judgement)
                }
                Judgement::Take if self.broken.contains(&slot) => Attempt::Failed,
                Judgement::Take => Attempt::Assigned,
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
                .map(|((established, quota, weight), slot)| {
                    member(slot, established, quota, weight)
                })
                .collect()
        })
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
                |(half_open, young, fast_open, queue, backlog, syncookies, overflow_age)| {
                    Observation {
                        half_open,
                        young,
                        fast_open,
                        queue,
                        backlog,
                        syncookies,
                        overflow_age,
                    }
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
                prop_assert_eq!(decision.slot.is_none(), decision.reason.verdict() == Verdict::Refuse);
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

        #[test]
        fn whatever_the_sockets_say_nothing_panics(
            members in any_members(), seen in prop::collection::vec(any_observation(), 40), policy in any_policy(),
            exempt: bool, stale: bool, virtual_port: bool, source: u64, words in prop::collection::vec(any::<u64>(), 40),
        ) {
            let mut model = Model::of(members);
            for ((member, socket), word) in model.members.iter_mut().zip(&mut model.sockets).zip(seen.iter().zip(&words)) {
                *socket = *word.0;
                member.counts = Counts { established: *word.1 & 0xff, expected: *word.1, full: word.1 >> 3, cookies: *word.1, stalled: word.1 >> 5, handshake: word.1 >> 7 };
            }
            let request = Request { virtual_port, ..from_source(policy, source) };
            let decision = model.decide_in(request, LookupFlags { exempt, stale });
            if exempt || stale {
                prop_assert_ne!(decision.reason.verdict(), Verdict::Refuse);
            }
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
                model.members[2].counts.cookies = (Cookies::InUse as u64) << 32 | u64::from(NOW + 10);
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
        assert_eq!(
            refused,
            Decision {
                reason: Reason::OverQuota,
                slot: None
            }
        );
    }

    /// The first cookie of a listener: nobody has looked at its SYN queue since it began to fill. The client takes the last place.
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
            model.members[index].counts.expected = expected_word(0, NOW);
            for (member, seen) in model.members.iter_mut().zip(&model.sockets) {
                member.counts.cookies = cookies_word(seen, 0, NOW).unwrap();
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
            member.counts.cookies = (Cookies::Soon as u64) << 32 | u64::from(NOW + 10);
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
            member.counts.full = full_word(NOW - QUEUE_GRACE - 1, NOW - 1);
        }
        let refused = model.decide(request(Policy::LeastConnections));
        assert_eq!(
            refused,
            Decision {
                reason: Reason::AcceptQueueFull,
                slot: None
            }
        );
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
        assert_eq!(decide(0, &|_| ()), Reason::ClosedByHand);
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
                model.members[0].counts.cookies =
                    (Cookies::InUse as u64) << 32 | u64::from(NOW + 10);
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
        assert_eq!(
            decision,
            Decision {
                reason: Reason::FailOpenStale,
                slot: Some(0)
            }
        );
        let exempt = LookupFlags {
            exempt: true,
            ..NORMAL
        };
        let decision = full().decide_in(request(Policy::LeastConnections), exempt);
        assert_eq!(
            decision,
            Decision {
                reason: Reason::Exempt,
                slot: Some(0)
            }
        );
        let own_port = Request {
            virtual_port: false,
            ..request(Policy::LeastConnections)
        };
        let decision = full().decide_in(own_port, exempt);
        assert_eq!(
            decision,
            Decision {
                reason: Reason::Exempt,
                slot: None
            }
        );
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
        let mut model = Model::of([member(0, 9, 5, 1), member(1, 8, 5, 1), member(2, 0, 0, 1)]);
        model.unregistered = true;
        let decision = model.decide(request(Policy::LeastConnections));
        assert_eq!(
            decision,
            Decision {
                reason: Reason::FailOpenFull,
                slot: Some(1)
            },
            "and one that somebody closed stays closed"
        );
        model = Model::of([member(0, 0, 0, 1)]);
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
        let steered = Decision {
            reason: Reason::FailOpenError,
            slot: Some(1),
        };
        assert_eq!(decide(true), steered);
        let mut model = Model::of([member(0, 0, 5, 1), member(1, 5, 5, 1)]);
        model.broken = vec![0];
        let own = Request {
            virtual_port: false,
            to: model.members[0].backend.address,
            ..request(Policy::LeastConnections)
        };
        let passed = Decision {
            reason: Reason::FailOpenError,
            slot: None,
        };
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

    #[test]
    fn attempts_survive_a_word() {
        for attempt in [
            Attempt::Assigned,
            Attempt::Raced,
            Attempt::Cookies,
            Attempt::Gone,
            Attempt::Failed,
            Attempt::Foreign,
            Attempt::Judged(Judgement::OverQuota),
            Attempt::Judged(Judgement::QueueFull { since: 77 }),
            Attempt::Judged(Judgement::Take),
        ] {
            assert_eq!(Attempt::decode(attempt.encode()), attempt);
        }
    }
}
