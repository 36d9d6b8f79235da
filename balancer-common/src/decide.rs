//! The decision for one look-up, in two phases: scan the packed numbers, then look at a few sockets in order.

use crate::Reason;
use crate::abi::Cookies;
use crate::admission::{Judgement, QUEUE_GRACE};
use crate::choice::{MAX_LOOKS, Request, Scan};

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
    /// Another sk_lookup program has chosen a socket.
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
pub trait World {
    /// Feeds every member of the service to the scan, in ascending order of slots.
    fn scan(&mut self, scan: &mut Scan);
    /// Looks at the backend's socket, judges, and assigns the SYN to it where the judgement is to take it.
    fn attempt(&mut self, slot: u32, deliberation: &Deliberation) -> Attempt;
}

/// What is known before anything is scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Circumstances {
    /// The source is never refused.
    pub exempt: bool,
    /// The daemon has been silent for too long to refuse anybody.
    pub stale: bool,
}

/// How a look-up ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Why.
    pub reason: Reason,
    /// The backend that has it, where one was chosen.
    pub slot: Option<u32>,
}

/// Rounds in all: looks, one more pass for round-robin and one for cookies, before and after a stale daemon is found to
/// matter, and choices made anew because of other CPUs.
pub const MAX_ROUNDS: u32 = MAX_LOOKS as u32 + 10;
/// After so many rounds another CPU's SYN is no reason to choose anew.
const YIELDING_ROUNDS: u32 = 6;

/// The state of one decision. The kernel keeps it in a map: on the stack the verifier would follow every value in it.
#[derive(Clone, Copy, Debug)]
pub struct Deliberation {
    /// The choice.
    pub scan: Scan,
    circumstances: Circumstances,
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
    /// A backend with room whose queue has been full only for a moment, or [`NOBODY`].
    momentary: u32,
}

const NOBODY: u32 = u32::MAX;

impl Deliberation {
    /// Nothing is decided.
    pub fn new(request: Request, circumstances: Circumstances) -> Self {
        let mut state = Self {
            scan: Scan::new(request),
            circumstances,
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
            momentary: NOBODY,
        };
        state.start(request, circumstances);
        state
    }

    /// Makes a used one new, in place: a copy of the whole would be a loop over its bytes in the kernel.
    #[inline(always)]
    pub fn start(&mut self, request: Request, circumstances: Circumstances) {
        self.scan.start(request, !circumstances.exempt);
        self.circumstances = circumstances;
        self.yielding = true;
        self.last_resort = false;
        self.cookies_known = false;
        self.total_known = false;
        self.looks = 0;
        self.rounds = 0;
        self.over = false;
        self.over_with_cookies = false;
        self.full = false;
        self.failed = false;
        self.momentary = NOBODY;
    }

    /// The decision that needs no look: an exempt source on an own port.
    #[inline(always)]
    pub fn without_looking(&self) -> Option<Decision> {
        if self.circumstances.exempt && !self.scan.request.virtual_port {
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

    /// Whether another pass is needed before the best of the scan means something.
    #[inline(always)]
    fn needs_another_pass(&mut self) -> bool {
        if !self.cookies_known {
            self.cookies_known = true;
            if self.scan.tally.cookies > 0 {
                self.scan.cookies = true;
                return true;
            }
        }
        if self.scan.needs_total() && !self.total_known {
            self.total_known = true;
            return true;
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

    /// Nobody has room. Before a refusal: a stale daemon must not refuse, and a queue full for a moment is no end.
    /// False: there is nothing left to try.
    #[inline(always)]
    fn relent(&mut self) -> bool {
        if self.scan.enforce && self.circumstances.stale {
            self.scan.enforce = false;
            self.scan.forget_tried();
            self.cookies_known = false;
            self.total_known = false;
            self.looks = 0;
            self.momentary = NOBODY;
            return true;
        }
        if !self.last_resort && self.momentary != NOBODY {
            self.last_resort = true;
            return true;
        }
        false
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
        self.scan.mark_tried(self.looks as usize, slot);
        self.looks += 1;
    }

    #[inline(always)]
    fn reason_of_success(&self) -> Reason {
        if self.circumstances.exempt {
            Reason::Exempt
        } else if !self.scan.enforce {
            Reason::FailOpenStale
        } else if self.last_resort {
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
        if self.circumstances.exempt {
            Reason::Exempt
        } else if tally.members == 0 {
            Reason::NoBackend
        } else if self.circumstances.stale {
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
        } else if self.failed {
            Reason::FailOpenError
        } else {
            Reason::NoBackend
        }
    }
}

/// One round of a decision; `None`: there must be another, at most [`MAX_ROUNDS`] in all.
#[inline(always)]
pub fn advance<W: World>(world: &mut W, state: &mut Deliberation) -> Option<Decision> {
    state.rounds += 1;
    state.scan.again();
    world.scan(&mut state.scan);
    if state.needs_another_pass() {
        return None;
    }
    let Some(slot) = state.next() else {
        return if state.relent() {
            None
        } else {
            Some(state.failure())
        };
    };
    state.yielding &= state.rounds < YIELDING_ROUNDS && !state.last_resort;
    match world.attempt(slot, state) {
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
pub fn decide<W: World>(world: &mut W, state: &mut Deliberation) -> Decision {
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

/// Whether a look must make the choice anew because cookies turn out to be in use.
#[inline(always)]
pub const fn must_choose_by_tuple(cookies: Cookies, state: &Deliberation) -> bool {
    matches!(cookies, Cookies::InUse) && !state.scan.cookies
}
