//! The services in the maps: their ids, their ports and rules, their quotas by hand.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use aya::maps::lpm_trie::Key;
use balancer_common::abi::{Address, BackendState, ServiceInfo};
use tracing::{info, warn};

use super::plain::Plain;
use super::plan::{Plan, Rules, ServicePlan};
use super::slots;
use super::tables::{Tables, every_service, padded, text};
use crate::quota::Quota;
use crate::quota::in_force::{by_hand, of_service};

const EMPTY_INFO: ServiceInfo = ServiceInfo {
    name: [0; 64],
    rule: [0; 128],
    sentence: [0; 256],
    address: Address::ANY,
    quota_by_hand: 0,
    by_hand: 0,
    port: 0,
    policy: 0,
    flags: 0,
    quota: 0,
    unattributed: 0,
};

/// Puts a plan in force, and its rules into `rules`. New sources and listeners first, ports last,
/// so that no SYN is judged by half of it. Returns the names of the services that no id was left
/// for: services that were removed keep theirs until their last connection is gone.
///
/// # Errors
/// When a map can't be changed.
pub fn apply(tables: &mut Tables, plan: &Plan, rules: &mut Rules) -> Result<Vec<String>> {
    let Numbered {
        ref plan,
        ids,
        left_out,
    } = assign_ids(tables, plan)?;
    for (service, id) in plan.services.iter().zip(&ids) {
        let before = tables.service(*id)?;
        update(tables, *id, |info| describe(info, service))?;
        if before.name[0] != 0 && before.rule != padded(&service.rule) {
            slots::forget_computed(tables, *id)?;
        }
        tables.set_keepalive(*id, service.keepalive);
    }
    apply_exempt(tables, plan, &ids)?;
    let wanted = plan.rules(&ids);
    sync(&mut tables.rules, &wanted.0, "LISTEN_RULES")?;
    write_ports(tables, plan, &ids)?;
    *rules = wanted;
    retire(tables, &ids)?;
    close_unclaimed(tables, rules)?;
    Ok(left_out)
}

/// Writes the ports again after a quota by hand has changed.
///
/// # Errors
/// When a map can't be changed.
pub fn refresh_ports(tables: &mut Tables, plan: &Plan) -> Result<()> {
    let Numbered { plan, ids, .. } = assign_ids(tables, plan)?;
    write_ports(tables, &plan, &ids)
}

fn write_ports(tables: &mut Tables, plan: &Plan, ids: &[u16]) -> Result<()> {
    let quota = |id: &u16| Ok(of_service(&tables.service(*id)?).quota);
    let quotas = ids.iter().map(quota).collect::<Result<Vec<_>>>()?;
    sync(&mut tables.services, &plan.ports(ids, &quotas), "SERVICES")
}

/// A plan whose services have ids.
struct Numbered {
    plan: Plan,
    /// The ids of the services, in their order.
    ids: Vec<u16>,
    /// The names of the services that there was no id for; they are not in the plan.
    left_out: Vec<String>,
}

/// A service keeps its id by its name, over reloads and restarts.
fn assign_ids(tables: &mut Tables, plan: &Plan) -> Result<Numbered> {
    let mut names: BTreeMap<String, u16> = BTreeMap::new();
    for id in every_service() {
        let info = tables.service(id)?;
        if info.name[0] != 0 {
            names.insert(text(&info.name), id);
        }
    }
    let mut used: HashSet<u16> = names.values().copied().collect();
    let mut numbered = Numbered {
        plan: plan.clone(),
        ids: Vec::new(),
        left_out: Vec::new(),
    };
    for service in std::mem::take(&mut numbered.plan.services) {
        let id = match names.get(&service.name) {
            Some(id) => Some(*id),
            None => new_id(tables, &mut used)?,
        };
        match id {
            Some(id) => {
                numbered.ids.push(id);
                numbered.plan.services.push(service);
            }
            None => numbered.left_out.push(service.name),
        }
    }
    Ok(numbered)
}

/// `None`: all are in use.
fn new_id(tables: &mut Tables, used: &mut HashSet<u16>) -> Result<Option<u16>> {
    let Some(id) = every_service().find(|id| !used.contains(id)) else {
        return Ok(None);
    };
    used.insert(id);
    tables.forget_service(id)?;
    Ok(Some(id))
}

/// Changes what is known of a service; says whether that is another thing than before.
fn update(tables: &mut Tables, id: u16, change: impl FnOnce(&mut ServiceInfo)) -> Result<bool> {
    let old = tables.service(id)?;
    let mut new = old;
    change(&mut new);
    if new != old {
        tables
            .info
            .set(u32::from(id), Plain(new), 0)
            .context("cannot write the services")?;
    }
    Ok(new != old)
}

/// Writes down what the plan says of a service; its sentence and its quota by hand stay.
fn describe(info: &mut ServiceInfo, service: &ServicePlan) {
    info.name = padded(&service.name);
    info.rule = padded(&service.rule);
    info.address = service.address.map_or(Address::ANY, Into::into);
    info.port = service.port;
    info.policy = service.policy as u8;
    info.flags = service.flags();
    info.quota = service.quota.to_map();
}

/// Explains a service's quotas.
///
/// # Errors
/// When the map can't be changed.
pub fn write_sentence(tables: &mut Tables, id: u16, sentence: &str) -> Result<()> {
    update(tables, id, |info| info.sentence = padded(sentence)).map(drop)
}

/// Says how many connections through a service's virtual port are counted on no backend.
///
/// # Errors
/// When the map can't be changed.
pub fn set_unattributed(tables: &mut Tables, id: u16, connections: u32) -> Result<()> {
    update(tables, id, |info| info.unattributed = connections).map(drop)
}

/// The quota set by hand for every backend of a service.
///
/// # Errors
/// When the map can't be read.
pub fn quota_by_hand(tables: &Tables, id: u16) -> Result<Option<Quota>> {
    Ok(by_hand(&tables.service(id)?))
}

/// Sets or clears the quota by hand for every backend of a service.
///
/// # Errors
/// When the map can't be changed.
pub fn set_quota_by_hand(tables: &mut Tables, id: u16, quota: Option<u32>) -> Result<()> {
    update(tables, id, |info| {
        info.by_hand = u32::from(quota.is_some());
        info.quota_by_hand = quota.unwrap_or(0);
    })
    .map(drop)
}

/// The services by name.
///
/// # Errors
/// When the map can't be read.
pub fn ids(tables: &Tables) -> Result<BTreeMap<String, u16>> {
    let named = tables.named_services()?.into_iter();
    Ok(named.map(|(id, info)| (text(&info.name), id)).collect())
}

/// The services by name with their ports.
///
/// # Errors
/// When the map can't be read.
pub fn ports(tables: &Tables) -> Result<Vec<(String, u16)>> {
    let named = tables.named_services()?.into_iter();
    let port = |(_, info): (u16, ServiceInfo)| (text(&info.name), info.port);
    Ok(named.map(port).collect())
}

/// The port of a service; `None`: there is none with that id.
pub fn port_of(tables: &Tables, id: u16) -> Option<u16> {
    let info = tables.service(id).ok()?;
    (info.port != 0).then_some(info.port)
}

/// What a service is called; its id where it is not known any more.
pub fn name(tables: &Tables, id: u16) -> String {
    let info = tables.service(id).ok().filter(|info| info.name[0] != 0);
    info.map_or_else(|| format!("service {id}"), |info| text(&info.name))
}

/// The rules that are in the kernel.
///
/// # Errors
/// When the map can't be read.
pub fn rules(tables: &Tables) -> Result<Rules> {
    let rules = tables.rules.iter();
    let rules = rules.map(|entry| entry.map(|(key, rule)| (key.0, rule.0)));
    Ok(Rules(
        rules
            .collect::<Result<_, _>>()
            .context("cannot read LISTEN_RULES")?,
    ))
}

fn apply_exempt(tables: &mut Tables, plan: &Plan, ids: &[u16]) -> Result<()> {
    let wanted = plan.exempt(ids);
    let exempt = &mut tables.exempt;
    let present: Vec<_> = exempt
        .keys()
        .collect::<Result<_, _>>()
        .context("cannot read EXEMPT")?;
    for ((bits, key), class) in &wanted {
        exempt
            .insert(&Key::new(*bits, Plain(*key)), class, 0)
            .context("cannot add an exempt network")?;
    }
    for key in present {
        if !wanted.contains_key(&(key.prefix_len(), key.data().0)) {
            exempt
                .remove(&key)
                .context("cannot remove an exempt network")?;
        }
    }
    Ok(())
}

/// Services that are no longer configured lose their ports at once, and their names once their last
/// slot is free.
fn retire(tables: &mut Tables, configured: &[u16]) -> Result<()> {
    let slots = tables.slots()?;
    let busy: HashSet<u16> = slots
        .iter()
        .map(|view| view.member.backend.service)
        .collect();
    for id in every_service().filter(|id| !configured.contains(id)) {
        let name = name(tables, id);
        let retired = update(tables, id, |info| {
            if info.name[0] == 0 {
                return;
            }
            if busy.contains(&id) {
                info.port = 0;
            } else {
                *info = EMPTY_INFO;
            }
        })?;
        if retired {
            info!("service {name} is no longer configured");
        }
    }
    Ok(())
}

/// Listeners that no rule claims any more get no SYNs; what they hold is counted on.
fn close_unclaimed(tables: &Tables, rules: &Rules) -> Result<()> {
    for view in tables.slots()? {
        let backend = &view.member.backend;
        let rule = rules.of_backend(backend);
        if view.slot_state().is(BackendState::Active)
            && rule.is_none_or(|rule| rule.service != backend.service)
        {
            warn!(
                "slot {}: the listener on port {} is no longer a backend; if another service \
                 wants it, it must listen anew",
                view.slot(),
                backend.port
            );
            slots::close(tables, &view);
        }
    }
    Ok(())
}

/// Text for a map, cut at a character's boundary, with at least one zero behind it.
/// Makes a hash map hold exactly what is wanted: adds and changes first, removes last.
fn sync<K, V>(
    map: &mut aya::maps::HashMap<MapData, Plain<K>, Plain<V>>,
    wanted: &BTreeMap<K, V>,
    name: &str,
) -> Result<()>
where
    K: Copy + Ord,
    V: Copy + PartialEq,
    Plain<K>: aya::Pod,
    Plain<V>: aya::Pod,
{
    let present: Vec<Plain<K>> = map
        .keys()
        .collect::<Result<_, _>>()
        .with_context(|| format!("cannot read {name}"))?;
    for (key, value) in wanted {
        map.insert(Plain(*key), Plain(*value), 0)
            .with_context(|| format!("cannot write {name} (is it full?)"))?;
    }
    for key in present {
        if !wanted.contains_key(&key.0) {
            map.remove(&key)
                .with_context(|| format!("cannot remove an entry of {name}"))?;
        }
    }
    Ok(())
}
