//! Objects as JSON, for [`Kubectl::apply`](super::Kubectl::apply): also those that a kubelet or a
//! controller would write, where none runs.
//!
//! What a test needs to be different it changes in the JSON.

use serde_json::{Map, Value, json};

/// A namespace that lets privileged pods in.
pub fn namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
    })
}

/// A node that is ready.
pub fn node(name: &str) -> Value {
    let room = json!({"cpu": "4", "memory": "8Gi", "pods": "110"});
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {
            "capacity": room,
            "allocatable": room,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

/// A pod that runs on this node and is ready.
pub fn pod(namespace: &str, name: &str, node: &str, addresses: &[&str]) -> Value {
    let all: Vec<_> = addresses
        .iter()
        .map(|address| json!({"ip": address}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "nodeName": node,
            "containers": [{"name": "main", "image": "none"}],
            // Not the default: a node that does not answer would be waited for.
            "terminationGracePeriodSeconds": 30,
        },
        "status": {
            "phase": "Running",
            "podIP": addresses.first(),
            "podIPs": all,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

/// A service account.
pub fn service_account(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"namespace": namespace, "name": name},
    })
}

/// A Service with these ports, by name, that selects no pods: the test writes its
/// [`EndpointSlice`](endpoint_slice)s.
pub fn service(namespace: &str, name: &str, ports: &[(&str, u16)]) -> Value {
    let ports: Vec<_> = ports
        .iter()
        .map(|(name, port)| json!({"name": name, "port": port}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"ports": ports},
    })
}

/// The object with these labels besides those that it has.
///
/// # Panics
/// When it has no `metadata`.
#[must_use]
pub fn labelled(mut object: Value, labels: &[(&str, &str)]) -> Value {
    let metadata = object["metadata"]
        .as_object_mut()
        .expect("objects have metadata");
    let all = metadata
        .entry("labels")
        .or_insert_with(|| Map::new().into());
    for (name, value) in labels {
        all[*name] = json!(value);
    }
    object
}

/// A pod among the endpoints of a Service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The pod's address; the addresses of a slice are of one family.
    pub address: String,
    /// The pod's name.
    pub pod: String,
    /// The node that the pod runs on.
    pub node: String,
    /// Whether new connections may go to it.
    pub ready: bool,
    /// Whether the pod is being deleted.
    pub terminating: bool,
}

impl Endpoint {
    /// One that is ready.
    pub fn new(address: &str, pod: &str, node: &str) -> Self {
        Self {
            address: address.to_owned(),
            pod: pod.to_owned(),
            node: node.to_owned(),
            ready: true,
            terminating: false,
        }
    }

    /// This endpoint, not ready.
    #[must_use]
    pub fn unready(self) -> Self {
        Self {
            ready: false,
            ..self
        }
    }

    /// This endpoint while its pod is being deleted.
    #[must_use]
    pub fn terminating(self) -> Self {
        Self {
            ready: false,
            terminating: true,
            ..self
        }
    }
}

/// An `EndpointSlice` of the Service of that name, with these ports of the pods.
pub fn endpoint_slice(
    namespace: &str,
    name: &str,
    service: &str,
    ports: &[(&str, u16)],
    endpoints: &[Endpoint],
) -> Value {
    let six = endpoints
        .iter()
        .any(|endpoint| endpoint.address.contains(':'));
    let ports: Vec<_> = ports
        .iter()
        .map(|(name, port)| json!({"name": name, "port": port, "protocol": "TCP"}))
        .collect();
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|endpoint| {
            json!({
                "addresses": [endpoint.address],
                "nodeName": endpoint.node,
                "targetRef": {"kind": "Pod", "namespace": namespace, "name": endpoint.pod},
                "conditions": {
                    "ready": endpoint.ready,
                    "serving": endpoint.ready || endpoint.terminating,
                    "terminating": endpoint.terminating,
                },
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": namespace,
            "name": name,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if six { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": endpoints,
    })
}

/// Several objects, to be applied at once.
pub fn list(objects: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "items": objects})
}

/// A role for a whole cluster, and its binding to a service account, `(namespace, name)`; each rule
/// is `(API group, resource, verbs)`.
pub fn cluster_role(name: &str, account: (&str, &str), rules: &[(&str, &str, &[&str])]) -> Value {
    let rules: Vec<_> = rules
        .iter()
        .map(|(group, resource, verbs)| {
            json!({"apiGroups": [group], "resources": [resource], "verbs": verbs})
        })
        .collect();
    list(&[
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": name},
            "rules": rules,
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "namespace": account.0, "name": account.1}],
        }),
    ])
}
