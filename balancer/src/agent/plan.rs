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
        rule: rule(&service.quota),
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

/// The quota rule in words.
fn rule(rule: &QuotaRule) -> String {
    match rule {
        QuotaRule::Unlimited => "none: unlimited".into(),
        QuotaRule::Fixed(quota) => format!("fixed: {quota} for each backend"),
        QuotaRule::Computed {
            clients,
            connections_per_client,
            headroom_percent,
            min_quota,
        } => format!(
            "computed: {} clients × {connections_per_client} + {headroom_percent}% over the ready backends, at least {min_quota}",
            clients.map_or_else(|| "unknown".to_owned(), |clients| clients.to_string()),
        ),
    }
}
