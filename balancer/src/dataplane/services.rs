//! The daemon's side of services: their ids, their ports and rules, their quotas by hand.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context as _, Result, bail};
use aya::maps::MapData;
use aya::maps::lpm_trie::Key;
use balancer_common::abi::{BackendState, MAX_SERVICES, ServiceInfo, ServicePort, UNLIMITED};
use tracing::{info, warn};

use super::plain::Plain;
use super::plan::{Plan, ServicePlan, rule_of};
use super::read::snapshot::{services, text};
use super::tables::SlotView;
use super::writer::Writer;

/// How many ids there are for services.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a constant far below 65,536"
)]
const SERVICE_IDS: u16 = MAX_SERVICES as u16;

const EMPTY_INFO: ServiceInfo = ServiceInfo {
    name: [0; 64],
    rule: [0; 128],
    sentence: [0; 256],
    address: balancer_common::abi::Address::ANY,
    quota_by_hand: 0,
    by_hand: 0,
    port: 0,
    policy: 0,
    flags: 0,
    quota: 0,
};

impl Writer {
    /// The weight of a slot by the rules in force.
    pub fn weight_of(&self, view: &SlotView) -> u32 {
        let backend = &view.member.backend;
        rule_of(&self.rules, backend.netns, backend.address, backend.port)
            .map_or(backend.weight, |rule| rule.weight)
    }

    /// Puts a plan in force. New sources and listeners first, ports last, so that no SYN is judged by half of it.
    ///
    /// # Errors
    /// When a map can't be changed.
    pub fn apply(&mut self, plan: &Plan) -> Result<()> {
        let ids = self.assign_ids(plan)?;
        let by_hand = ids
            .iter()
            .map(|id| self.quota_by_hand(*id))
            .collect::<Result<Vec<_>>>()?;
        for (service, id) in plan.services.iter().zip(&ids) {
            self.write_info(*id, service)?;
        }
        self.apply_exempt(plan, &ids)?;
        let rules = plan.rules(&ids);
        sync(&mut self.tables.rules, &rules, "LISTEN_RULES")?;
        sync(
            &mut self.tables.services,
            &plan.ports(&ids, &by_hand),
            "SERVICES",
        )?;
        self.rules = rules;
        self.retire_services(&ids)?;
        self.close_strangers()
    }

    /// Writes the ports again after a quota by hand has changed.
    ///
    /// # Errors
    /// When a map can't be changed.
    pub fn refresh_ports(&mut self, plan: &Plan) -> Result<()> {
        let ids = self.assign_ids(plan)?;
        let by_hand = ids
            .iter()
            .map(|id| self.quota_by_hand(*id))
            .collect::<Result<Vec<_>>>()?;
        sync(
            &mut self.tables.services,
            &plan.ports(&ids, &by_hand),
            "SERVICES",
        )
    }

    /// A service keeps its id by its name, over reloads and restarts.
    fn assign_ids(&mut self, plan: &Plan) -> Result<Vec<u16>> {
        let mut names: BTreeMap<String, u16> = BTreeMap::new();
        let mut used = HashSet::new();
        for id in 0..SERVICE_IDS {
            let info = self.info(id)?;
            if info.name[0] != 0 {
                names.insert(text(&info.name), id);
                used.insert(id);
            }
        }
        let mut ids = Vec::new();
        for service in &plan.services {
            let id = match names.get(&service.name) {
                Some(id) => *id,
                None => self.new_id(&mut used)?,
            };
            ids.push(id);
        }
        Ok(ids)
    }

    fn new_id(&mut self, used: &mut HashSet<u16>) -> Result<u16> {
        let Some(id) = (0..SERVICE_IDS).find(|id| !used.contains(id)) else {
            bail!(
                "all {MAX_SERVICES} service ids are in use (services that were removed keep theirs until their last \
                 connection is gone)"
            );
        };
        used.insert(id);
        self.tables.forget_service(id)?;
        Ok(id)
    }

    fn info(&self, id: u16) -> Result<ServiceInfo> {
        Ok(self
            .tables
            .info
            .get(&u32::from(id), 0)
            .context("cannot read the services")?
            .0)
    }

    fn set_info(&mut self, id: u16, info: &ServiceInfo) -> Result<()> {
        self.tables
            .info
            .set(u32::from(id), Plain(*info), 0)
            .context("cannot write the services")
    }

    fn write_info(&mut self, id: u16, service: &ServicePlan) -> Result<()> {
        let old = self.info(id)?;
        let info = ServiceInfo {
            name: padded(&service.name),
            rule: padded(&service.rule),
            address: service
                .address
                .map_or(balancer_common::abi::Address::ANY, Into::into),
            port: service.port,
            policy: service.policy as u8,
            flags: if service.virtual_port {
                ServicePort::VIRTUAL
            } else {
                0
            },
            quota: service.quota.unwrap_or(UNLIMITED),
            ..old
        };
        if info == old {
            Ok(())
        } else {
            self.set_info(id, &info)
        }
    }

    /// Explains a service's quotas.
    ///
    /// # Errors
    /// When the map can't be changed.
    pub fn write_sentence(&mut self, id: u16, sentence: &str) -> Result<()> {
        let old = self.info(id)?;
        let info = ServiceInfo {
            sentence: padded(sentence),
            ..old
        };
        if info == old {
            Ok(())
        } else {
            self.set_info(id, &info)
        }
    }

    /// The quota set by hand for every backend of a service.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn quota_by_hand(&self, id: u16) -> Result<Option<u32>> {
        let info = self.info(id)?;
        Ok((info.by_hand == 1).then_some(info.quota_by_hand))
    }

    /// Sets or clears it.
    ///
    /// # Errors
    /// When the map can't be changed.
    pub fn set_quota_by_hand(&mut self, id: u16, quota: Option<u32>) -> Result<()> {
        let info = self.info(id)?;
        self.set_info(
            id,
            &ServiceInfo {
                by_hand: u32::from(quota.is_some()),
                quota_by_hand: quota.unwrap_or(0),
                ..info
            },
        )
    }

    /// The services by name.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn service_ids(&self) -> Result<BTreeMap<String, u16>> {
        Ok(services(&self.tables)?
            .into_iter()
            .map(|(id, info)| (text(&info.name), id))
            .collect())
    }

    /// The services by name with their ports.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn service_ports(&self) -> Result<Vec<(String, u16)>> {
        Ok(services(&self.tables)?
            .into_iter()
            .map(|(_, info)| (text(&info.name), info.port))
            .collect())
    }

    /// The port of a service; `None`: there is none with that number.
    pub fn port_of(&self, id: u16) -> Option<u16> {
        let info = self.info(id).ok()?;
        (info.port != 0).then_some(info.port)
    }

    /// What a service is called; its number where it is not known any more.
    pub fn service_name(&self, id: u16) -> String {
        let info = self.info(id).ok().filter(|info| info.name[0] != 0);
        info.map_or_else(|| format!("service {id}"), |info| text(&info.name))
    }

    /// Goes on with the rules that are in the kernel, while it is not known what they should be.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn resume(&mut self) -> Result<()> {
        let rules = self.tables.rules.iter();
        self.rules = rules
            .map(|entry| entry.map(|(key, rule)| (key.0, rule.0)))
            .collect::<Result<_, _>>()
            .context("cannot read LISTEN_RULES")?;
        Ok(())
    }

    fn apply_exempt(&mut self, plan: &Plan, ids: &[u16]) -> Result<()> {
        let wanted = plan.exempt(ids);
        let present: Vec<_> = self
            .tables
            .exempt
            .keys()
            .collect::<Result<_, _>>()
            .context("cannot read EXEMPT")?;
        for ((bits, key), class) in &wanted {
            self.tables
                .exempt
                .insert(&Key::new(*bits, Plain(*key)), class, 0)
                .context("cannot add an exempt network")?;
        }
        for key in present {
            if !wanted.contains_key(&(key.prefix_len(), key.data().0)) {
                self.tables
                    .exempt
                    .remove(&key)
                    .context("cannot remove an exempt network")?;
            }
        }
        Ok(())
    }

    /// Services that are no longer configured lose their name once their last slot is free, and their ports at once.
    fn retire_services(&mut self, ids: &[u16]) -> Result<()> {
        let busy: HashSet<u16> = self
            .slots()?
            .iter()
            .map(|view| view.member.backend.service)
            .collect();
        for id in 0..SERVICE_IDS {
            let info = self.info(id)?;
            if info.name[0] == 0 || ids.contains(&id) {
                continue;
            }
            let retired = if busy.contains(&id) {
                ServiceInfo { port: 0, ..info }
            } else {
                EMPTY_INFO
            };
            if retired != info {
                info!("service {} is no longer configured", text(&info.name));
                self.set_info(id, &retired)?;
            }
        }
        Ok(())
    }

    /// Listeners that no rule claims any more get no SYNs; what they hold is counted on.
    fn close_strangers(&mut self) -> Result<()> {
        for view in self.slots()? {
            let backend = &view.member.backend;
            let rule = rule_of(&self.rules, backend.netns, backend.address, backend.port);
            if view.slot_state().is(BackendState::Active)
                && rule.is_none_or(|rule| rule.service != backend.service)
            {
                warn!(
                    "slot {}: the listener on port {} is no longer a backend; if another service wants it, it must listen anew",
                    view.slot(),
                    backend.port
                );
                self.close(&view);
            }
        }
        Ok(())
    }
}

/// Text for a map, cut at a character's boundary, with at least one zero behind it.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
    bytes
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_a_character() {
        let bytes: [u8; 4] = padded("aäöü");
        assert_eq!(text(&bytes), "aä");
        let bytes: [u8; 8] = padded("abc");
        assert_eq!(text(&bytes), "abc");
    }
}
