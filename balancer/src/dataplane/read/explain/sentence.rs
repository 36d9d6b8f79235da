//! A decision in words.

use std::collections::BTreeSet;

use balancer_common::abi::{Backend, Policy, UNLIMITED};
use balancer_common::decision::admission::expected;
use balancer_common::decision::member::{Member, fits_family};
use balancer_common::decision::request::Request;
use balancer_common::decision::{Decision, DecisionState};
use balancer_common::{Reason, Verdict};

use super::answer::{Avoided, ListeningBackend, Unsuited};
use crate::dataplane::tables::span_of;

/// How many backends a sentence names at most.
const SHOWN: usize = 4;

/// What becomes of a SYN.
pub fn fate(verdict: Verdict, backend: Option<ListeningBackend>) -> String {
    match (verdict, backend) {
        (Verdict::Steer, Some(ListeningBackend { slot, address, .. })) => {
            format!("would go to {address} (slot {slot})")
        }
        (Verdict::Refuse, _) => "would be refused (RST)".to_owned(),
        _ => "would be left to the kernel".to_owned(),
    }
}

/// Why a decision came out as it did; `here` are the backends that listen in this netns.
pub fn why(decision: Decision, state: &DecisionState, here: &[&Member]) -> String {
    let request = &state.scan.request;
    let chosen = here
        .iter()
        .find(|member| Some(member.slot) == decision.slot);
    match (chosen, decision.reason) {
        (Some(member), Reason::Exempt) => {
            format!("its source is exempt, and {}", choice(member, state))
        }
        (Some(member), Reason::Admitted | Reason::Steered) => choice(member, state),
        (None, Reason::OverQuota | Reason::OverQuotaCookie) => {
            format!("nobody has room: {}", loads(here, request))
        }
        (None, Reason::NoBackend) => nobody_can(here, request),
        (_, reason) => reason.meaning().to_owned(),
    }
}

/// How full the backends are, the first few of them.
fn loads(here: &[&Member], request: &Request) -> String {
    let suited: Vec<_> = here
        .iter()
        .filter(|member| why_unsuited(member, request).is_none())
        .collect();
    let mut words: Vec<String> = suited
        .iter()
        .take(SHOWN)
        .map(|member| format!("slot {}: {}", member.slot, load(member, request)))
        .collect();
    if suited.len() > SHOWN {
        words.push(format!("and {} more", suited.len() - SHOWN));
    }
    words.join(", ")
}

/// Why none of those that listen here can have it.
fn nobody_can(here: &[&Member], request: &Request) -> String {
    let why: BTreeSet<_> = here
        .iter()
        .filter_map(|member| why_unsuited(member, request))
        .collect();
    if why.is_empty() {
        return Reason::NoBackend.meaning().to_owned();
    }
    let why: Vec<_> = why.into_iter().collect();
    format!("no backend there can have it: each {}", why.join(" or "))
}

/// Those of the backends in this netns that can't have a SYN.
pub fn unsuited(here: &[&Member], request: &Request) -> Vec<Unsuited> {
    let unsuited = |member: &&Member| {
        let backend = ListeningBackend::of(member);
        why_unsuited(member, request).map(|why| Unsuited { backend, why })
    };
    here.iter().filter_map(unsuited).collect()
}

/// Those of the backends in this netns that a SYN goes to only where no other can have it: those
/// that don't serve, unless they are more than half.
pub fn avoided(here: &[&Member], request: &Request) -> Vec<Avoided> {
    let suited = || {
        here.iter()
            .filter(|member| why_unsuited(member, request).is_none())
    };
    let is_avoided = |member: &&&Member| member.health.is_avoided(false, request.now) != 0;
    let avoided = suited().filter(is_avoided).filter_map(|member| {
        let since = member.health.since(request.now)?;
        Some(Avoided {
            backend: ListeningBackend::of(member),
            state: member.health.state(request.now),
            age: span_of(request.now.saturating_sub(since)),
        })
    });
    let avoided: Vec<Avoided> = avoided.collect();
    if 2 * avoided.len() > suited().count() {
        return Vec::new();
    }
    avoided
}

/// What is said of a choice that is a trial: its breaker was open, and this connection tells
/// whether it serves again.
pub const fn trial(chosen: &Member, now: u64) -> &'static str {
    if chosen.health.wants_trial(now) && chosen.health.is_avoided(false, now) == 0 {
        "; it has been failing, and this connection is the trial that tells whether it serves again"
    } else {
        ""
    }
}

/// What avoiding others has to do with a choice.
pub fn beside(avoided: &[Avoided], chosen: Option<u32>) -> String {
    match avoided.len() {
        0 => String::new(),
        _ if (avoided.iter()).any(|avoided| Some(avoided.backend.slot) == chosen) => {
            "; it does not serve, but no other can have it".to_owned()
        }
        1 => "; one that does not serve is avoided".to_owned(),
        many => format!("; {many} that do not serve are avoided"),
    }
}

/// Why a backend in the netns of the SYN can't have it, whatever its load: it is not ready, it does
/// not fit, or nothing can be steered to it.
fn why_unsuited(member: &Member, request: &Request) -> Option<&'static str> {
    let backend = &member.backend;
    if !member.is_ready() {
        Some("is not confirmed by the daemon yet")
    } else if !fits_family(backend.flags, request.v4) {
        Some(if request.v4 {
            "takes no IPv4"
        } else {
            "takes no IPv6"
        })
    } else if request.virtual_port {
        let unsteerable = backend.flags & Backend::UNSTEERABLE != 0;
        unsteerable.then_some("is a listener that nothing can be steered to (Multipath TCP)")
    } else if !backend.address.is_any() && backend.address != request.to {
        Some("listens on another address")
    } else if backend.device != request.device && backend.device != 0 {
        Some("is bound to a network interface")
    } else {
        None
    }
}

/// What made the choice fall on that backend.
fn choice(member: &Member, state: &DecisionState) -> String {
    let scan = &state.scan;
    if scan.cookies {
        return "while SYN cookies are in use, addresses and ports choose".to_owned();
    }
    match scan.request.policy {
        Policy::LeastConnections => format!(
            "of those that may take it, it has the fewest connections for its weight ({}, weight {})",
            load(member, &scan.request),
            member.weight()
        ),
        Policy::RoundRobin => "it is its turn (round-robin)".to_owned(),
        Policy::SourceHash => "the source's address belongs to it (source-hash)".to_owned(),
    }
}

/// What a backend holds of its quota: exempt connections don't count.
fn load(member: &Member, request: &Request) -> String {
    let counts = &member.counts;
    let held = counts.established().saturating_sub(counts.exempt());
    let pending = match expected(counts.expected, request.now) {
        0 => String::new(),
        pending => format!(" + {pending} pending"),
    };
    match member.quota(request.quota) {
        UNLIMITED => format!("{held}{pending}, no quota"),
        quota => format!("{held}{pending} of {quota}"),
    }
}

#[cfg(test)]
mod tests {
    use balancer_common::abi::{
        Address, BackendState, Counts, Health, HealthState, ServicePort, SlotPolicy, SlotState,
    };
    use balancer_common::decision::health::pack_open;
    use balancer_common::decision::request::Arrival;
    use balancer_common::decision::scan::Scan;

    use super::*;

    const HERE: Address = Address::from_v4_be(1);
    const V6: Address = Address([7; 4]);

    fn request(to: Address, flags: u8) -> Request {
        let port = ServicePort {
            service: 0,
            policy: 0,
            flags,
            quota: UNLIMITED,
        };
        let arrival = Arrival {
            netns: 1,
            device: 0,
            from: to,
            from_port: 1,
            to,
            to_port: 11_800,
        };
        Request::new(&port, &arrival, 0, 0, 0)
    }

    fn member(flags: u32, address: Address, device: u32) -> Member {
        let slot_state = SlotState::new(1, BackendState::Active).0;
        Member {
            slot: 0,
            backend: Backend {
                slot_state,
                netns: 1,
                address,
                flags,
                device,
                ..Backend::EMPTY
            },
            policy: SlotPolicy {
                quota: 0,
                weight: 0,
                adopted: 0,
                server: 0,
            },
            counts: Counts::ZERO,
            health: Health::UNKNOWN,
        }
    }

    /// What is said and what is decided must not part.
    #[test]
    fn unsuited_is_whoever_the_decision_can_not_choose() {
        let (v6, only) = (Backend::V6, Backend::V6 | Backend::V6_ONLY);
        let mut suited = 0;
        for port in [0, ServicePort::VIRTUAL] {
            for to in [HERE, V6] {
                let request = request(to, port);
                for flags in [0, v6, only, Backend::CANDIDATE, Backend::UNSTEERABLE] {
                    for address in [Address::ANY, HERE, V6, Address::from_v4_be(2)] {
                        for device in [0, 3] {
                            let member = member(flags, address, device);
                            let mut scan = Scan::new(request);
                            scan.consider(&member);
                            let why = why_unsuited(&member, &request);
                            let words = format!("{member:?} {request:?}: {why:?}");
                            assert_eq!(why.is_none(), scan.best().is_some(), "{words}");
                            suited += usize::from(why.is_none());
                        }
                    }
                }
            }
        }
        assert!(suited > 20, "{suited}");
    }

    #[test]
    fn a_choice_that_is_a_trial_is_named_so() {
        let failing = |until: u64| Member {
            health: Health {
                failing: pack_open(0, until),
                ..Health::UNKNOWN
            },
            ..member(0, Address::ANY, 0)
        };
        assert!(trial(&failing(1_000), 9_000).contains("trial"));
        assert_eq!(trial(&failing(8_900), 9_000), "", "it is avoided");
        assert_eq!(trial(&member(0, Address::ANY, 0), 9_000), "");
    }

    #[test]
    fn who_does_not_serve_is_avoided_unless_most_are_so() {
        let request = Request {
            now: 5_000,
            ..request(HERE, 0)
        };
        let hung = |slot, until| Member {
            slot,
            health: Health {
                hung: until,
                hung_since: 1_000,
                ..Health::UNKNOWN
            },
            ..member(0, Address::ANY, 0)
        };
        let (bad, good, over) = (hung(0, 9_000), hung(1, 0), hung(2, 5_000));
        let found = avoided(&[&bad, &good, &over], &request);
        let [only] = &found[..] else {
            panic!("one is avoided: {found:?}")
        };
        assert_eq!((only.backend.slot, only.state), (0, HealthState::Hung));
        assert_eq!(only.age.as_secs(), 4);
        assert_eq!(
            beside(&found, Some(1)),
            "; one that does not serve is avoided"
        );
        assert!(beside(&found, Some(0)).contains("no other can have it"));
        assert_eq!(avoided(&[&bad, &good], &request).len(), 1, "half of them");
        let unsuited = Member {
            slot: 3,
            ..member(Backend::CANDIDATE, Address::ANY, 0)
        };
        assert_eq!(avoided(&[&bad, &unsuited], &request), []);
        assert_eq!(beside(&[], Some(0)), "");
    }

    #[test]
    fn what_keeps_all_from_it_is_said_once() {
        let request = request(V6, ServicePort::VIRTUAL);
        let (v4, mptcp) = (
            member(0, HERE, 0),
            member(Backend::V6 | Backend::UNSTEERABLE, V6, 0),
        );
        assert_eq!(
            nobody_can(&[&v4, &v4], &request),
            "no backend there can have it: each takes no IPv6"
        );
        let both = nobody_can(&[&v4, &mptcp], &request);
        assert!(both.contains("(Multipath TCP) or takes no IPv6"), "{both}");
        assert_eq!(unsuited(&[&v4, &mptcp], &request).len(), 2);
    }
}
