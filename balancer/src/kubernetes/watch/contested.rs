//! Pods that several Kubernetes namespaces claim.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::kubernetes::health::Problems;
use crate::kubernetes::model::{Endpoint, GroupId};

/// Takes the endpoints out whose address and port Services of several namespaces claim: whose the
/// listener is can't be told, so it is counted, and nobody is refused there. Services of one
/// namespace may share pods.
pub(super) fn drop_contested(
    groups: &mut BTreeMap<GroupId, Vec<Endpoint>>,
    problems: &mut Problems,
) {
    let mut claims: BTreeMap<(IpAddr, u16), BTreeSet<&GroupId>> = BTreeMap::new();
    for (id, endpoints) in &*groups {
        for address in endpoints.iter().flat_map(|pod| &pod.addresses) {
            claims.entry((*address, id.port)).or_default().insert(id);
        }
    }
    claims.retain(|_, groups| {
        let namespaces = groups.iter().map(|id| &id.service.namespace);
        namespaces.collect::<BTreeSet<_>>().len() > 1
    });
    for ((address, port), groups) in &claims {
        problems.add(sentence(*address, *port, groups));
    }
    let contested: BTreeSet<(IpAddr, u16)> = claims.into_keys().collect();
    for (id, endpoints) in groups {
        let is_contested = |address: &IpAddr| contested.contains(&(*address, id.port));
        endpoints.retain(|pod| !pod.addresses.iter().any(is_contested));
    }
}

fn sentence(address: IpAddr, port: u16, groups: &BTreeSet<&GroupId>) -> String {
    let services: BTreeSet<String> = groups.iter().map(|id| id.service.to_string()).collect();
    let services: Vec<String> = services.into_iter().collect();
    format!(
        "the Services {} have each a pod at {address} port {port}: whose it is can't be told, so \
         connections there are counted, and nobody is refused. Pods of the node's own network must \
         have different ports",
        services.join(" and ")
    )
}
