//! What the maps should hold, worked out from the configuration before anything in the kernel
//! changes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use balancer_common::Policy;
use balancer_common::abi::{
    ANY_NETNS, Address, Backend, ExemptKey, Keepalive, ListenRule, NO_SERVICE, PortKey,
    ServicePort, UNLIMITED,
};
use ipnet::IpNet;

use crate::config::{Effect, MoveRule};
use crate::quota::Quota;

/// Where a listener of a service may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAt {
    /// The address that the listener is bound to; `None`: any.
    pub address: Option<IpAddr>,
    /// The port that the listener is bound to.
    pub port: u16,
    /// The part of the backend relative to the others of its service.
    pub weight: u32,
}

/// One service as the maps should hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The name of the service, by which it keeps its id.
    pub name: String,
    /// The port that clients connect to.
    pub port: u16,
    /// The address that clients connect to; `None`: any.
    pub address: Option<IpAddr>,
    /// The rule by which the kernel half chooses a backend.
    pub policy: Policy,
    /// Nothing listens on the port itself.
    pub virtual_port: bool,
    /// The quota by its rule of a backend that the daemon has not seen yet.
    pub quota: Quota,
    /// The quota rule in words.
    pub rule: String,
    /// Sources that are never refused.
    pub exempt: Vec<IpNet>,
    /// Backends that don't serve are avoided.
    pub health: bool,
    /// When a client that has vanished is given up; `None`: the server sees to that.
    pub keepalive: Option<Keepalive>,
    /// How established connections are moved.
    pub moving: MoveRule,
    /// The places where listeners are backends of the service.
    pub listen: Vec<ListenAt>,
    /// What of all that is done.
    pub effect: Effect,
}

/// Everything that the maps should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The services.
    pub services: Vec<ServicePlan>,
    /// Cookies of the netns whose listeners belong to the services.
    pub netns: Vec<u64>,
    /// Listeners of any other netns are candidates.
    pub any_netns: bool,
}

impl ServicePlan {
    /// Bits of [`ServicePort`].
    pub fn flags(&self) -> u8 {
        let mut flags = 0;
        if self.virtual_port {
            flags |= ServicePort::VIRTUAL;
        }
        if !self.health {
            flags |= ServicePort::HEALTH_OFF;
        }
        flags |= match self.effect {
            Effect::Count => ServicePort::COUNT_ONLY,
            Effect::DryRun => ServicePort::DRY_RUN,
            Effect::On => 0,
        };
        flags
    }
}

/// The content of EXEMPT for one service: prefix length and key.
pub type ExemptEntry = (u32, ExemptKey);

impl Plan {
    /// The plan for that much of it.
    #[must_use]
    pub fn within(mut self, effect: Effect) -> Self {
        for service in &mut self.services {
            service.effect = effect;
            if effect != Effect::On {
                service.moving = MoveRule::Off;
            }
        }
        self
    }

    /// The addresses and ports whose listeners belong to a service, by the name of the service.
    pub fn ports_listened_on(&self) -> Vec<(&str, Vec<&ListenAt>)> {
        self.services
            .iter()
            .map(|service| (service.name.as_str(), service.listen.iter().collect()))
            .collect()
    }

    /// The content of SERVICES; `ids` are the ids of the services in their order, `quotas` what
    /// holds for backends that the daemon has not seen yet.
    pub fn ports(&self, ids: &[u16], quotas: &[Quota]) -> BTreeMap<PortKey, ServicePort> {
        let mut ports = BTreeMap::new();
        for ((service, id), quota) in self.services.iter().zip(ids).zip(quotas) {
            let any = PortKey::new(ANY_NETNS, Address::ANY, service.port);
            let entry = ports.entry(any).or_insert(ServicePort {
                service: NO_SERVICE,
                policy: 0,
                flags: 0,
                quota: UNLIMITED,
            });
            let value = ServicePort {
                service: *id,
                policy: service.policy as u8,
                flags: service.flags(),
                quota: quota.to_map(),
            };
            match service.address {
                None => {
                    *entry = ServicePort {
                        flags: value.flags | (entry.flags & ServicePort::EXACT_ADDRESSES),
                        ..value
                    }
                }
                Some(address) => {
                    entry.flags |= ServicePort::EXACT_ADDRESSES;
                    ports.insert(PortKey::new(ANY_NETNS, address.into(), service.port), value);
                }
            }
        }
        ports
    }

    /// The content of `LISTEN_RULES`.
    pub fn rules(&self, ids: &[u16]) -> Rules {
        let mut scopes: Vec<(u64, u16)> = self.netns.iter().map(|cookie| (*cookie, 0)).collect();
        if self.any_netns {
            scopes.push((ANY_NETNS, ListenRule::CANDIDATE));
        }
        let mut rules = BTreeMap::new();
        for (netns, scope) in scopes {
            for (service, id) in self.services.iter().zip(ids) {
                for at in &service.listen {
                    let address = at.address.map_or(Address::ANY, Address::from);
                    let rule = ListenRule {
                        service: *id,
                        flags: scope,
                        weight: at.weight,
                    };
                    rules.insert(PortKey::new(netns, address, at.port), rule);
                }
            }
            self.add_wildcards(netns, scope, ids, &mut rules);
        }
        Rules(rules)
    }

    /// A listener that is bound to no address receives what is sent to a backend's address too: it
    /// is that backend, unless two services could claim it.
    fn add_wildcards(
        &self,
        netns: u64,
        scope: u16,
        ids: &[u16],
        rules: &mut BTreeMap<PortKey, ListenRule>,
    ) {
        let mut claims: BTreeMap<u16, Vec<ListenRule>> = BTreeMap::new();
        for (service, id) in self.services.iter().zip(ids) {
            for at in service.listen.iter().filter(|at| at.address.is_some()) {
                let rule = ListenRule {
                    service: *id,
                    flags: scope | ListenRule::WILDCARD_ONLY,
                    weight: at.weight,
                };
                claims.entry(at.port).or_default().push(rule);
            }
        }
        for (port, claims) in claims {
            let first = claims[0];
            if claims.iter().all(|claim| claim.service == first.service) {
                rules
                    .entry(PortKey::new(netns, Address::ANY, port))
                    .or_insert(first);
            }
        }
    }

    /// The content of EXEMPT.
    pub fn exempt(&self, ids: &[u16]) -> BTreeMap<ExemptEntry, u32> {
        let mut entries = BTreeMap::new();
        for (service, id) in self.services.iter().zip(ids) {
            for network in &service.exempt {
                let family_bits = if network.addr().is_ipv4() {
                    ExemptKey::V4_BITS
                } else {
                    0
                };
                let bits = ExemptKey::SERVICE_BITS + family_bits + u32::from(network.prefix_len());
                let address = Address::of_packet(network.network());
                entries.insert((bits, ExemptKey::new(*id, address)), 1);
            }
        }
        entries
    }
}

/// The content of `LISTEN_RULES`: which service a listener is of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules(pub BTreeMap<PortKey, ListenRule>);

impl Rules {
    /// The rule that the kernel finds for a listener.
    pub fn of(&self, netns: u64, address: Address, port: u16) -> Option<ListenRule> {
        ListenRule::most_specific(netns, address, port, |key| self.0.get(&key).copied())
    }

    /// The rule that the kernel finds for the listener of a backend.
    pub fn of_backend(&self, backend: &Backend) -> Option<ListenRule> {
        self.of(backend.netns, backend.address, backend.port)
    }

    /// The weight of a backend.
    pub fn weight_of(&self, backend: &Backend) -> u32 {
        let rule = self.of_backend(backend);
        rule.map_or(backend.weight, |rule| rule.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(
        name: &str,
        port: u16,
        address: Option<&str>,
        listen: &[(Option<&str>, u16)],
    ) -> ServicePlan {
        ServicePlan {
            name: name.into(),
            port,
            address: address.map(|text| text.parse().unwrap()),
            policy: Policy::LeastConnections,
            virtual_port: false,
            quota: Quota::Limited(5),
            rule: String::new(),
            keepalive: None,
            moving: MoveRule::Off,
            exempt: vec![
                "10.0.0.0/24".parse().unwrap(),
                "0.0.0.0/0".parse().unwrap(),
                "fd00::/8".parse().unwrap(),
            ],
            health: true,
            effect: Effect::On,
            listen: listen
                .iter()
                .map(|(address, port)| ListenAt {
                    address: address.map(|text| text.parse().unwrap()),
                    port: *port,
                    weight: 1,
                })
                .collect(),
        }
    }

    fn ip(text: &str) -> Address {
        Address::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn an_exact_address_is_announced_by_the_port() {
        let plan = Plan {
            services: vec![
                service("a", 11800, None, &[]),
                service("b", 11800, Some("10.0.0.9"), &[]),
            ],
            ..Plan::default()
        };
        let ports = plan.ports(&[3, 4], &[Quota::Limited(5), Quota::Limited(9)]);
        let any = ports[&PortKey::new(ANY_NETNS, Address::ANY, 11800)];
        assert_eq!(
            (any.service, any.flags, any.quota),
            (3, ServicePort::EXACT_ADDRESSES, 5)
        );
        let exact = ports[&PortKey::new(ANY_NETNS, ip("10.0.0.9"), 11800)];
        assert_eq!((exact.service, exact.quota), (4, 9));
        let reversed = Plan {
            services: plan.services.into_iter().rev().collect(),
            ..Plan::default()
        };
        assert_eq!(
            reversed.ports(&[4, 3], &[Quota::Limited(9), Quota::Limited(5)]),
            ports
        );
    }

    #[test]
    fn wildcard_listeners_belong_to_the_only_service_that_claims_their_port() {
        let backend = [(Some("127.0.0.1"), 21801)];
        let plan = Plan {
            services: vec![service("a", 11800, None, &backend)],
            netns: vec![7],
            any_netns: false,
        };
        let rules = plan.rules(&[0]);
        assert!(rules.of(7, Address::ANY, 21801).is_some());
        assert!(rules.of(7, ip("127.0.0.1"), 21801).is_some());
        assert!(rules.of(7, ip("127.0.0.2"), 21801).is_none());
        assert!(rules.of(8, ip("127.0.0.1"), 21801).is_none());
        let other = [(Some("127.0.0.2"), 21801)];
        let plan = Plan {
            services: vec![
                service("a", 1, None, &backend),
                service("b", 2, None, &other),
            ],
            ..plan
        };
        assert!(plan.rules(&[0, 1]).of(7, Address::ANY, 21801).is_none());
    }

    #[test]
    fn candidates_are_of_netns_that_nobody_named() {
        let plan = Plan {
            services: vec![service("a", 1, None, &[(None, 1)])],
            netns: vec![7],
            any_netns: true,
        };
        let rules = plan.rules(&[0]);
        assert_eq!(rules.of(7, Address::ANY, 1).unwrap().flags, 0);
        assert_eq!(
            rules.of(8, ip("1.2.3.4"), 1).unwrap().flags,
            ListenRule::CANDIDATE
        );
    }

    #[test]
    fn exempt_networks_keep_their_family() {
        let plan = Plan {
            services: vec![service("a", 1, None, &[])],
            ..Plan::default()
        };
        let bits: Vec<u32> = plan.exempt(&[0]).keys().map(|(bits, _)| *bits).collect();
        assert_eq!(bits, [32 + 8, 32 + 96, 32 + 96 + 24]);
    }
}
