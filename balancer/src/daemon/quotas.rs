//! Quotas of backends: what they are computed from, and putting in force what came out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use balancer_common::abi::ticks;
use tracing::info;

use crate::dataplane::{SlotQuota, SlotView, Writer, services, slots};
use crate::quota::in_force::{in_force, written};
use crate::quota::{InForce, Outcome, Quota, QuotaSource, ReadyBackend};
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

/// The backend of a slot as the computation of quotas takes it. A quota set by hand is no previous
/// one: it would go down slowly.
pub fn ready_backend(slot: &SlotView, weight: u32) -> ReadyBackend {
    let before = written(&slot.member.policy, slot.slot_state());
    let computed = before.filter(|before| !before.source.is_by_hand());
    let now = ticks(clock::monotonic_ns());
    ReadyBackend {
        weight,
        established: slot.counted(),
        previous: computed.map(|before| before.quota),
        full: slot.room() == Some(0),
        unhealthy_for: slot.unhealthy(now).map(|(_, age)| age),
        wants_trial: slot.member.health.wants_trial(now),
    }
}

/// Gives a backend its weight and the quota that holds for it: `rule`, because of `why`, unless one
/// was set by hand.
///
/// # Errors
/// When a map can't be read.
pub fn put_in_force(
    writer: &Writer,
    slot: &SlotView,
    rule: InForce,
    weight: u32,
    why: &str,
) -> Result<()> {
    let service = slot.member.backend.service;
    let before = written(&slot.member.policy, slot.slot_state());
    let by_hand = before.filter(|before| before.source == QuotaSource::Backend);
    let by_hand_for_all = services::quota_by_hand(&writer.tables, service)?;
    let before = before.map(|before| before.quota);
    let now = in_force(by_hand.map(|before| before.quota), by_hand_for_all, rule);
    if before != Some(now.quota) {
        let before = before.map_or_else(|| "new".to_owned(), |before| before.to_string());
        let why = if now == rule { why } else { "set by hand" };
        info!(
            "{}: quota of slot {}: {before} -> {} ({why})",
            services::name(&writer.tables, service),
            slot.slot(),
            now.quota
        );
    }
    write(writer, slot, now, weight);
    Ok(())
}

fn write(writer: &Writer, slot: &SlotView, now: InForce, weight: u32) {
    slots::set_quota(
        &writer.tables,
        SlotQuota {
            id: slot.id(),
            in_force: now,
            weight,
        },
    );
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
    let (quota, source, message) = match quota {
        Some(quota) => (
            Quota::from_map(quota),
            QuotaSource::Backend,
            format!("the quota of slot {slot} of {service} is {quota}"),
        ),
        // It holds until the next computation. A computed quota would go down slowly.
        None if own(view).is_none() => {
            return Ok(format!(
                "the quota of slot {slot} of {service} follows the service's, as before"
            ));
        }
        None => (
            view.limit().map_or(Quota::Unlimited, Quota::Limited),
            QuotaSource::Service,
            format!("the quota of slot {slot} of {service} follows the service's again"),
        ),
    };
    write(
        writer,
        view,
        InForce { quota, source },
        writer.rules.weight_of(&view.member.backend),
    );
    Ok(message)
}

/// The exceptions from the quota of a service: its backends whose own quota was set by hand.
fn kept_by_hand(service: &str, slots: &[SlotView]) -> String {
    let kept = slots.iter().filter_map(|view| {
        let own = own(view)?;
        let slot = view.slot();
        Some(format!(
            "; slot {slot} keeps its own quota by hand, {own}, until `balancer quota clear \
             {service} --slot {slot}`"
        ))
    });
    kept.collect()
}

/// The quota that was set by hand for this backend alone.
fn own(view: &SlotView) -> Option<Quota> {
    let written = written(&view.member.policy, view.slot_state())?;
    (written.source == QuotaSource::Backend).then_some(written.quota)
}

#[cfg(test)]
mod tests {
    use super::*;
    use balancer_common::abi::{Backend, BackendState, Counts, Health, SlotPolicy, SlotState};
    use balancer_common::decision::member::Member;

    fn slot(policy: SlotPolicy) -> SlotView {
        let member = Member {
            slot: 3,
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
            let policy = SlotPolicy::new(generation, 7, 1, source.flags());
            ready_backend(&slot(policy), 1).previous
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
        let with = |quota, source: QuotaSource| slot(SlotPolicy::new(4, quota, 1, source.flags()));
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
