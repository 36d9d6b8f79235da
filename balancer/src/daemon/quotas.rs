//! Quotas of backends: what they are computed from, and putting in force what came out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use balancer_common::abi::{BackendState, ticks};
use tracing::info;

use crate::dataplane::{SlotQuota, SlotView, Writer, services, slots};
use crate::quota::in_force::{in_force, written, written_for_server};
use crate::quota::{InForce, Outcome, Quota, QuotaSource, ReadyBackend, server};
use crate::sys::clock;

/// The clocks of quotas that go down slowly, one for each set of quotas computed together.
#[derive(Debug)]
pub struct LoweringClocks<K>(BTreeMap<K, LoweringClock>);

/// The quotas computed last, and since when they have waited to go down.
#[derive(Debug)]
struct LoweringClock {
    quotas: Vec<Quota>,
    since: Instant,
}

impl<K> Default for LoweringClocks<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Clone> LoweringClocks<K> {
    /// Computes the quotas of `key`, told how long they have waited to go down. That time begins
    /// anew where a quota has changed, and where none is to go down.
    pub fn compute(&mut self, key: &K, compute: impl FnOnce(Duration) -> Outcome) -> Outcome {
        let clock = self.0.get(key);
        let outcome = compute(clock.map_or(Duration::ZERO, |clock| clock.since.elapsed()));
        if clock.is_none_or(|clock| !outcome.lowering || clock.quotas != outcome.quotas) {
            let quotas = outcome.quotas.clone();
            let since = Instant::now();
            self.0.insert(key.clone(), LoweringClock { quotas, since });
        }
        outcome
    }

    /// Forgets the keys that are not to be kept.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.0.retain(|key, _| keep(key));
    }
}

/// A process, or in a cluster a pod, with the sockets that it listens with. They share its quota.
pub struct Server<'a> {
    /// The listeners, in the order of their slots; at least one.
    pub listeners: Vec<&'a SlotView>,
    /// The server's part relative to the others of its service.
    pub weight: u32,
}

impl<'a> Server<'a> {
    /// Puts listeners with the same key together; servers are in the order of their first slots.
    pub fn group<K: PartialEq>(
        listeners: impl IntoIterator<Item = (&'a SlotView, u32)>,
        key: impl Fn(&SlotView) -> K,
    ) -> Vec<Self> {
        let mut servers: Vec<(K, Self)> = Vec::new();
        for (listener, weight) in listeners {
            let key = key(listener);
            match servers.iter_mut().find(|(known, _)| *known == key) {
                Some((_, server)) => server.listeners.push(listener),
                None => servers.push((
                    key,
                    Self {
                        listeners: vec![listener],
                        weight,
                    },
                )),
            }
        }
        servers.into_iter().map(|(_, server)| server).collect()
    }

    /// How many sockets it listens with.
    pub fn count(&self) -> u32 {
        u32::try_from(self.listeners.len()).unwrap_or(u32::MAX)
    }

    fn first_slot(&self) -> u32 {
        self.listeners[0].slot()
    }

    /// The quota that the daemon has written for it; set by hand, where one of its listeners has
    /// it so.
    fn written(&self) -> Option<InForce> {
        let written = || {
            let listeners = self.listeners.iter();
            listeners.filter_map(|slot| written_for_server(&slot.member.policy, slot.slot_state()))
        };
        let by_hand = written().find(|written| written.source.is_own());
        by_hand.or_else(|| written().next())
    }

    /// The server as the computation of quotas takes it. A quota set by hand is no previous one: it
    /// would go down slowly.
    pub fn ready_backend(&self) -> ReadyBackend {
        let before = self.written();
        let computed = before.filter(|before| !before.source.is_by_hand());
        let established = self.listeners.iter().map(|slot| slot.counted());
        let full = |slot: &&SlotView| slot.room() == Some(0);
        let now = ticks(clock::monotonic_ns());
        // Where one of its sockets serves, the server lives.
        let unhealthy = self.listeners.iter().map(|slot| slot.unhealthy(now));
        let unhealthy: Option<Vec<Duration>> = unhealthy.map(|seen| Some(seen?.1)).collect();
        ReadyBackend {
            weight: self.weight,
            established: established.fold(0, u32::saturating_add),
            previous: computed.map(|before| before.quota),
            full: self.listeners.iter().all(full),
            unhealthy_for: unhealthy.and_then(|ages| ages.into_iter().min()),
            wants_trial: self
                .listeners
                .iter()
                .any(|slot| slot.member.health.wants_trial(now)),
        }
    }

    /// Whether it is taken out by hand.
    pub fn is_drained(&self) -> bool {
        self.written()
            .is_some_and(|written| written.source == QuotaSource::Drained)
    }

    /// What the log calls it.
    fn name(&self) -> String {
        let slots = self.listeners.iter().map(|slot| slot.slot().to_string());
        let slots: Vec<_> = slots.collect();
        match slots.as_slice() {
            [slot] => format!("slot {slot}"),
            _ => format!("slots {} together", slots.join(", ")),
        }
    }
}

/// Gives a server the quota that holds for it: `rule`, because of `why`, unless one was set by
/// hand. `weight` is that of each of its listeners.
///
/// # Errors
/// When a map can't be read.
pub fn put_in_force(
    writer: &Writer,
    server: &Server<'_>,
    rule: InForce,
    weight: u32,
    why: &str,
) -> Result<()> {
    let service = server.listeners[0].member.backend.service;
    let before = server.written();
    let by_hand = before.filter(|before| before.source.is_own());
    let by_hand_for_all = services::quota_by_hand(&writer.tables, service)?;
    let before = before.map(|before| before.quota);
    let now = in_force(by_hand, by_hand_for_all, rule);
    if before != Some(now.quota) {
        let before = before.map_or_else(|| "new".to_owned(), |before| before.to_string());
        let why = if now == rule { why } else { "set by hand" };
        info!(
            "{}: quota of {}: {before} -> {} ({why})",
            services::name(&writer.tables, service),
            server.name(),
            now.quota
        );
    }
    write(writer, server, now, weight);
    Ok(())
}

/// Gives each listener its part.
fn write(writer: &Writer, server: &Server<'_>, now: InForce, weight: u32) {
    let listener = |slot: &&SlotView| server::Listener {
        used: slot.used(),
        part: written(&slot.member.policy, slot.slot_state()).map(|part| part.quota),
    };
    let listeners: Vec<_> = server.listeners.iter().map(listener).collect();
    for (slot, part) in server
        .listeners
        .iter()
        .zip(server::parts(now.quota, &listeners))
    {
        slots::set_quota(
            &writer.tables,
            SlotQuota {
                id: slot.id(),
                in_force: InForce { quota: part, ..now },
                weight,
                first_slot: server.first_slot(),
                server_quota: now.quota,
            },
        );
    }
}

/// Explains the quotas of a service, by the one that was set by hand where there is one.
///
/// # Errors
/// When the map can't be read or changed.
pub fn explain(writer: &mut Writer, service: u16, sentence: &str) -> Result<()> {
    match services::quota_by_hand(&writer.tables, service)? {
        Some(quota) => {
            let by_hand = format!("set by hand: {quota} for each backend");
            services::write_sentence(&mut writer.tables, service, &by_hand)
        }
        None => services::write_sentence(&mut writer.tables, service, sentence),
    }
}

/// Sets (or, with `None`, clears) a quota by hand, of a service or of one of its backends; says
/// what changed.
///
/// # Errors
/// When there is no such service or backend.
pub fn set_by_hand(
    writer: &mut Writer,
    service: &str,
    slot: Option<u32>,
    quota: Option<u32>,
) -> Result<String> {
    let ids = services::ids(&writer.tables)?;
    let Some(id) = ids.get(service).copied() else {
        let known: Vec<_> = ids.into_keys().collect();
        bail!(
            "there is no service `{service}`; there are: {}",
            known.join(", ")
        );
    };
    let mut slots = writer.tables.slots()?;
    slots.retain(|view| view.member.backend.service == id);
    let Some(slot) = slot else {
        let before = services::quota_by_hand(&writer.tables, id)?;
        services::set_quota_by_hand(&mut writer.tables, id, quota)?;
        let message = match (quota, before) {
            (Some(quota), _) => format!("the quota of every backend of {service} is {quota}"),
            (None, Some(_)) => format!("the quota of {service} follows its rule again"),
            (None, None) => format!("the quota of {service} follows its rule, as before"),
        };
        return Ok(message + &kept_by_hand(service, &slots));
    };
    let view = slots
        .iter()
        .find(|view| view.slot() == slot)
        .with_context(|| {
            format!("{service} has no backend in slot {slot}; `balancer status` shows the slots")
        })?;
    let server = with_siblings(view, &slots);
    let weight = view.member.weight();
    let name = server.name();
    match quota {
        Some(quota) => {
            let now = InForce {
                quota: Quota::from_map(quota),
                source: QuotaSource::Backend,
            };
            write(writer, &server, now, weight);
            Ok(format!("the quota of {name} of {service} is {quota}"))
        }
        None => match own(&server) {
            None => Ok(format!(
                "the quota of {name} of {service} follows the service's, as before"
            )),
            // It holds until the next computation. A computed quota would go down slowly.
            Some(quota) => {
                let source = QuotaSource::Service;
                write(writer, &server, InForce { quota, source }, weight);
                Ok(format!(
                    "the quota of {name} of {service} follows the service's again"
                ))
            }
        },
    }
}

/// Takes a server out: no new connections, and the present ones are to be moved. It stays so until
/// [`undrain`].
///
/// # Errors
/// When a map can't be read.
pub fn drain(writer: &Writer, listener: &SlotView) -> Result<String> {
    let slots = of_service(writer, listener.member.backend.service)?;
    let server = with_siblings(listener, &slots);
    let closed = InForce {
        quota: Quota::Limited(0),
        source: QuotaSource::Drained,
    };
    write(writer, &server, closed, listener.member.weight());
    Ok(server.name())
}

/// Ends that: the quota follows the service's again.
///
/// # Errors
/// When a map can't be read, or the server is not drained.
pub fn undrain(writer: &Writer, listener: &SlotView) -> Result<String> {
    let slots = of_service(writer, listener.member.backend.service)?;
    let server = with_siblings(listener, &slots);
    ensure!(server.is_drained(), "{} is not drained", server.name());
    let open = InForce {
        quota: Quota::Unlimited,
        source: QuotaSource::Service,
    };
    write(writer, &server, open, listener.member.weight());
    Ok(server.name())
}

fn of_service(writer: &Writer, service: u16) -> Result<Vec<SlotView>> {
    let mut slots = writer.tables.slots()?;
    slots.retain(|view| view.member.backend.service == service);
    Ok(slots)
}

/// The first slot of a listener's server; `None`: the daemon has written none yet.
fn first_slot(view: &SlotView) -> Option<u32> {
    let policy = &view.member.policy;
    let is_written = policy.is_for(view.slot_state());
    is_written.then(|| policy.first_slot())
}

/// The server of a listener, as the daemon put it together when it wrote quotas last.
fn with_siblings<'a>(view: &'a SlotView, slots: &'a [SlotView]) -> Server<'a> {
    let is_sibling = |other: &&SlotView| {
        other.slot() == view.slot()
            || first_slot(view).is_some()
                && first_slot(other) == first_slot(view)
                && other.slot_state().is(BackendState::Active)
    };
    Server {
        listeners: slots.iter().filter(is_sibling).collect(),
        weight: view.member.weight(),
    }
}

/// The exceptions from the quota of a service: its servers whose own quota was set by hand.
fn kept_by_hand(service: &str, slots: &[SlotView]) -> String {
    let key = |view: &SlotView| first_slot(view).unwrap_or_else(|| view.slot());
    let active = slots
        .iter()
        .filter(|view| view.slot_state().is(BackendState::Active));
    let servers = Server::group(active.map(|view| (view, 1)), key);
    let kept = servers.iter().filter_map(|server| {
        let own = own(server)?;
        let keeps = match server.listeners.len() {
            1 => "keeps its",
            _ => "keep their",
        };
        let (name, slot) = (server.name(), server.first_slot());
        Some(format!(
            "; {name} {keeps} own quota by hand, {own}, until `balancer quota clear {service} \
             --slot {slot}`"
        ))
    });
    kept.collect()
}

/// The quota that was set by hand for this server alone.
fn own(server: &Server<'_>) -> Option<Quota> {
    let written = server.written()?;
    written.source.is_own().then_some(written.quota)
}

#[cfg(test)]
mod tests {
    use super::*;
    use balancer_common::abi::{Backend, BackendState, Counts, Health, SlotPolicy, SlotState};
    use balancer_common::decision::member::Member;

    fn slot(policy: SlotPolicy) -> SlotView {
        listener(3, policy)
    }

    fn listener(slot: u32, policy: SlotPolicy) -> SlotView {
        let member = Member {
            slot,
            backend: Backend {
                slot_state: SlotState::new(4, BackendState::Active).0,
                ..Backend::EMPTY
            },
            policy,
            counts: Counts::ZERO,
            health: Health::UNKNOWN,
        };
        SlotView {
            member,
            regards_health: true,
        }
    }

    #[test]
    fn only_a_quota_of_this_generation_that_nobody_set_by_hand_goes_down_slowly() {
        let previous = |generation, source: QuotaSource| {
            let policy = SlotPolicy::new(generation, 3, 1, source.flags()).of_server(3, 7);
            let listeners = [slot(policy), listener(5, policy)];
            let servers = Server::group(listeners.iter().map(|slot| (slot, 1)), |_| ());
            assert_eq!(servers.len(), 1);
            servers[0].ready_backend().previous
        };
        let seven = Some(Quota::Limited(7));
        assert_eq!(previous(4, QuotaSource::Computed), seven);
        assert_eq!(previous(4, QuotaSource::Rule), seven);
        assert_eq!(previous(4, QuotaSource::Service), None);
        assert_eq!(previous(4, QuotaSource::Backend), None);
        assert_eq!(previous(3, QuotaSource::Computed), None);
    }

    #[test]
    fn a_backend_that_keeps_a_quota_by_hand_is_named_with_the_command_that_clears_it() {
        let part = |number, quota, source: QuotaSource| {
            let policy = SlotPolicy::new(4, quota, 1, source.flags());
            listener(number, policy.of_server(3, quota))
        };
        let with = |quota, source| part(3, quota, source);
        let others = [
            with(5, QuotaSource::Computed),
            with(5, QuotaSource::Rule),
            with(5, QuotaSource::Service),
        ];
        assert_eq!(kept_by_hand("agents", &others), "");
        assert_eq!(
            kept_by_hand("agents", &[with(0, QuotaSource::Backend)]),
            "; slot 3 keeps its own quota by hand, 0, until `balancer quota clear agents --slot 3`"
        );
        let one_server = [3, 4].map(|number| part(number, 9, QuotaSource::Backend));
        assert_eq!(
            kept_by_hand("agents", &one_server),
            "; slots 3, 4 together keep their own quota by hand, 9, until `balancer quota clear \
             agents --slot 3`"
        );
    }

    #[test]
    fn the_wait_begins_anew_where_a_quota_changes_or_none_goes_down() {
        const LONG: Duration = Duration::from_secs(10);
        let outcome = |limit, lowering| Outcome {
            quotas: vec![Quota::Limited(limit)],
            sentence: String::new(),
            lowering,
        };
        let goes_on_after = |limit, lowering| {
            let mut clocks = LoweringClocks::default();
            clocks.compute(&(), |waited| {
                assert_eq!(waited, Duration::ZERO);
                outcome(9, true)
            });
            clocks.0.values_mut().for_each(|clock| clock.since -= LONG);
            clocks.compute(&(), |waited| {
                assert!(waited >= LONG);
                outcome(limit, lowering)
            });
            let clock = clocks.0.values().next();
            clock.is_some_and(|clock| clock.since.elapsed() >= LONG)
        };
        assert!(goes_on_after(9, true));
        assert!(!goes_on_after(8, true));
        assert!(!goes_on_after(9, false));
    }
}
