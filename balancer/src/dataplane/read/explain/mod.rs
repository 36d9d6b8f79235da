//! `explain`: the kernel program's own functions, run on a snapshot of the maps.

mod answer;
mod destination;
mod model;
mod netns;
mod sentence;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result};
use balancer_common::abi::{Address, BackendState, ServicePort, ticks};
use balancer_common::decision::member::Member;
use balancer_common::decision::request::{Arrival, Request};
use balancer_common::decision::{DecisionState, LookupFlags, decide};
use balancer_common::{Reason, Verdict};

use self::destination::{Destination, Services};
use self::model::Model;
use self::netns::{Choice, Chosen};
use super::super::paths::Paths;
use super::super::tables::Tables;
use crate::sys::clock;

pub use self::answer::{
    Answer, Avoided, Explanation, ListeningBackend, SeveralNetns, Syn, Unsuited,
};
pub use self::netns::{NetnsChoice, open as open_netns};

/// Says where a SYN would go; `directory` has the pins.
pub fn explain(tables: &Tables, directory: &Path, syn: &Syn, netns: NetnsChoice) -> Result<Answer> {
    let services = Services::read(tables)?;
    let destination = Destination::of(tables, &services, syn)?;
    let slots: Vec<Member> = tables.slots()?.iter().map(|view| view.member).collect();
    let is_active = |member: &&Member| member.backend.slot_state().is(BackendState::Active);
    let listeners: Vec<&Member> = slots.iter().filter(is_active).collect();
    let mut concerned = listeners.clone();
    concerned.retain(|member| destination.concerns(&member.backend, syn));
    let chosen = match netns::choose(netns, &concerned, &listeners)? {
        Choice::One(chosen) => chosen,
        Choice::Several => return Ok(Answer::Several(several(&services, &concerned))),
    };
    let (here, elsewhere): (Vec<&Member>, Vec<&Member>) =
        (concerned.into_iter()).partition(|member| member.backend.netns == chosen.netns.cookie);
    let explanation = match destination {
        Destination::NoService => destination::not_judged(tables, &services, syn, &chosen, &here)?,
        Destination::Service(port) => {
            let service = Service {
                name: services.name(port.service),
                port,
                here,
                elsewhere,
            };
            if is_guarded(directory, &chosen)? {
                let model = Model::take(tables, port.service, &slots, &chosen.netns)?;
                service.judged(tables, model, syn, &chosen)?
            } else {
                service.unguarded(syn, &chosen)
            }
        }
    };
    Ok(Answer::One(explanation))
}

/// The netns of these listeners.
fn several(services: &Services, listeners: &[&Member]) -> SeveralNetns {
    let mut netns: BTreeMap<u64, Vec<ListeningBackend>> = BTreeMap::new();
    let mut names = BTreeSet::new();
    for member in listeners {
        let there = netns.entry(member.backend.netns).or_default();
        there.push(ListeningBackend::of(member));
        names.insert(services.name(member.backend.service));
    }
    SeveralNetns {
        service: Vec::from_iter(names).join(", "),
        netns: netns.into_iter().collect(),
    }
}

/// Whether `steer` is attached to a netns.
fn is_guarded(directory: &Path, chosen: &Chosen) -> Result<bool> {
    let links =
        Paths::links(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let cookie = Some(chosen.netns.cookie);
    Ok(links.iter().any(|link| link.netns() == cookie))
}

/// The service that a SYN is for.
struct Service<'a> {
    name: String,
    port: ServicePort,
    /// Its backends that listen in the netns of the SYN.
    here: Vec<&'a Member>,
    /// Those that listen in others.
    elsewhere: Vec<&'a Member>,
}

impl Service<'_> {
    /// What the kernel half would do.
    fn judged(
        &self,
        tables: &Tables,
        mut model: Model,
        syn: &Syn,
        chosen: &Chosen,
    ) -> Result<Explanation> {
        let (port, now_ns) = (&self.port, clock::monotonic_ns());
        if port.counts_only() {
            return Ok(self.counted(syn, chosen));
        }
        let flags = LookupFlags {
            exempt: tables.is_exempt(port.service, syn.from.ip())?,
            stale: tables.heartbeat().is_stale(now_ns),
        };
        let arrival = Arrival {
            netns: chosen.netns.cookie,
            device: 0,
            from: Address::of_packet(syn.from.ip()),
            from_port: syn.from.port(),
            to: Address::of_packet(syn.destination()),
            to_port: syn.to_port,
        };
        let request = Request::new(port, &arrival, tables.turn(port.service), 0, ticks(now_ns));
        let mut state = DecisionState::new(request, flags);
        let decision = decide(&mut model, &mut state);
        let member = (self.here.iter()).find(|member| Some(member.slot) == decision.slot);
        let backend = member.map(|member| ListeningBackend::of(member));
        let why = match decision.reason {
            Reason::NoBackend if self.here.is_empty() => self.no_backend(),
            _ => sentence::why(decision, &state, &self.here),
        };
        let regards_health = port.flags & ServicePort::HEALTH_OFF == 0;
        let avoided = if regards_health {
            sentence::avoided(&self.here, &request)
        } else {
            Vec::new()
        };
        let trial = match member {
            Some(member) if regards_health => sentence::trial(member, request.now),
            _ => "",
        };
        let why = why + trial + &sentence::beside(&avoided, decision.slot);
        let fate = sentence::fate(decision.verdict, backend);
        let (verdict, backend, fate) = if port.is_dry_run() {
            let fate =
                format!("would be left to the kernel (mode: dry-run); with mode: on it {fate}");
            (Verdict::Pass, None, fate)
        } else {
            (decision.verdict, backend, fate)
        };
        Ok(Explanation {
            netns: chosen.netns.cookie,
            service: Some(self.name.clone()),
            reason: Some(decision.reason),
            verdict,
            backend,
            unsuited: sentence::unsuited(&self.here, &request),
            avoided,
            sentence: self.sentence(syn, chosen, &fate, &why),
        })
    }

    /// What becomes of a SYN where connections are only counted.
    fn counted(&self, syn: &Syn, chosen: &Chosen) -> Explanation {
        let reason = Reason::CountOnly;
        let fate = sentence::fate(Verdict::Pass, None);
        let sentence = self.sentence(syn, chosen, &fate, reason.meaning());
        let (netns, service) = (chosen.netns.cookie, Some(self.name.clone()));
        Explanation {
            reason: Some(reason),
            ..Explanation::not_judged(netns, service, sentence)
        }
    }

    /// What becomes of a SYN where `steer` is not attached.
    fn unguarded(&self, syn: &Syn, chosen: &Chosen) -> Explanation {
        let why = if !self.here.is_empty() {
            "this network namespace is not guarded, so connections are counted, and nobody is \
             steered or refused"
                .to_owned()
        } else if self.elsewhere.is_empty() {
            self.no_backend()
        } else {
            format!(
                "this network namespace is not guarded, and {}",
                self.no_backend()
            )
        };
        let fate = sentence::fate(Verdict::Pass, None);
        let sentence = self.sentence(syn, chosen, &fate, &why);
        Explanation::not_judged(chosen.netns.cookie, Some(self.name.clone()), sentence)
    }

    fn sentence(&self, syn: &Syn, chosen: &Chosen, fate: &str, why: &str) -> String {
        let (prefix, name) = (chosen.prefix(&self.name), &self.name);
        format!(
            "{prefix}a SYN from {} to {name} {fate}: {why}",
            syn.from.ip()
        )
    }

    /// Says where its backends listen, of a netns where none does.
    fn no_backend(&self) -> String {
        let name = &self.name;
        let cookies: BTreeSet<u64> = (self.elsewhere.iter())
            .map(|member| member.backend.netns)
            .collect();
        if cookies.is_empty() {
            return format!("no backend of {name} listens in any network namespace");
        }
        let cookies: Vec<_> = cookies.iter().map(u64::to_string).collect();
        let (plural, cookies) = (
            if cookies.len() == 1 { "" } else { "s" },
            cookies.join(", "),
        );
        format!(
            "no backend of {name} listens there, but in the network namespace{plural} {cookies}"
        )
    }
}
