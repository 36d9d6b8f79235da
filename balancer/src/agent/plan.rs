//! From the configuration to what the maps should hold.

use crate::config::{Config, QuotaRule, Service};
use crate::dataplane::{ListenAt, Plan, ServicePlan};

use super::guard::Guarded;

/// The plan of a configuration.
pub fn of(config: &Config, guarded: &Guarded) -> Plan {
    Plan {
        services: config.services.iter().map(service).collect(),
        namespaces: guarded.named_cookies(),
        any_namespace: guarded.any(),
    }
}

fn service(service: &Service) -> ServicePlan {
    ServicePlan {
        name: service.name.clone(),
        port: service.port,
        address: service.address,
        policy: service.policy,
        virtual_port: service.backends.is_some(),
        quota: match service.quota {
            QuotaRule::Fixed(quota) => Some(quota),
            QuotaRule::Unlimited | QuotaRule::Computed { .. } => None,
        },
        rule: service.quota.to_string(),
        exempt: service.exempt.clone(),
        listen: listen(service),
    }
}

fn listen(service: &Service) -> Vec<ListenAt> {
    let own = || {
        vec![ListenAt {
            address: service.address,
            port: service.port,
            weight: 1,
        }]
    };
    service.backends.as_ref().map_or_else(own, |backends| {
        let at = |address: std::net::SocketAddr, weight| ListenAt {
            address: Some(address.ip()),
            port: address.port(),
            weight,
        };
        backends
            .iter()
            .map(|backend| at(backend.address, backend.weight))
            .collect()
    })
}
