//! Alone on a host: the configuration lists the services.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use balancer_common::abi::{Address, BackendState};

use super::super::attach::GuardedNetns;
use super::super::moves::is_drained;
use super::super::quotas::{LoweringClocks, Server, explain, put_in_force};
use super::super::rebalancing::{BackendGroup, OwnBackend, matters, own_backend};
use crate::config::{Config, Connect, ConnectEndpoint, Effect, MoveRule, QuotaRule, Service};
use crate::dataplane::{ListenAt, Plan, ServicePlan, SlotView, Writer, services};
use crate::place::{EndpointPlan, GroupPlan, PlacePlan};
use crate::quota::{InForce, QuotaSource, compute, server};
use crate::rebalance::Phase;

/// The daemon's part alone on a host.
pub struct StandaloneMode {
    /// The services of the configuration in force.
    services: Vec<Service>,
    /// Where connects of this host go, by the configuration in force.
    connects: Vec<Connect>,
    /// This host's place among all that place without knowing of each other.
    rank: (u32, u32),
    /// The clocks of quotas that go down, by the name of the service.
    clocks: LoweringClocks<String>,
}

impl StandaloneMode {
    /// Starts with a configuration.
    pub fn new(config: &Config) -> Self {
        Self {
            services: config.services.clone(),
            connects: config.connects.clone(),
            rank: rank_by_lot(),
            clocks: LoweringClocks::default(),
        }
    }

    /// Follows a new configuration.
    pub fn reconfigure(&mut self, config: &Config) {
        self.services.clone_from(&config.services);
        self.connects.clone_from(&config.connects);
    }

    /// The plan of the configuration, for the network namespaces that are there.
    pub fn plan(&self, guarded: &GuardedNetns) -> Plan {
        Plan {
            services: self.services.iter().map(service_plan).collect(),
            netns: guarded.named_cookies(),
            any_netns: guarded.any(),
        }
    }

    /// Where connects of this host go.
    pub fn place_plan(&self) -> PlacePlan {
        let groups = self.connects.iter();
        PlacePlan {
            groups: groups.map(|one| group_plan(one, self.rank)).collect(),
            excluded_netns: BTreeMap::new(),
            dry_run: false,
        }
    }

    /// The services between whose backends connections may be moved.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn backend_groups(&self, writer: &Writer, slots: &[SlotView]) -> Result<Vec<BackendGroup>> {
        let moves = |service: &&Service| service.rebalance && service.moving != MoveRule::Off;
        let wanted: Vec<&Service> = self.services.iter().filter(moves).collect();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let ids = services::ids(&writer.tables)?;
        let of_service = |service: &&Service| {
            let id = *ids.get(&service.name)?;
            let slots = slots.iter().copied();
            let backends = slots.filter(|view| view.member.backend.service == id && matters(view));
            Some(backend_group(&service.name, &backends.collect::<Vec<_>>()))
        };
        Ok(wanted.iter().filter_map(of_service).collect())
    }

    /// Computes every service's quotas and puts them in force at the next SYN.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply_quotas(&mut self, guarded: &GuardedNetns, writer: &mut Writer) -> Result<()> {
        let ids = services::ids(&writer.tables)?;
        let slots = writer.tables.slots()?;
        self.clocks
            .retain(|name| self.services.iter().any(|service| service.name == *name));
        for service in &self.services {
            let Some(id) = ids.get(&service.name) else {
                continue;
            };
            let ready = slots
                .iter()
                .filter(|slot| slot.member.backend.service == *id)
                .filter(|slot| slot.slot_state().is(BackendState::Active))
                .filter(|slot| guarded.covers(slot.member.backend.netns))
                .map(|slot| (slot, writer.rules.weight_of(&slot.member.backend)));
            let mut servers = Server::group(ready, |slot| server_of(slot, service));
            // What it had is shared among the others.
            servers.retain(|server| !server.is_drained());
            let inputs: Vec<_> = servers.iter().map(Server::ready_backend).collect();
            let outcome = self.clocks.compute(&service.name, |waited| {
                compute(&service.quota, &inputs, waited)
            });
            let source = match service.quota {
                QuotaRule::Computed { .. } => QuotaSource::Computed,
                QuotaRule::Unlimited | QuotaRule::Fixed(_) => QuotaSource::Rule,
            };
            let shape = |server: &Server<'_>| (server.weight, server.count());
            let weights = server::weights(&servers.iter().map(shape).collect::<Vec<_>>());
            for ((server, weight), quota) in servers.iter().zip(weights).zip(outcome.quotas) {
                let rule = InForce { quota, source };
                put_in_force(writer, server, rule, weight, &outcome.sentence)?;
            }
            explain(writer, *id, &outcome.sentence)?;
        }
        Ok(())
    }
}

/// The backends of a service for the rule of evening out: all of them are of this host.
fn backend_group(service: &str, backends: &[SlotView]) -> BackendGroup {
    let backend = |view: &SlotView| {
        let phase = match view.slot_state().is(BackendState::Active) {
            false => Phase::NotReady,
            true if is_drained(view) => Phase::Draining,
            true => Phase::Ready,
        };
        own_backend(view.name(), view.member.weight(), phase, &[*view])
    };
    let own = backends.iter().map(|view| OwnBackend {
        name: view.name(),
        listeners: vec![*view],
    });
    let all = backends.iter().map(backend).collect();
    BackendGroup::new(service.to_owned(), all, own.collect())
}

/// What the listeners of one server have in common: the process, where they are, and on a virtual
/// port the address that the file lists. A process that is not known is one for each listener.
fn server_of(slot: &SlotView, service: &Service) -> (u64, u32, u16, Option<Address>) {
    let backend = &slot.member.backend;
    let listed = service.backends.is_some().then_some(backend.address);
    match backend.pid {
        0 => (backend.netns, slot.slot(), 0, None),
        pid => (backend.netns, pid, backend.port, listed),
    }
}

fn group_plan(connect: &Connect, rank: (u32, u32)) -> GroupPlan {
    GroupPlan {
        name: connect.name.clone(),
        frontends: connect.to.clone(),
        own_addresses: Vec::new(),
        endpoints: connect.endpoints.iter().map(endpoint_plan).collect(),
        rank,
        heard: None,
    }
}

fn endpoint_plan(endpoint: &ConnectEndpoint) -> EndpointPlan {
    let (v4, v6) = match endpoint.address.ip() {
        IpAddr::V4(v4) => (Some(v4), None),
        IpAddr::V6(v6) => (None, Some(v6)),
    };
    EndpointPlan {
        name: endpoint.address.to_string(),
        v4,
        v6,
        port: endpoint.address.port(),
        node: None,
        weight: endpoint.weight,
        published: None,
    }
}

/// Hosts know nothing of each other. Those with one client each must not all begin with the same
/// endpoint: each begins somewhere else, and keeps to it until it is started again, when its
/// connections are gone too.
fn rank_by_lot() -> (u32, u32) {
    let mut hasher = DefaultHasher::new();
    for file in ["boot_id", "../hostname"] {
        let path = Path::new("/proc/sys/kernel/random").join(file);
        fs::read(path).unwrap_or_default().hash(&mut hasher);
    }
    #[expect(clippy::cast_possible_truncation, reason = "half of a hash is one")]
    let lot = hasher.finish() as u32;
    (lot, GroupPlan::BY_LOT)
}

fn service_plan(service: &Service) -> ServicePlan {
    let listen = match &service.backends {
        None => vec![ListenAt {
            address: service.address,
            port: service.port,
            weight: 1,
        }],
        Some(backends) => backends
            .iter()
            .map(|backend| ListenAt {
                address: Some(backend.address.ip()),
                port: backend.address.port(),
                weight: backend.weight,
            })
            .collect(),
    };
    ServicePlan {
        name: service.name.clone(),
        port: service.port,
        address: service.address,
        policy: service.policy,
        virtual_port: service.backends.is_some(),
        quota: service.quota.uncomputed(),
        rule: service.quota.to_string(),
        exempt: service.exempt.clone(),
        health: service.health,
        keepalive: service.keepalive,
        moving: service.moving,
        listen,
        effect: Effect::On,
    }
}
