//! Choice, first phase: which of a service's backends should be looked at, from packed numbers
//! alone. No socket is touched here; one [`Scan`] is fed every member, in ascending order of slots,
//! and remembers the best.

use crate::abi::{MAX_SLOTS, MEMBER_WORDS, Policy, SlotPolicy};
use crate::decision::admission::{LIFTED, cookies_in_use, cookies_near, expected, is_full, limit};
use crate::decision::cursor::{Cursor, Step};
use crate::decision::member::Member;
use crate::decision::request::Request;
use crate::hash::{self, rendezvous_score};
use crate::opaque;

/// Most backends that are tried for one SYN though their counters say that it is in vain.
pub const MAX_LOOKS: u32 = 6;
const SLOT_BITS: u32 = 10;
/// The low bits of a rendezvous score, given to the choice among listeners of one address.
const SIBLINGS: u64 = 0xfff;
const DOUBTFUL: u64 = 1 << 62;
/// Behind all others, doubtful ones, too.
const AVOIDED: u64 = 1 << 63;
const NONE: u64 = u64::MAX;

/// Which quotas count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Enforce {
    /// All.
    Quotas,
    /// Only those of backends that somebody closed by hand.
    Closed,
    /// None.
    Nothing,
}

/// What the members that can't be chosen were like, to name the reason of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Members that are ready and fit the destination best.
    pub members: u32,
    /// Members that are at their quota by established connections alone.
    pub over: u32,
    /// Members that somebody closed by hand.
    pub closed: u32,
    /// Members that are at their quota while SYN cookies are in use.
    pub over_with_cookies: u32,
    /// Members for which SYN cookies are, or are about to be, in use.
    pub cookies: u32,
    /// Members whose health says to avoid them.
    pub avoided: u32,
    /// Members whose quotas were computed.
    pub computed: u32,
    /// Established connections of all members that count against their quotas.
    pub established: u64,
    /// The sum of the members' quotas.
    pub quotas: u64,
}

impl Tally {
    const NONE: Self = Self {
        members: 0,
        over: 0,
        closed: 0,
        over_with_cookies: 0,
        cookies: 0,
        avoided: 0,
        computed: 0,
        established: 0,
        quotas: 0,
    };

    #[inline(always)]
    fn clear(&mut self) {
        let zero = opaque(0);
        *self = Self {
            members: zero,
            over: zero,
            closed: zero,
            over_with_cookies: zero,
            cookies: zero,
            avoided: zero,
            computed: zero,
            established: zero.into(),
            quotas: zero.into(),
        };
    }

    /// Whether more than half are avoided: then what is seen of them is more likely to be wrong, or
    /// the clients' doing, than each of them, and fewer would be swamped.
    #[inline(always)]
    pub const fn is_panic(&self) -> bool {
        self.avoided * 2 > self.members
    }

    /// Whether computed quotas are contradicted by what stands: quotas are never computed so low. A
    /// burst may exceed them by a few connections for each CPU, which is no contradiction.
    #[inline(always)]
    pub const fn quotas_are_nonsense(&self) -> bool {
        let slack = if self.quotas / 8 > 16 {
            self.quotas / 8
        } else {
            16
        };
        self.computed > 0 && self.computed == self.members && self.established > self.quotas + slack
    }
}

/// The word of a bitmap of slots that has a slot's bit. Opaque, because the compiler knows how many
/// slots there are and would leave out the mask, by which the verifier of Linux 6.1 knows it too.
#[inline(always)]
fn word_of(slot: u32) -> usize {
    opaque(slot / 64) as usize & (MEMBER_WORDS - 1)
}

/// The first phase for one request.
#[derive(Clone, Copy, Debug)]
pub struct Scan {
    /// What is asked.
    pub request: Request,
    /// Which quotas count.
    pub enforce: Enforce,
    /// SYN cookies are in use, or about to be: choose by four-tuple, so that the ACK finds the
    /// same listener.
    pub cookies: bool,
    /// Backends are avoided for their health.
    pub avoiding: bool,
    /// What was seen in this pass.
    pub tally: Tally,
    /// Sum of the weights of those that can be chosen, of the pass before.
    total: u64,
    /// Whose turn it is in round-robin, below `total`.
    turn: u64,
    /// What becomes `total`, growing in this pass.
    sum: u64,
    best: u64,
    /// The slot that comes first among those that are equally good, and from which on keys count
    /// slots.
    first: u32,
    /// `Counts::expected` of the best, as the choice saw it.
    best_expected: u64,
    /// The best was chosen without its `expected`: a look at it that fails does not put it behind
    /// others.
    best_has_no_hint: u64,
    /// Where the walk over the members stands.
    pub cursor: Cursor,
    fit: u32,
    uid: u32,
    /// Whether any slot was tried; without one, `tried` holds what an earlier request has left.
    has_tried: bool,
    /// Those that are not chosen again, a bit for each slot.
    tried: [u64; MEMBER_WORDS],
}

impl Scan {
    /// A scan that has seen nobody.
    pub const fn new(request: Request) -> Self {
        Self {
            request,
            enforce: Enforce::Quotas,
            cookies: false,
            avoiding: request.health,
            tally: Tally::NONE,
            total: 0,
            turn: 0,
            sum: request.weights,
            best: NONE,
            first: 0,
            best_expected: 0,
            best_has_no_hint: 0,
            cursor: Cursor::END,
            fit: 0,
            uid: 0,
            has_tried: false,
            tried: [0; MEMBER_WORDS],
        }
    }

    /// Makes a used scan new, in place.
    #[inline(always)]
    pub fn start(&mut self, request: Request, enforce: Enforce) {
        self.request = request;
        self.enforce = enforce;
        self.cookies = false;
        self.avoiding = request.health;
        self.sum = request.weights;
        self.forget_tried();
    }

    /// Starts another pass over the members.
    #[inline(always)]
    pub fn again(&mut self) {
        self.total = self.sum;
        self.turn = self.request.ticket.checked_rem(self.total).unwrap_or(0);
        // With cookies nothing but the four-tuple may decide.
        let takes_turns = matches!(self.request.policy, Policy::LeastConnections) && !self.cookies;
        self.first = if takes_turns {
            self.request.ticket as u32
        } else {
            0
        };
        self.start_over(0, 0);
    }

    /// Forgets which members were tried.
    #[inline(always)]
    pub fn forget_tried(&mut self) {
        self.has_tried = false;
    }

    /// Never choose that one again for this request.
    #[inline(always)]
    pub fn mark_tried(&mut self, slot: u32) {
        if !self.has_tried {
            self.has_tried = true;
            self.tried = [opaque(0); MEMBER_WORDS];
        }
        self.tried[word_of(slot)] |= 1 << (slot % 64);
    }

    #[inline(always)]
    fn start_over(&mut self, fit: u32, uid: u32) {
        self.tally.clear();
        self.sum = 0;
        self.best = NONE;
        self.fit = fit;
        self.uid = uid;
    }

    /// The member to look at next.
    #[inline(always)]
    pub const fn best(&self) -> Option<u32> {
        if self.best == NONE {
            None
        } else {
            Some((self.best as u32).wrapping_add(self.first) & (MAX_SLOTS as u32 - 1))
        }
    }

    /// Whether the counters of [`Scan::best`] say that a look at it will be in vain.
    #[inline(always)]
    pub const fn best_is_doubtful(&self) -> bool {
        self.best & DOUBTFUL != 0
    }

    /// Whether [`Scan::best`] is one that is avoided: there is no other.
    #[inline(always)]
    pub const fn best_is_avoided(&self) -> bool {
        self.best & AVOIDED != 0
    }

    /// Whether another than [`Scan::best`] may be found where a look says to avoid it.
    #[inline(always)]
    pub const fn may_avoid_best(&self) -> bool {
        self.avoiding && !self.best_is_avoided()
    }

    /// `Counts::expected` of [`Scan::best`] when it was chosen.
    #[inline(always)]
    pub const fn best_expected(&self) -> u64 {
        self.best_expected
    }

    /// Whether [`Scan::best`] was chosen without regard to what is expected there.
    #[inline(always)]
    pub const fn best_has_no_hint(&self) -> bool {
        self.best_has_no_hint != 0
    }

    /// The sum of the weights, where another pass is needed before [`Scan::best`] means something:
    /// round-robin took another one for it.
    #[inline(always)]
    pub const fn other_total(&self) -> Option<u64> {
        let matters = matches!(self.request.policy, Policy::RoundRobin) && !self.cookies;
        if matters && self.sum != self.total {
            Some(self.sum)
        } else {
            None
        }
    }

    /// Takes one member into account.
    #[inline(always)]
    pub fn consider(&mut self, member: &Member) {
        if !member.is_ready() {
            return;
        }
        let Some(fit) = member.fit(&self.request) else {
            return;
        };
        if self.tally.members == 0 {
            self.fit = fit;
            self.uid = member.backend.uid;
        } else if fit > self.fit {
            self.start_over(fit, member.backend.uid);
        } else if fit < self.fit || (!self.request.virtual_port && member.backend.uid != self.uid) {
            return;
        }
        let quota = member.quota(self.request.quota);
        let closed = member.is_closed(quota);
        let limit = self.limit(quota, closed);
        let cookies = opaque(cookies_near(member.counts.cookies, self.request.now));
        let avoided = opaque(member.health.is_avoided(self.cookies, self.request.now));
        let avoided = avoided & u64::from(self.avoiding);
        let used = member.used();
        self.tally.members += 1;
        self.tally.avoided += avoided as u32;
        self.tally_quota(member, used, quota);
        if used >= limit {
            self.tally_over(member, closed);
        } else if !self.request.virtual_port || member.is_steerable() {
            self.tally.cookies += cookies as u32;
            self.rank(member, used, limit, cookies, avoided);
        }
    }

    /// Takes all into account that the cursor leads to; `load` reads a word of the bitmap, `member`
    /// finds who is in a slot. The kernel does the same with `bpf_loop`.
    pub fn walk<'a>(
        &mut self,
        load: impl Fn(u32) -> u64,
        member: impl Fn(u32) -> Option<&'a Member>,
    ) {
        for _ in 0..Cursor::STEPS {
            match self.cursor.step(&load) {
                Step::End => return,
                Step::Nobody => {}
                Step::Member(slot) => {
                    if let Some(member) = member(slot) {
                        self.consider(member);
                    }
                }
            }
        }
    }

    /// Whether the quota of a backend counts for this request; `closed` as of
    /// [`Member::is_closed`].
    #[inline(always)]
    pub(super) const fn enforces(&self, closed: u64) -> bool {
        match self.enforce {
            Enforce::Quotas => true,
            Enforce::Closed => closed != 0,
            Enforce::Nothing => false,
        }
    }

    /// What must be more than is used, where that quota counts; `closed` as of
    /// [`Member::is_closed`]. Without a branch, like [`limit`].
    #[inline(always)]
    fn limit(&self, quota: u32, closed: u64) -> u64 {
        const {
            assert!(
                Enforce::Quotas as u8 == 0
                    && Enforce::Closed as u8 == 1
                    && Enforce::Nothing as u8 == 2
            );
        };
        let enforce = opaque(self.enforce as u64);
        limit(quota) + (enforce >> 1 | enforce & (closed ^ 1)) * LIFTED
    }

    #[inline(always)]
    fn tally_quota(&mut self, member: &Member, used: u64, quota: u32) {
        let computed = member.policy.is_for(member.backend.slot_state())
            && member.policy.flags() & SlotPolicy::COMPUTED != 0;
        self.tally.computed += u32::from(computed);
        self.tally.established += used;
        self.tally.quotas += u64::from(quota);
    }

    #[inline(always)]
    fn tally_over(&mut self, member: &Member, closed: u64) {
        let in_use = opaque(cookies_in_use(member.counts.cookies, self.request.now));
        if closed != 0 {
            self.tally.closed += 1;
        } else {
            self.tally.over += 1;
            self.tally.over_with_cookies += in_use as u32;
        }
    }

    /// Compares a member that can be chosen with the best so far.
    #[inline(always)]
    fn rank(&mut self, member: &Member, used: u64, limit: u64, cookies: u64, avoided: u64) {
        let weight = member.weight();
        let before = self.sum;
        // Those that are avoided have no turn.
        self.sum += u64::from(weight) & avoided.wrapping_sub(1);
        if self.has_tried && self.was_tried(member.slot) {
            return;
        }
        let expected = expected(member.counts.expected, self.request.now);
        // Before what else there is to decide: the verifier would follow every decision through it.
        let metric = self.metric(member, weight, expected, before);
        let place = member.slot.wrapping_sub(self.first) & (MAX_SLOTS as u32 - 1);
        let key = opaque(metric << SLOT_BITS | u64::from(place) | (avoided * AVOIDED));
        // What is expected may be the very client whose ACK this is: with it counted, the ACK of a
        // cookie would go elsewhere.
        let no_hint = cookies & u64::from(self.cookies);
        let hint = u64::from(expected) & no_hint.wrapping_sub(1);
        let doubtful = is_full(member.counts.full, self.request.now) || used + hint >= limit;
        let key = if doubtful { key | DOUBTFUL } else { key };
        if key < self.best {
            self.best = key;
            self.best_expected = member.counts.expected;
            self.best_has_no_hint = no_hint;
        }
    }

    #[inline(always)]
    fn was_tried(&self, slot: u32) -> bool {
        self.tried[word_of(slot)] >> (slot % 64) & 1 != 0
    }

    /// The smaller, the better; below 2⁵².
    #[inline(always)]
    fn metric(&self, member: &Member, weight: u32, expected: u32, before: u64) -> u64 {
        if self.cookies || matches!(self.request.policy, Policy::SourceHash) {
            let key = if self.cookies {
                self.request.tuple
            } else {
                self.request.source
            };
            return self.rendezvous(key, member, weight);
        }
        if matches!(self.request.policy, Policy::RoundRobin) {
            return self.turns_away(before, u64::from(weight));
        }
        let load = (u64::from(member.counts.established()) + u64::from(expected)) << 16;
        // A division takes as long as all the rest.
        if weight == 1 {
            load
        } else {
            load / u64::from(weight)
        }
    }

    /// By the backend's address, so that one that comes back under another slot gets its own
    /// clients again; the slot decides only among the listeners of one address (a
    /// `SO_REUSEPORT` group).
    #[inline(always)]
    fn rendezvous(&self, key: u64, member: &Member, weight: u32) -> u64 {
        let (high, low) = member.backend.address.halves();
        let address = hash::of_source(high ^ u64::from(member.backend.port), low);
        let score = rendezvous_score(key, address, weight) & !SIBLINGS;
        // Another address is better: nothing depends on the rest.
        if score << SLOT_BITS > self.best {
            return score;
        }
        let among_siblings = hash::mix(key ^ hash::mix(u64::from(member.slot) + 1)) & SIBLINGS;
        score | among_siblings
    }

    /// How many tickets after the one at hand it is this member's turn, its turns being
    /// `before..before + weight`.
    #[inline(always)]
    fn turns_away(&self, before: u64, weight: u64) -> u64 {
        let turn = self.turn;
        if turn < before {
            before - turn
        } else if turn < before + weight {
            0
        } else {
            self.total + before - turn
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{Address, UNLIMITED};
    use crate::decision::admission::admits;
    use crate::decision::request::tests::request;
    use proptest::prelude::*;

    fn any_enforce() -> impl Strategy<Value = Enforce> {
        prop_oneof![
            Just(Enforce::Quotas),
            Just(Enforce::Closed),
            Just(Enforce::Nothing)
        ]
    }

    proptest! {
        #[test]
        fn a_quota_that_does_not_count_is_lifted(
            enforce in any_enforce(), used in 0..1_u64 << 33, quota in prop_oneof![Just(0), Just(UNLIMITED), any::<u32>()],
            closed in 0..2_u64,
        ) {
            let closed = closed & u64::from(quota == 0);
            let mut scan = Scan::new(request(Address::ANY_V4, 0));
            scan.enforce = enforce;
            let refuses = scan.enforces(closed) && quota != UNLIMITED && used >= u64::from(quota);
            prop_assert_eq!(used >= scan.limit(quota, closed), refuses);
            if let Ok(used) = u32::try_from(used) {
                prop_assert_eq!(refuses, scan.enforces(closed) && !admits(used, 0, 0, quota));
            }
        }
    }
}
