//! Quotas: what is established in, what each backend may hold out.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use balancer_common::abi::{BackendState, SlotPolicy, UNLIMITED};
use tracing::info;

use super::attach::GuardedNetns;
use crate::config::{Config, QuotaRule, Service};
use crate::dataplane::{QuotaSource, SlotQuota, SlotView, Writer, services, slots};
use crate::quota::{Outcome, Quota, Ready, compute};

/// The quotas computed last, by service.
#[derive(Debug, Default)]
pub struct Quotas {
    waits: Waits<String>,
    /// Slots whose override was just cleared: what they had by hand is no computed quota to go down from slowly.
    cleared: HashSet<u32>,
}

/// Since when quotas that are computed together have been waiting to go down.
#[derive(Debug)]
pub struct Waits<K>(BTreeMap<K, Waiting>);

#[derive(Debug)]
struct Waiting {
    quotas: Vec<Quota>,
    since: Instant,
}

impl<K> Default for Waits<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Clone> Waits<K> {
    /// How long those of `key` have been waiting.
    pub fn waited(&self, key: &K) -> Duration {
        self.0
            .get(key)
            .map_or(Duration::ZERO, |waiting| waiting.since.elapsed())
    }

    /// Begins to wait anew where something has changed.
    pub fn on_events(&mut self, key: &K, outcome: &Outcome) {
        let waiting = self.0.get(key);
        if waiting.is_none_or(|waiting| !outcome.lowering || waiting.quotas != outcome.quotas) {
            let quotas = outcome.quotas.clone();
            let since = Instant::now();
            self.0.insert(key.clone(), Waiting { quotas, since });
        }
    }

    /// Forgets all others.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.0.retain(|key, _| keep(key));
    }
}

impl Quotas {
    /// Computes every service's quotas and puts them in force at the next SYN.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply(
        &mut self,
        config: &Config,
        guarded: &GuardedNetns,
        writer: &mut Writer,
    ) -> Result<()> {
        let ids = services::ids(&writer.tables)?;
        let slots = writer.tables.slots()?;
        self.waits
            .retain(|name| config.services.iter().any(|service| service.name == *name));
        for service in &config.services {
            let Some(id) = ids.get(&service.name) else {
                continue;
            };
            let ready: Vec<&SlotView> = slots
                .iter()
                .filter(|view| {
                    view.member.backend.service == *id && view.slot_state().is(BackendState::Active)
                })
                .filter(|view| guarded.covers(view.member.backend.netns))
                .collect();
            self.apply_service(service, *id, &ready, writer)?;
        }
        Ok(())
    }

    fn apply_service(
        &mut self,
        service: &Service,
        id: u16,
        ready: &[&SlotView],
        writer: &mut Writer,
    ) -> Result<()> {
        let inputs: Vec<Ready> = ready
            .iter()
            .map(|view| self.input(view, writer.rules.weight_of(&view.member.backend)))
            .collect();
        let waited = self.waits.waited(&service.name);
        let outcome = compute(&service.quota, &inputs, waited);
        self.waits.on_events(&service.name, &outcome);
        let source = by_rule(&service.quota);
        for (view, quota) in ready.iter().zip(&outcome.quotas) {
            let weight = writer.rules.weight_of(&view.member.backend);
            settle(writer, view, *quota, source, weight, &outcome.sentence)?;
        }
        let sentence = services::quota_by_hand(&writer.tables, id)?
            .map_or(outcome.sentence, |quota| {
                format!("set by hand: {quota} for each backend")
            });
        services::write_sentence(&mut writer.tables, id, &sentence)
    }

    /// What the quota of a backend that is ready depends on.
    pub fn input(&mut self, view: &SlotView, weight: u32) -> Ready {
        let policy = &view.member.policy;
        let fresh = self.cleared.remove(&view.slot());
        let computed_before = !fresh && policy.is_for(view.slot_state()) && !policy.is_by_hand();
        Ready {
            weight,
            established: view.counted(),
            previous: computed_before
                .then(|| present(view).map_or(Quota::Unlimited, Quota::Limited)),
        }
    }

    /// Sets (or, with `None`, clears) a quota by hand, of a service or of one of its backends; says what changed.
    ///
    /// # Errors
    /// When there is no such service or backend.
    pub fn set(
        &mut self,
        writer: &mut Writer,
        service: &str,
        slot: Option<u32>,
        quota: Option<u32>,
    ) -> Result<String> {
        let ids = services::ids(&writer.tables)?;
        let Some(id) = ids.get(service).copied() else {
            let known: Vec<_> = ids.into_keys().collect();
            bail!(
                "there is no service {service:?}; there are: {}",
                known.join(", ")
            );
        };
        let Some(slot) = slot else {
            services::set_quota_by_hand(&mut writer.tables, id, quota)?;
            return Ok(quota.map_or_else(
                || format!("the quota of {service} follows its rule again"),
                |quota| format!("the quota of every backend of {service} is {quota}"),
            ));
        };
        let slots = writer.tables.slots()?;
        let view = slots
            .iter()
            .find(|view| view.slot() == slot && view.member.backend.service == id)
            .with_context(|| {
                format!(
                    "{service} has no backend in slot {slot}; `balancer status` shows the slots"
                )
            })?;
        let weight = writer.rules.weight_of(&view.member.backend);
        if let Some(quota) = quota {
            slots::set_quota(
                &writer.tables,
                slot_quota(view, Some(quota), QuotaSource::Backend, weight),
            );
            return Ok(format!("the quota of slot {slot} of {service} is {quota}"));
        }
        slots::set_quota(
            &writer.tables,
            slot_quota(view, present(view), QuotaSource::Rule, weight),
        );
        self.cleared.insert(slot);
        Ok(format!(
            "the quota of slot {slot} of {service} follows the service's again"
        ))
    }
}

/// Gives a backend the quota that its rule asks for, or the one that was set by hand.
///
/// # Errors
/// When a map can't be read.
pub fn settle(
    writer: &Writer,
    view: &SlotView,
    quota: Quota,
    source: QuotaSource,
    weight: u32,
    why: &str,
) -> Result<()> {
    let id = view.member.backend.service;
    let (quota, source) = if is_by_hand(view) {
        (present(view), QuotaSource::Backend)
    } else if let Some(quota) = services::quota_by_hand(&writer.tables, id)? {
        (
            Some(quota).filter(|quota| *quota != UNLIMITED),
            QuotaSource::Service,
        )
    } else {
        (quota.limit(), source)
    };
    let why = match source {
        QuotaSource::Rule | QuotaSource::Computed => why,
        QuotaSource::Service | QuotaSource::Backend => "set by hand",
    };
    announce(writer, view, quota, why);
    slots::set_quota(&writer.tables, slot_quota(view, quota, source, weight));
    Ok(())
}

const fn by_rule(rule: &QuotaRule) -> QuotaSource {
    match rule {
        QuotaRule::Computed { .. } => QuotaSource::Computed,
        QuotaRule::Unlimited | QuotaRule::Fixed(_) => QuotaSource::Rule,
    }
}

fn slot_quota(view: &SlotView, quota: Option<u32>, source: QuotaSource, weight: u32) -> SlotQuota {
    SlotQuota {
        id: view.id(),
        quota,
        weight,
        source,
    }
}

/// Whether the quota was set by hand for this backend alone.
fn is_by_hand(view: &SlotView) -> bool {
    let policy = &view.member.policy;
    policy.is_for(view.slot_state()) && policy.flags() & SlotPolicy::BY_HAND != 0
}

/// The quota in force, `None`: unlimited or not yet written.
fn present(view: &SlotView) -> Option<u32> {
    let policy = &view.member.policy;
    (policy.is_for(view.slot_state()) && policy.quota() != UNLIMITED).then_some(policy.quota())
}

fn announce(writer: &Writer, view: &SlotView, quota: Option<u32>, why: &str) {
    let known = view.member.policy.is_for(view.slot_state());
    if known && present(view) == quota {
        return;
    }
    let show = |quota: Option<u32>| {
        quota.map_or_else(|| "unlimited".to_owned(), |quota| quota.to_string())
    };
    let before = if known {
        show(present(view))
    } else {
        "new".to_owned()
    };
    info!(
        "{}: quota of slot {}: {before} -> {} ({why})",
        services::name(&writer.tables, view.member.backend.service),
        view.slot(),
        show(quota)
    );
}
