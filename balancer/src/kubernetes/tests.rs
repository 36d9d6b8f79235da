//! The cluster against an API server that is a function.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use balancer_common::Policy;
use balancer_common::abi::Keepalive;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::StreamBody;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tower::BoxError;

use super::*;
use crate::config::{
    ClusterInput, ClusterQuota, ClusterService, Kubernetes, Match, PodClass, PortChoice,
    ServiceChoice,
};

/// The body of an answer.
type Frames = StreamBody<BoxStream<'static, io::Result<Frame<Bytes>>>>;

/// What the server does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    Well,
    /// It accepts no connection.
    Refuses,
    /// It answers 403 to all requests about this resource.
    Forbids(&'static str),
    /// It answers 401 to all requests.
    Disowns,
    /// It accepts requests and says nothing.
    Stalls,
    /// It ends watches with an error 410, once each.
    Forgets,
    /// It answers a watch with HTTP 410.
    IsGone,
}

/// The time that the server tells, whatever time it is.
const NOW: http::HeaderValue = http::HeaderValue::from_static("Sun, 29 Nov 2026 05:00:00 GMT");

/// A server with a few objects, by resource. Watches say nothing, and stay open until the server
/// behaves in another way.
struct Server {
    behaviour: Mutex<Behaviour>,
    objects: Mutex<BTreeMap<String, Vec<Value>>>,
    requests: Mutex<Vec<(Method, String)>>,
    /// What was written last.
    written: Mutex<Value>,
    changed: Notify,
}

impl Server {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            behaviour: Mutex::new(Behaviour::Well),
            objects: Mutex::default(),
            requests: Mutex::default(),
            written: Mutex::default(),
            changed: Notify::new(),
        })
    }

    fn put(&self, resource: &str, objects: Value) {
        let Value::Array(objects) = objects else {
            panic!("a list is expected")
        };
        self.objects
            .lock()
            .unwrap()
            .insert(resource.to_owned(), objects);
    }

    /// Behaves so from now on. Watches that are open end.
    fn set(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
        self.changed.notify_waiters();
    }

    /// Lists the object that was written last, from the next list on.
    fn publish_what_was_written(&self) {
        let mut written = self.written.lock().unwrap().clone();
        written["metadata"]["namespace"] = json!("balancer");
        written["metadata"]["resourceVersion"] = json!("9");
        self.put("configmaps", json!([written]));
        self.set(Behaviour::Well);
    }

    fn count(&self, method: &Method, part: &str) -> usize {
        let requests = self.requests.lock().unwrap();
        let same = |(m, uri): &&(Method, String)| m == method && uri.contains(part);
        requests.iter().filter(same).count()
    }

    async fn answer(self: Arc<Self>, request: Request<Body>) -> Result<Response<Frames>, BoxError> {
        let (method, uri) = (request.method().clone(), request.uri().to_string());
        self.requests
            .lock()
            .unwrap()
            .push((method.clone(), uri.clone()));
        let behaviour = *self.behaviour.lock().unwrap();
        let path = uri.split('?').next().unwrap_or_default();
        let resource = path
            .split('/')
            .find(|part| {
                [
                    "services",
                    "endpointslices",
                    "pods",
                    "configmaps",
                    "daemonsets",
                ]
                .contains(part)
            })
            .unwrap_or_default()
            .to_owned();
        let watches = uri.contains("watch=true");
        if method == Method::PATCH {
            let body = request.into_body().collect_bytes().await?;
            *self.written.lock().unwrap() = serde_json::from_slice(&body)?;
        }
        match behaviour {
            Behaviour::Refuses => return Err(io::Error::other("connection refused").into()),
            Behaviour::Stalls => std::future::pending().await,
            Behaviour::Forbids(what) if what == resource => {
                let message = format!(
                    "{resource} is forbidden: User \"system:serviceaccount:b:agent\" cannot"
                );
                return Ok(status(403, &message));
            }
            Behaviour::Disowns => return Ok(status(401, "Unauthorized")),
            Behaviour::IsGone if watches => return Ok(status(410, "too old")),
            _ => (),
        }
        if method == Method::POST || method == Method::PATCH {
            return Ok(ok(
                &json!({"metadata": {"name": "x"}, "spec": {}, "status": {"allowed": !path.contains("nothing")}}),
            ));
        }
        if method == Method::DELETE {
            return Ok(ok(&json!({"kind": "Status", "status": "Success"})));
        }
        if watches {
            return Ok(self.watch(behaviour));
        }
        let objects = self.objects.lock().unwrap();
        let items = objects.get(&resource).cloned().unwrap_or_default();
        if path.ends_with(&resource) {
            return Ok(ok(
                &json!({"metadata": {"resourceVersion": "5"}, "items": items}),
            ));
        }
        Ok(items.first().map_or_else(|| status(404, "not found"), ok))
    }

    fn watch(self: Arc<Self>, behaviour: Behaviour) -> Response<Frames> {
        let gone = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}});
        let first = (behaviour == Behaviour::Forgets).then(|| format!("{gone}\n"));
        let end = stream::once(async move {
            self.changed.notified().await;
            Err(io::ErrorKind::ConnectionReset.into())
        });
        respond(stream::iter(first.map(|line| Ok(Bytes::from(line)))).chain(end))
    }

    fn cluster(self: &Arc<Self>, config: &Kubernetes) -> Cluster {
        let connection = Connection {
            client: self.client(),
            server: "https://api".to_owned(),
        };
        Cluster::over(connection, config, identity())
    }

    fn client(self: &Arc<Self>) -> Client {
        let server = Arc::clone(self);
        let service = tower::service_fn(move |request| Arc::clone(&server).answer(request));
        Client::new(service, "default")
    }
}

fn ok(body: &Value) -> Response<Frames> {
    let text = Bytes::from(body.to_string());
    respond(stream::iter([Ok(text)]))
}

fn respond(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Response<Frames> {
    let frames = chunks.map(|chunk| chunk.map(Frame::data));
    let mut response = Response::new(StreamBody::new(frames.boxed()));
    response.headers_mut().insert(http::header::DATE, NOW);
    response
}

fn status(code: u16, message: &str) -> Response<Frames> {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message,
        "reason": match code { 401 => "Unauthorized", 403 => "Forbidden", 410 => "Expired", _ => "NotFound" }});
    let mut response = ok(&body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

fn identity() -> Identity {
    Identity {
        node: "node-a".to_owned(),
        pod: "balancer-x".to_owned(),
        namespace: "balancer".to_owned(),
        node_ips: vec!["192.0.2.1".parse().unwrap()],
    }
}

fn config() -> Kubernetes {
    let entry = |name: &str, port: &str| ClusterService {
        name: name.to_owned(),
        of: ServiceChoice::Selected {
            namespace: None,
            selectors: vec!["app=oap".to_owned()],
        },
        port: PortChoice::Name(port.to_owned()),
        matching: Match::Service,
        policy: Policy::LeastConnections,
        quota: ClusterQuota::Shared {
            input: ClusterInput::Pods(vec![PodClass {
                namespace: None,
                selector: "agent=java".to_owned(),
                connections: 2,
            }]),
            headroom_percent: 10,
            min_quota: 16,
        },
        exempt: Vec::new(),
        health: true,
        keepalive: Some(Keepalive::DEFAULT),
        moving: crate::config::MoveRule::Graceful,
        rebalance: true,
    };
    Kubernetes {
        services: vec![entry("agents", "grpc"), entry("als", "als")],
        publish_every: Duration::from_secs(2),
        hold_for: Duration::from_secs(300),
        place: true,
    }
}

fn pod(name: &str, owner: &str, weight: Option<&str>) -> Value {
    let annotations =
        weight.map_or_else(|| json!({}), |weight| json!({watch::pods::WEIGHT: weight}));
    json!({"metadata": {"name": name, "namespace": "sw", "uid": format!("uid-{name}"), "annotations": annotations,
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": owner, "name": "balancer", "uid": "o"}]},
        "spec": {"nodeName": "node-a", "containers": []},
        "status": {"podIPs": [{"ip": format!("10.0.0.{}", number(name))}]}})
}

/// The number behind a pod's name.
fn number(pod: &str) -> u8 {
    let (_, number) = pod.rsplit_once('-').unwrap_or(("", pod));
    number.parse().unwrap_or(99)
}

fn service(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "sw", "resourceVersion": "3"}, "spec": {"selector": {"app": "oap"},
        "ports": [{"name": "grpc", "port": 11800}, {"name": "als", "port": 11802}]}})
}

fn slice(service: &str, pods: &[&str]) -> Value {
    let endpoints = pods.iter().map(|pod| {
        json!({"addresses": [format!("10.0.0.{}", number(pod))], "nodeName": "node-a",
        "targetRef": {"kind": "Pod", "name": pod, "namespace": "sw", "uid": format!("uid-{pod}")}})
    });
    json!({"metadata": {"name": format!("{service}-1"), "namespace": "sw", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": "grpc", "port": 11800}, {"name": "als", "port": 11802}],
        "endpoints": endpoints.collect::<Vec<_>>()})
}

/// A server with one Service, two pods that serve and one of a Job.
fn populated() -> Arc<Server> {
    let server = Server::new();
    server.put("services", json!([service("oap")]));
    server.put(
        "endpointslices",
        json!([slice("oap", &["oap-0", "oap-1", "init"])]),
    );
    server.put(
        "pods",
        json!([
            pod("oap-0", "DaemonSet", Some("3")),
            pod("oap-1", "StatefulSet", Some("heavy")),
            pod("init", "Job", None)
        ]),
    );
    server.put("configmaps", json!([]));
    server.put(
        "daemonsets",
        json!([{"metadata": {"name": "balancer", "namespace": "balancer", "uid": "o"}}]),
    );
    server
}

/// Waits until the view is so, for a quarter of an hour of a clock that jumps at most.
async fn eventually(cluster: &mut Cluster, what: &str, is: impl Fn(&View) -> bool) -> View {
    for _ in 0..9000 {
        let view = cluster.view();
        if is(&view) {
            return view;
        }
        _ = tokio::time::timeout(Duration::from_millis(100), cluster.changed()).await;
    }
    panic!("not within 15 minutes: {what}: {:#?}", cluster.view())
}

fn group(entry: &str) -> GroupId {
    GroupId {
        entry: entry.to_owned(),
        service: ObjectName {
            namespace: "sw".to_owned(),
            name: "oap".to_owned(),
        },
        port: if entry == "als" { 11802 } else { 11800 },
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_listed_becomes_groups_and_entries_share_watches() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    assert!(!cluster.view().complete);
    let view = eventually(&mut cluster, "complete", |view| view.complete).await;
    assert_eq!(
        view.groups.keys().collect::<Vec<_>>(),
        [&group("agents"), &group("als")]
    );
    let pods = &view.groups[&group("agents")];
    let weights = pods
        .iter()
        .map(|pod| (pod.pod.name.as_str(), pod.weight))
        .collect::<Vec<_>>();
    assert_eq!(
        weights,
        [("oap-0", 3), ("oap-1", 1)],
        "not the pod of the Job"
    );
    assert_eq!(view.demands["agents"].words, "3 pods × 2");
    assert_eq!(view.problems.len(), 1, "{:?}", view.problems);
    assert!(
        view.problems[0].contains("pod sw/oap-1 is \"heavy\""),
        "{:?}",
        view.problems
    );
    // Who else has a daemon is only listed.
    for (resource, watches, lists) in [
        ("/services?", 1, 0),
        ("/endpointslices?", 1, 0),
        ("/pods?", 3, 1),
        ("/configmaps?", 1, 0),
        ("/daemonsets?", 0, 1),
        ("/nodes/", 0, 0),
    ] {
        assert_eq!(
            server.count(&Method::GET, resource),
            2 * watches + lists,
            "{resource}: a list and a watch each"
        );
    }
    // The endings of watches are no failures: nothing else is asked for at rest.
    let before = server.requests.lock().unwrap().len();
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(cluster.view().silent_for, Duration::ZERO);
    let after = server.requests.lock().unwrap().len();
    assert!(
        (24..=40).contains(&(after - before)),
        "{} requests in 5 minutes",
        after - before
    );
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_for_as_long_as_it_lasts() {
    let server = populated();
    server.set(Behaviour::Forbids("endpointslices"));
    let mut cluster = server.cluster(&config());
    let view = eventually(&mut cluster, "a problem", |view| {
        view.problems.iter().any(|problem| {
            problem.contains("may not list endpointslices.discovery.k8s.io in namespace sw")
        })
    })
    .await;
    assert!(!view.complete);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(cluster.view().silent_for >= Duration::from_secs(60));
    server.set(Behaviour::Well);
    let view = eventually(&mut cluster, "complete", |view| view.complete).await;
    eventually(&mut cluster, "no longer silent", |view| {
        view.silent_for.is_zero()
    })
    .await;
    assert_eq!(view.groups.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_outage_keeps_what_was_known_and_ends_with_a_new_list() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    let before = eventually(&mut cluster, "complete", |view| view.complete).await;
    server.set(Behaviour::Refuses);
    let view = eventually(&mut cluster, "silence", |view| {
        view.silent_for >= Duration::from_secs(30)
    })
    .await;
    assert!(view.complete);
    assert_eq!(view.groups, before.groups);
    assert!(!cluster.is_uninstalled(), "a failure is no uninstallation");
    let unreachable = view
        .problems
        .iter()
        .filter(|problem| problem.contains("does not answer"))
        .count();
    assert_eq!(
        unreachable, 1,
        "one sentence for all watches: {:?}",
        view.problems
    );
    // It comes back from a backup: fewer pods, lower versions.
    server.put("endpointslices", json!([slice("oap", &["oap-0"])]));
    server.set(Behaviour::Well);
    let view = eventually(&mut cluster, "the new list", |view| {
        view.groups[&group("als")].len() == 1
    })
    .await;
    assert!(view.complete);
    eventually(&mut cluster, "no longer silent", |view| {
        view.silent_for.is_zero()
            && !view
                .problems
                .iter()
                .any(|problem| problem.contains("does not answer"))
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn versions_that_are_gone_lead_to_a_new_list_and_are_no_problem() {
    for behaviour in [Behaviour::Forgets, Behaviour::IsGone] {
        let server = populated();
        server.set(behaviour);
        let mut cluster = server.cluster(&config());
        eventually(&mut cluster, "complete", |view| view.complete).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let is_list = |uri: &str| uri.contains("/services?") && !uri.contains("watch=true");
        let lists = server
            .requests
            .lock()
            .unwrap()
            .iter()
            .filter(|(_, uri)| is_list(uri))
            .count();
        let view = cluster.view();
        assert!(view.silent_for.is_zero(), "{behaviour:?}: {view:?}");
        assert!(
            (3..=20).contains(&lists),
            "{behaviour:?}: {lists} lists a minute"
        );
        server.put("endpointslices", json!([slice("oap", &["oap-0"])]));
        server.set(Behaviour::Well);
        eventually(&mut cluster, "the new list", |view| {
            view.groups[&group("als")].len() == 1
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_noticed() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "complete", |view| view.complete).await;
    *server.behaviour.lock().unwrap() = Behaviour::Stalls;
    let begun = tokio::time::Instant::now();
    eventually(&mut cluster, "silence", |view| !view.silent_for.is_zero()).await;
    assert!(
        begun.elapsed() < Duration::from_secs(100),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_service_that_appears_is_served_without_an_incomplete_view() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "complete", |view| view.complete).await;
    server.put("services", json!([service("oap"), service("oap2")]));
    server.put(
        "endpointslices",
        json!([slice("oap", &["oap-0"]), slice("oap2", &["oap-1"])]),
    );
    server.set(Behaviour::Well);
    for _ in 0..9000 {
        let view = cluster.view();
        assert!(view.complete);
        assert!(
            view.groups.contains_key(&group("agents")),
            "the old one is lost: {view:?}"
        );
        if view.groups.len() == 4 {
            return;
        }
        _ = tokio::time::timeout(Duration::from_millis(100), cluster.changed()).await;
    }
    panic!("no group of the new Service: {:?}", cluster.view());
}

#[tokio::test(start_paused = true)]
async fn a_reload_replaces_what_has_changed() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "complete", |view| view.complete).await;
    let lists = server.count(&Method::GET, "/services?");
    let mut other = config();
    other.services.truncate(1);
    other.services[0].quota = ClusterQuota::Unlimited;
    cluster.reconfigure(&other);
    let view = cluster.view();
    assert!(view.complete, "nothing new is needed");
    assert!(view.demands.is_empty());
    assert_eq!(view.groups.keys().collect::<Vec<_>>(), [&group("agents")]);
    other.services[0].of = ServiceChoice::Named {
        namespace: "sw".to_owned(),
        name: "absent".to_owned(),
    };
    server.put("services", json!([]));
    cluster.reconfigure(&other);
    assert!(!cluster.view().complete);
    let view = eventually(&mut cluster, "complete", |view| view.complete).await;
    assert!(view.groups.is_empty());
    assert!(
        view.problems
            .iter()
            .any(|problem| problem.contains("no Service sw/absent")),
        "{:?}",
        view.problems
    );
    assert!(server.count(&Method::GET, "/services?") > lists);
}

/// A cluster that has heard of its `DaemonSet`; its node and its namespace are there as well.
async fn at_home(server: &Arc<Server>) -> Cluster {
    server.put("", json!([{"metadata": {"name": "balancer"}}]));
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "complete", |view| view.complete).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!cluster.is_uninstalled());
    assert_eq!(cluster.none_follows().await, None);
    cluster
}

#[tokio::test(start_paused = true)]
async fn the_daemon_set_that_goes_dismisses_the_daemon() {
    let server = populated();
    let cluster = at_home(&server).await;
    server.put("daemonsets", json!([]));
    tokio::time::sleep(Duration::from_secs(361)).await;
    assert!(cluster.is_uninstalled(), "it is asked for now and then");
    server.set(Behaviour::Refuses);
    let why = cluster.none_follows().await.expect("it was told");
    assert!(why.contains("DaemonSet"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn who_is_told_to_end_asks_for_the_daemon_set() {
    let server = populated();
    let cluster = at_home(&server).await;
    server.put("daemonsets", json!([]));
    let why = cluster.none_follows().await.expect("it is gone");
    assert!(why.contains("DaemonSet"), "{why}");
    let deleted = json!({"name": "balancer", "deletionTimestamp": "2026-11-29T05:00:00Z"});
    server.put("daemonsets", json!([{"metadata": deleted}]));
    assert!(cluster.none_follows().await.is_some());
    server.set(Behaviour::Stalls);
    assert!(cluster.none_follows().await.is_some(), "it was told last");
}

#[tokio::test(start_paused = true)]
async fn permissions_that_go_first_are_no_reason_to_stay() {
    let server = populated();
    let cluster = at_home(&server).await;
    server.set(Behaviour::Forbids("daemonsets"));
    let begun = tokio::time::Instant::now();
    let forgets_the_token = async {
        tokio::time::sleep(Duration::from_secs(9)).await;
        server.set(Behaviour::Disowns);
    };
    let (why, ()) = tokio::join!(cluster.none_follows(), forgets_the_token);
    let why = why.expect("it is disowned");
    assert!(why.contains("no pod balancer/balancer-x"), "{why}");
    // An account that stays: who could ask before and can't any more.
    server.set(Behaviour::Forbids("daemonsets"));
    let why = cluster.none_follows().await.expect("nobody lets it ask");
    assert!(why.contains("permissions"), "{why}");
    assert!(begun.elapsed() < Duration::from_secs(25));
}

#[tokio::test(start_paused = true)]
async fn who_was_never_allowed_to_ask_leaves_everything_for_the_next() {
    let server = populated();
    server.put("", json!([{"metadata": {"name": "balancer"}}]));
    server.set(Behaviour::Forbids("daemonsets"));
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "a problem", |view| {
        let problems = view.problems.iter();
        problems
            .into_iter()
            .any(|problem| problem.contains("may not list daemonsets"))
    })
    .await;
    assert_eq!(cluster.none_follows().await, None);
}

#[tokio::test(start_paused = true)]
async fn reports_are_paced_renewed_and_taken_away() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "complete", |view| view.complete).await;
    let own = "/namespaces/balancer/configmaps/balancer-node-a";
    cluster.publish(NodeReport::default());
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(
        server.count(&Method::PATCH, own),
        0,
        "nothing is said by who has nothing to say"
    );
    assert_eq!(server.count(&Method::DELETE, own), 0);
    let report = |connections| NodeReport {
        schema: SCHEMA,
        node: "node-a".to_owned(),
        peaks: vec![Peak {
            group: group("agents"),
            connections,
            seconds_ago: 0,
        }],
        ..NodeReport::default()
    };
    for connections in 0..100 {
        cluster.publish(report(connections));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let written = server.count(&Method::PATCH, own);
    assert!(
        (5..=6).contains(&written),
        "{written} in ten seconds, one each two"
    );
    tokio::time::sleep(Duration::from_secs(121)).await;
    let renewed = server.count(&Method::PATCH, own) - written;
    assert!(
        (4..=5).contains(&renewed),
        "{renewed} in two minutes, one each 30 seconds"
    );
    cluster.publish(NodeReport::default());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(server.count(&Method::DELETE, own), 1);
    assert!(server.count(&Method::PATCH, "fieldManager=balancer") > 0);
    let owners = &server.written.lock().unwrap()["metadata"]["ownerReferences"];
    let pod =
        json!([{"apiVersion": "v1", "kind": "Pod", "name": "balancer-x", "uid": "uid-oap-0"}]);
    assert_eq!(*owners, pod, "the fake server tells of one pod alone");
}

#[tokio::test(start_paused = true)]
async fn what_others_wrote_is_received_with_its_age_or_told_to_be_garbage() {
    let server = populated();
    let map = |node: &str, text: &str| {
        json!({"metadata": {"name": format!("balancer-{node}"), "namespace": "balancer", "resourceVersion": "4",
            "managedFields": [{"manager": "balancer", "operation": "Apply", "time": "2026-11-29T04:59:20Z"}]},
            "data": {"publication.json": text}})
    };
    let report = json!({"schema": 1, "node": "node-b", "backends": [], "peaks": [], "refused": []});
    server.put(
        "configmaps",
        json!([map("node-b", &report.to_string()), map("node-c", "{]")]),
    );
    let mut cluster = server.cluster(&config());
    let view = eventually(&mut cluster, "complete", |view| view.complete).await;
    assert_eq!(view.nodes.keys().collect::<Vec<_>>(), ["node-b"]);
    let age = view.nodes["node-b"].age.as_secs();
    assert!((40..45).contains(&age), "it was there before, for {age} s");
    assert!(
        view.problems
            .iter()
            .any(|problem| problem.contains("balancer/balancer-node-c")),
        "{:?}",
        view.problems
    );
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(
        cluster.view().nodes["node-b"].age >= Duration::from_secs(100),
        "old ones stay in the view"
    );
    // A new list is no news of what has not changed.
    server.set(Behaviour::Well);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(cluster.view().nodes["node-b"].age >= Duration::from_secs(130));
    let abandoned = "node report balancer/balancer-node-b has not been renewed";
    let is_named = |view: &View| {
        view.problems
            .iter()
            .any(|problem| problem.contains(abandoned))
    };
    assert!(!is_named(&cluster.view()));
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(is_named(&cluster.view()), "{:?}", cluster.view().problems);
}

#[tokio::test(start_paused = true)]
async fn changes_are_told_together() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    let begun = tokio::time::Instant::now();
    let mut told = 0_u32;
    while tokio::time::timeout(Duration::from_secs(2), cluster.changed())
        .await
        .is_ok()
    {
        told += 1;
    }
    let tenths = u32::try_from(begun.elapsed().as_millis() / 100).unwrap();
    assert!(
        (1..=tenths).contains(&told),
        "{told} in {tenths} tenths of a second"
    );
}

#[tokio::test(start_paused = true)]
async fn missing_permissions_are_listed() {
    let server = populated();
    let connection = Connection {
        client: server.client(),
        server: "https://api".to_owned(),
    };
    assert_eq!(
        permissions(&connection, &config(), &identity())
            .await
            .unwrap(),
        []
    );
    server.set(Behaviour::Refuses);
    let error = permissions(&connection, &config(), &identity())
        .await
        .unwrap_err();
    assert!(format!("{error:#}").contains("https://api"), "{error:#}");
    server.set(Behaviour::Stalls);
    let error = reachable(&connection).await.unwrap_err();
    assert!(
        format!("{error:#}").contains("does not answer within 5 s"),
        "{error:#}"
    );
}

/// An object of the same name in another namespace.
fn of_tenant(mut object: Value) -> Value {
    object["metadata"]["namespace"] = json!("tenant");
    object
}

/// A cluster in which somebody made a Service like that of the OAPs in a namespace of their own,
/// with this endpoint in an `EndpointSlice`, and with this pod.
async fn with_tenant(endpoint: &Value, pod: Value) -> View {
    let server = populated();
    server.put(
        "services",
        json!([service("oap"), of_tenant(service("oap"))]),
    );
    let mut theirs = of_tenant(slice("oap", &[]));
    theirs["endpoints"] = json!([endpoint]);
    let ours = slice("oap", &["oap-0", "oap-1"]);
    server.put("endpointslices", json!([ours, theirs]));
    let pods = ["oap-0", "oap-1"].map(|name| self::pod(name, "StatefulSet", None));
    server.put("pods", json!([pods[0], pods[1], of_tenant(pod)]));
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "complete", |view| view.complete).await
}

fn tenants(view: &View) -> &[Endpoint] {
    let mut id = group("agents");
    id.service.namespace = "tenant".to_owned();
    &view.groups[&id]
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_is_a_pod_of_its_slices_own_namespace_with_its_uid_and_address() {
    let mine = || pod("mine-7", "StatefulSet", None);
    let honest = json!({"addresses": ["10.0.0.7"], "targetRef": {"kind": "Pod", "name": "mine-7", "uid": "uid-mine-7"}});
    let view = with_tenant(&honest, mine()).await;
    assert_eq!(tenants(&view).len(), 1, "{view:?}");
    assert_eq!(
        tenants(&view)[0].node.as_deref(),
        Some("node-a"),
        "the pod says where it is"
    );
    let elsewhere = json!({"addresses": ["10.0.0.0"],
        "targetRef": {"kind": "Pod", "name": "oap-0", "namespace": "sw", "uid": "uid-oap-0"}});
    let other_uid = json!({"addresses": ["10.0.0.7"],
        "targetRef": {"kind": "Pod", "name": "mine-7", "namespace": "tenant", "uid": "uid-oap-0"}});
    let no_pod = json!({"addresses": ["10.0.0.0"],
        "targetRef": {"kind": "Pod", "name": "none", "namespace": "tenant", "uid": "uid-none"}});
    for endpoint in [elsewhere, other_uid, no_pod] {
        let view = with_tenant(&endpoint, mine()).await;
        assert_eq!(tenants(&view), [], "{endpoint}");
        assert_eq!(view.groups[&group("agents")].len(), 2, "{endpoint}");
    }
    let address = json!({"addresses": ["10.0.0.0", "10.0.0.7"], "nodeName": "node-x",
        "targetRef": {"kind": "Pod", "name": "mine-7", "uid": "uid-mine-7"}});
    let view = with_tenant(&address, mine()).await;
    assert_eq!(
        tenants(&view)[0].addresses,
        ["10.0.0.7".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(tenants(&view)[0].node.as_deref(), Some("node-a"));
    let words = "10.0.0.0 for the pod tenant/mine-7";
    assert!(
        view.problems.iter().any(|problem| problem.contains(words)),
        "{:?}",
        view.problems
    );
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_two_namespaces_claim_is_neithers_and_named() {
    // As after a pod has ended whose address another one has got.
    let same = pod("mine-1", "StatefulSet", None);
    let endpoint = json!({"addresses": ["10.0.0.1"],
        "targetRef": {"kind": "Pod", "name": "mine-1", "namespace": "tenant", "uid": "uid-mine-1"}});
    let view = with_tenant(&endpoint, same).await;
    assert_eq!(tenants(&view), []);
    let ours = &view.groups[&group("agents")];
    assert_eq!(
        ours.iter()
            .map(|pod| pod.pod.name.as_str())
            .collect::<Vec<_>>(),
        ["oap-0"]
    );
    for words in ["10.0.0.1", "11800", "sw/oap", "tenant/oap"] {
        assert!(
            view.problems.iter().any(|problem| problem.contains(words)),
            "{words}: {:?}",
            view.problems
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_has_ended_has_no_address() {
    let mut over = pod("mine-1", "Job-less", None);
    over["status"]["phase"] = json!("Succeeded");
    let endpoint = json!({"addresses": ["10.0.0.1"],
        "targetRef": {"kind": "Pod", "name": "mine-1", "namespace": "tenant", "uid": "uid-mine-1"}});
    let view = with_tenant(&endpoint, over).await;
    assert_eq!(tenants(&view), []);
    assert_eq!(view.groups[&group("agents")].len(), 2);
}

#[tokio::test(start_paused = true)]
async fn of_many_services_of_a_namespace_the_oldest_are_followed() {
    let server = populated();
    let made = |index: u32| {
        let mut made = of_tenant(service(&format!("oap-{index}")));
        made["metadata"]["creationTimestamp"] =
            json!(format!("2026-01-01T00:{:02}:00Z", 59 - index % 60));
        made
    };
    let mut services: Vec<Value> = (0..60).map(made).collect();
    services.push(service("oap"));
    server.put("services", json!(services));
    let mut cluster = server.cluster(&config());
    let view = eventually(&mut cluster, "complete", |view| view.complete).await;
    let of_entry = view.groups.keys().filter(|id| id.entry == "agents");
    let names: Vec<_> = of_entry.map(|id| id.service.to_string()).collect();
    let oldest = (52..60).map(|index| format!("tenant/oap-{index}"));
    assert_eq!(
        names,
        ["sw/oap".to_owned()]
            .into_iter()
            .chain(oldest)
            .collect::<Vec<_>>()
    );
    let watches = server.count(&Method::GET, "/pods?");
    assert!(watches < 10, "{watches}: one watch for each selector");
    let words = "tenant has 60 Services";
    assert!(
        view.problems.iter().any(|problem| problem.contains(words)),
        "{:?}",
        view.problems
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_that_answers_with_old_data_is_noticed_by_ones_own_report() {
    let server = populated();
    let mut cluster = server.cluster(&config());
    eventually(&mut cluster, "complete", |view| view.complete).await;
    let report = NodeReport {
        schema: SCHEMA,
        node: "node-a".to_owned(),
        peaks: vec![Peak {
            group: group("agents"),
            connections: 7,
            seconds_ago: 0,
        }],
        ..NodeReport::default()
    };
    // It takes every write, answers every watch, and nothing of it comes back.
    cluster.publish(report);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let view = cluster.view();
    assert!(
        view.silent_for >= Duration::from_secs(50),
        "{:?}",
        view.silent_for
    );
    let words = "has not come back";
    assert!(
        view.problems.iter().any(|problem| problem.contains(words)),
        "{:?}",
        view.problems
    );
    server.publish_what_was_written();
    let view = eventually(&mut cluster, "no longer silent", |view| {
        view.silent_for.is_zero()
    })
    .await;
    assert!(
        !view.problems.iter().any(|problem| problem.contains(words)),
        "{:?}",
        view.problems
    );
    server.put("configmaps", json!([]));
    cluster.publish(NodeReport::default());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(
        cluster.view().silent_for.is_zero(),
        "who has nothing to say waits for nothing"
    );
}
