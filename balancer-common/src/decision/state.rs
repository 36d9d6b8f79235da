//! The state of one decision, and its rounds.

use crate::decision::admission::{Judgement, Observation, QUEUE_GRACE};
use crate::decision::attempt::{self, Attempt, Effort, Outcome};
use crate::decision::member::Member;
use crate::decision::outcome::Decision;
use crate::decision::request::Request;
use crate::decision::scan::{Enforce, MAX_LOOKS, Scan};
use crate::{Reason, opaque};

/// The maps and the sockets, or a snapshot of them.
pub trait BackendAccess {
    /// Puts the scan's cursor before every member of the service, in ascending order of slots.
    fn begin(&mut self, scan: &mut Scan);
    /// Feeds to the scan what its cursor leads to.
    fn walk(&mut self, scan: &mut Scan);
    /// Looks at the backend's socket, judges with [`DecisionState::judge`], makes the writes of
    /// that, and assigns the SYN to it where that is the outcome.
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

/// Rounds in all: looks, passes for the sum of the weights and for cookies, choices made anew
/// because of other CPUs.
pub const MAX_ROUNDS: u32 = 72;
/// After so many rounds nobody is judged any more whose counters say that it has room. To refuse
/// would be wrong: not all were looked at. Each look has put the counters of its backend right, so
/// that the next SYN gets further.
const JUDGING_ROUNDS: u32 = 48;
/// After so many rounds another CPU's SYN is no reason to choose anew.
const YIELDING_ROUNDS: u32 = 6;

/// The state of one decision. The kernel keeps it in a map: on the stack the verifier would follow
/// every value in it.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, each noted where it is found out"
)]
pub struct DecisionState {
    /// The choice.
    pub scan: Scan,
    flags: LookupFlags,
    /// How the backend at hand is tried.
    effort: Effort,
    /// What the first passes are for is known: whether cookies are in use, and the sum of the
    /// weights.
    cookies_known: bool,
    total_known: bool,
    looks: u32,
    rounds: u32,
    over: bool,
    over_with_cookies: bool,
    full: bool,
    failed: bool,
    /// Nothing is left but [`Self::full_one`].
    last_resort: bool,
    cause: FailOpenCause,
    /// A backend with a full accept queue that takes it where there is no other, or [`NOBODY`]:
    /// full only for a moment, or nobody may be refused. The kernel drops the SYN, and the client
    /// tries again.
    full_one: u32,
}

const NOBODY: u32 = u32::MAX;

impl DecisionState {
    /// Nothing is decided.
    pub fn new(request: Request, flags: LookupFlags) -> Self {
        let mut state = Self {
            scan: Scan::new(request),
            flags,
            effort: Effort {
                yielding: true,
                judging: true,
            },
            cookies_known: false,
            total_known: false,
            looks: 0,
            rounds: 0,
            over: false,
            over_with_cookies: false,
            full: false,
            failed: false,
            last_resort: false,
            cause: FailOpenCause::None,
            full_one: NOBODY,
        };
        state.start(request, flags);
        state
    }

    /// Makes a used one new, in place: a copy of the whole would be a loop over its bytes in the
    /// kernel.
    #[inline(always)]
    pub fn start(&mut self, request: Request, flags: LookupFlags) {
        let enforce = if flags.exempt {
            Enforce::Nothing
        } else {
            Enforce::Quotas
        };
        self.scan.start(request, enforce);
        self.flags = flags;
        self.effort.yielding = true;
        self.effort.judging = true;
        let no = opaque(false);
        self.cookies_known = no;
        self.total_known = no;
        self.looks = 0;
        self.rounds = 0;
        self.over = no;
        self.over_with_cookies = no;
        self.full = no;
        self.failed = no;
        self.last_resort = no;
        self.cause = FailOpenCause::None;
        self.full_one = NOBODY;
    }

    /// The decision that needs no look: an exempt source on an own port.
    #[inline(always)]
    pub fn without_looking(&self) -> Option<Decision> {
        if self.flags.exempt && !self.scan.request.virtual_port {
            return Some(Decision::pass(Reason::Exempt));
        }
        None
    }

    /// Judges one look at the member at hand; `seen` is `None` where it can't be looked at.
    #[inline(always)]
    pub fn judge(&self, seen: Option<&Observation>, member: &Member) -> Outcome {
        attempt::attempt(seen, member, &self.scan, self.effort)
    }

    /// The decision after [`MAX_ROUNDS`]: all that were tried without being judged were gone.
    #[inline(always)]
    pub const fn out_of_rounds(&self) -> Decision {
        Decision::unjudged(self.scan.request.virtual_port, None)
    }

    /// The decision when nothing is left to try.
    #[inline(always)]
    fn failure(&self) -> Decision {
        let reason = self.reason_of_failure();
        match reason {
            Reason::NoBackend | Reason::FailOpenError => Decision::pass(reason),
            _ => Decision::refuse(reason),
        }
    }

    /// Scans all members. Whether there must be another pass before the best of the scan means
    /// something.
    #[inline(always)]
    fn scan<A: BackendAccess>(&mut self, access: &mut A) -> bool {
        self.scan.again();
        access.begin(&mut self.scan);
        access.walk(&mut self.scan);
        self.needs_another_pass(access)
    }

    /// Whether another pass is needed before the best of the scan means something.
    #[inline(always)]
    fn needs_another_pass<A: BackendAccess>(&mut self, access: &mut A) -> bool {
        if !self.cookies_known {
            self.cookies_known = true;
            if self.scan.tally.cookies > 0 {
                self.scan.cookies = true;
                return true;
            }
        }
        if self.scan.avoiding && self.scan.tally.is_panic() {
            self.scan.avoiding = false;
            return true;
        }
        if let Some(total) = self.scan.other_total() {
            access.remember_weights(self.scan.request.service, total);
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
            if self.looks < MAX_LOOKS {
                self.scan.best()
            } else {
                None
            }
        } else if self.full_one == NOBODY {
            None
        } else {
            Some(self.full_one)
        }
    }

    /// Nobody has room. Before a refusal: quotas that must not be trusted must not refuse, and a
    /// queue full for a moment is no end. False: there is nothing left to try.
    #[inline(always)]
    fn fail_open<A: BackendAccess>(&mut self, access: &A) -> bool {
        if matches!(self.scan.enforce, Enforce::Quotas) {
            self.cause = self.fail_open_cause(access);
            if !matches!(self.cause, FailOpenCause::None) {
                self.choose_without_quotas();
                return true;
            }
        }
        if !self.last_resort && self.full_one != NOBODY {
            self.last_resort = true;
            return true;
        }
        false
    }

    /// Whether anybody may be refused because the backends do not accept.
    #[inline(always)]
    const fn may_refuse(&self) -> bool {
        !self.flags.exempt && !self.flags.stale && !self.failed
    }

    /// Whether the best of the scan looks like one with room after as many looks as one SYN may
    /// cost.
    #[inline(always)]
    const fn looks_never_end(&self) -> bool {
        self.rounds > JUDGING_ROUNDS && !self.last_resort && !self.scan.best_is_doubtful()
    }

    #[inline(always)]
    fn fail_open_cause<A: BackendAccess>(&self, access: &A) -> FailOpenCause {
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
        } else if access.has_unregistered(self.scan.request.service) {
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
        self.full_one = NOBODY;
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
                let for_a_moment = since + QUEUE_GRACE >= self.scan.request.now;
                if self.full_one == NOBODY && (for_a_moment || !self.may_refuse()) {
                    self.full_one = slot;
                }
            }
            Attempt::Failed => self.failed = true,
            _ => {}
        }
        // A look that fails changes the counters, which put the backend behind those that may have
        // room. Only one that was there already, or has no counters to change, must be
        // remembered.
        let is_one_of_few = self.scan.best_is_doubtful() || self.scan.best_has_no_hint();
        self.looks += is_one_of_few as u32;
        if is_one_of_few || matches!(attempt, Attempt::Gone | Attempt::Failed) {
            self.scan.mark_tried(slot);
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
        } else if !self.effort.judging {
            Reason::FailOpenError
        } else if self.scan.best_is_avoided() {
            Reason::AvoidedBackend
        } else if self.scan.request.virtual_port {
            Reason::Steered
        } else {
            Reason::Admitted
        }
    }

    /// Names the refusal, or what keeps it from being one.
    #[inline(always)]
    fn reason_of_failure(&self) -> Reason {
        let tally = &self.scan.tally;
        if tally.members == 0 {
            Reason::NoBackend
        } else if self.failed && !self.scan.request.virtual_port {
            // An error must not refuse anybody.
            Reason::FailOpenError
        } else if !self.may_refuse() {
            Reason::NoBackend
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
pub fn advance<A: BackendAccess>(access: &mut A, state: &mut DecisionState) -> Option<Decision> {
    state.rounds += 1;
    if state.scan(access) {
        return None;
    }
    let Some(slot) = state.next() else {
        return if state.fail_open(access) {
            None
        } else {
            Some(state.failure())
        };
    };
    let unjudged = state.looks_never_end();
    if unjudged && !state.scan.request.virtual_port {
        // The kernel decides alone instead.
        return Some(Decision::pass(Reason::FailOpenError));
    }
    state.effort.judging = !unjudged && !state.last_resort;
    state.effort.yielding &= state.rounds < YIELDING_ROUNDS && state.effort.judging;
    let attempt = access.attempt(slot, state);
    match attempt {
        Attempt::Assigned => return Some(Decision::steer(slot, state.reason_of_success())),
        Attempt::Foreign => return Some(Decision::pass(Reason::ForeignSkLookup)),
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
