//! The decision for one look-up, in two phases: scan the packed numbers, then look at a few sockets in order.

use crate::abi::Cookies;
use crate::admission::{Judgement, QUEUE_GRACE};
use crate::choice::{MAX_LOOKS, Request, Scan, Tally};
use crate::Reason;

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

/// How much an attempt is to insist on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The quota counts.
    pub enforce: bool,
    /// A full accept queue counts.
    pub mind_queue: bool,
    /// Give way to another CPU that has sent a SYN there since the choice: the word `Counts::expected` of the choice.
    pub unless_changed: Option<u64>,
    /// The choice is already stable for SYN cookies.
    pub cookies: bool,
}

/// The maps and the sockets, or a picture of them.
pub trait World {
    /// Feeds every member of the service to the scan, in ascending order of slots.
    fn scan(&mut self, scan: &mut Scan);
    /// Looks at the backend's socket, judges, and assigns the SYN to it where the judgement is to take it.
    fn attempt(&mut self, slot: u32, request: &Request, terms: Terms) -> Attempt;
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

impl Decision {
    const fn without_backend(reason: Reason) -> Self {
        Self { reason, slot: None }
    }
}

/// Attempts in all: looks, and choices made anew because of other CPUs or cookies.
const MAX_ROUNDS: usize = MAX_LOOKS + 4;
/// After so many rounds another CPU's SYN is no reason to choose anew.
const YIELDING_ROUNDS: usize = 4;

/// What the looks at sockets found.
#[derive(Clone, Copy)]
struct Looks {
    used: usize,
    over: bool,
    over_with_cookies: bool,
    full: bool,
    failed: bool,
    /// A backend with room whose queue has been full only for a moment, or none.
    momentary: Option<u32>,
}

const NO_LOOKS: Looks =
    Looks { used: 0, over: false, over_with_cookies: false, full: false, failed: false, momentary: None };

/// Decides one look-up for a service, with a new [`Scan`] that holds the request.
#[inline(always)]
pub fn decide<W: World>(world: &mut W, scan: &mut Scan, circumstances: Circumstances) -> Decision {
    if circumstances.exempt && !scan.request.virtual_port {
        return Decision::without_backend(Reason::Exempt);
    }
    scan.enforce = !circumstances.exempt;
    first_pass(world, scan);
    if scan.tally.members == 0 {
        return Decision::without_backend(if circumstances.exempt { Reason::Exempt } else { Reason::NoBackend });
    }
    let mut looks = NO_LOOKS;
    let mut yielding = true;
    let mut last_resort = false;
    let mut round = 0;
    while round < MAX_ROUNDS {
        let terms = Terms {
            enforce: scan.enforce,
            mind_queue: !last_resort,
            unless_changed: (yielding && round < YIELDING_ROUNDS).then_some(scan.best_expected()),
            cookies: scan.cookies,
        };
        round += 1;
        let best = if last_resort { looks.momentary } else { scan.best() };
        let Some(slot) = best else {
            // Nobody has room. Before a refusal: a stale daemon must not refuse, and a queue full for a moment is no end.
            if scan.enforce && circumstances.stale {
                scan.enforce = false;
                scan.forget_tried();
                looks = NO_LOOKS;
                first_pass(world, scan);
            } else if !last_resort && looks.momentary.is_some() {
                last_resort = true;
            } else {
                break;
            }
            continue;
        };
        match world.attempt(slot, &scan.request, terms) {
            Attempt::Assigned => {
                let reason = reason_of_success(&scan.request, circumstances, scan.enforce, last_resort);
                return Decision { reason, slot: Some(slot) };
            }
            Attempt::Foreign => return Decision::without_backend(Reason::ForeignSkLookup),
            Attempt::Raced => {}
            Attempt::Cookies => scan.cookies = true,
            attempt => {
                looks.note(attempt, slot, scan);
                scan.mark_tried(looks.used, slot);
                looks.used += 1;
                yielding = false;
                if last_resort || looks.used >= MAX_LOOKS {
                    if last_resort || looks.momentary.is_none() {
                        break;
                    }
                    last_resort = true;
                }
            }
        }
        next_pass(world, scan);
    }
    Decision::without_backend(reason_of_failure(&scan.tally, &looks, circumstances))
}

#[inline(always)]
fn first_pass<W: World>(world: &mut W, scan: &mut Scan) {
    next_pass(world, scan);
    if scan.tally.cookies > 0 {
        scan.cookies = true;
    } else if !scan.needs_total() {
        return;
    }
    next_pass(world, scan);
}

#[inline(always)]
fn next_pass<W: World>(world: &mut W, scan: &mut Scan) {
    scan.again();
    world.scan(scan);
}

impl Looks {
    #[inline(always)]
    fn note(&mut self, attempt: Attempt, slot: u32, scan: &Scan) {
        match attempt {
            Attempt::Judged(Judgement::OverQuota) => {
                self.over = true;
                self.over_with_cookies |= scan.cookies;
            }
            Attempt::Judged(Judgement::QueueFull { since }) => {
                self.full = true;
                if self.momentary.is_none() && scan.request.now.wrapping_sub(since) <= QUEUE_GRACE {
                    self.momentary = Some(slot);
                }
            }
            Attempt::Failed => self.failed = true,
            _ => {}
        }
    }
}

#[inline(always)]
fn reason_of_success(request: &Request, circumstances: Circumstances, enforced: bool, last_resort: bool) -> Reason {
    if circumstances.exempt {
        Reason::Exempt
    } else if !enforced {
        Reason::FailOpenStale
    } else if last_resort {
        Reason::AcceptQueueGrace
    } else if request.virtual_port {
        Reason::Steered
    } else {
        Reason::Admitted
    }
}

/// Names the refusal, or the error that keeps it from being one.
#[inline(always)]
fn reason_of_failure(tally: &Tally, looks: &Looks, circumstances: Circumstances) -> Reason {
    if circumstances.exempt {
        Reason::Exempt
    } else if circumstances.stale {
        Reason::FailOpenError
    } else if looks.full {
        Reason::AcceptQueueFull
    } else if looks.over || tally.over > 0 {
        if tally.over_with_cookies > 0 || looks.over_with_cookies {
            Reason::OverQuotaCookie
        } else {
            Reason::OverQuota
        }
    } else if tally.closed > 0 {
        Reason::ClosedByHand
    } else if looks.failed {
        Reason::FailOpenError
    } else {
        Reason::NoBackend
    }
}

/// Whether a look must make the choice anew because cookies turn out to be in use.
#[inline(always)]
pub const fn must_choose_by_tuple(cookies: Cookies, terms: Terms) -> bool {
    matches!(cookies, Cookies::InUse) && !terms.cookies
}
