//! A cluster in which others have made ten times as much as is kept, served by an HTTP server that
//! makes up each page of its lists: a real API server would take hours to be told all of it.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::fixtures::{Balancer, Machine, long, patiently};

use super::fixture::{NODE, SYSTEM, cluster_status, labelled_as_oap, placing_config};
use crate::budget::{LONGEST_GAP, Pulse, peak_memory, processor_time};

/// Ten times the namespaces that the Services of one entry may fill.
const NAMESPACES: usize = 160;
const SERVICES_OF_NAMESPACE: usize = 256;
/// Ten times as many endpoints as one watch keeps, as many in a slice as there may be.
const SLICES: usize = 500;
const ENDPOINTS_OF_SLICE: usize = 1_000;
/// The pods that each Service selects.
const PODS: usize = 500;
/// Ten times as much text as is kept.
const REPORTS: usize = 200;

/// What there is of a resource.
struct Population {
    resource: &'static str,
    number: usize,
    /// The object with a number; in the namespace of the request, where it names one.
    make: fn(usize, Option<&str>) -> String,
}

const POPULATIONS: [Population; 4] = [
    Population {
        resource: "services",
        number: NAMESPACES * SERVICES_OF_NAMESPACE,
        make: service,
    },
    Population {
        resource: "endpointslices",
        number: SLICES,
        make: slice,
    },
    Population {
        resource: "pods",
        number: PODS,
        make: pod,
    },
    Population {
        resource: "configmaps",
        number: REPORTS,
        make: report,
    },
];

fn service(number: usize, _: Option<&str>) -> String {
    let namespace = number / SERVICES_OF_NAMESPACE;
    let service = json!({
        "metadata": {
            "namespace": format!("tenant-{namespace}"), "name": format!("s{number}"),
            "uid": format!("service-{number}"), "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "selector": {"app": format!("s{number}")},
            "ports": [{"name": "grpc", "port": 11800, "targetPort": 11800 + number % 64}],
        },
    });
    labelled_as_oap(service).to_string()
}

fn slice(number: usize, _: Option<&str>) -> String {
    let namespace = number % NAMESPACES;
    let service = namespace * SERVICES_OF_NAMESPACE + number / NAMESPACES;
    let endpoints = (0..ENDPOINTS_OF_SLICE).map(|pod| {
        json!({
            "addresses": [address(pod)], "conditions": {"ready": true}, "nodeName": node(pod),
            "targetRef": {
                "kind": "Pod", "namespace": format!("tenant-{namespace}"),
                "name": format!("pod-of-some-length-{pod}"), "uid": uid(&format!("tenant-{namespace}"), pod),
            },
        })
    });
    json!({
        "metadata": {
            "namespace": format!("tenant-{namespace}"), "name": format!("slice-{number}"),
            "labels": {"kubernetes.io/service-name": format!("s{service}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "grpc", "port": 11800, "protocol": "TCP"}],
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
    .to_string()
}

fn pod(number: usize, namespace: Option<&str>) -> String {
    let namespace = namespace.unwrap_or("tenant-0");
    json!({
        "metadata": {
            "namespace": namespace, "name": format!("pod-of-some-length-{number}"),
            "uid": uid(namespace, number),
        },
        "spec": {"nodeName": node(number), "containers": [{"name": "main", "image": "none"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address(number)}]},
    })
    .to_string()
}

/// They differ in their node alone.
fn report(number: usize, _: Option<&str>) -> String {
    static FIRST: OnceLock<String> = OnceLock::new();
    let first = FIRST.get_or_init(first_report);
    first.replace(OF_FIRST, &format!("far-{number}"))
}

const OF_FIRST: &str = "far-first";

fn first_report() -> String {
    let group = |n| {
        let service = json!({"namespace": "tenant-0", "name": format!("s{n}")});
        json!({"entry": "agents", "service": service, "port": 11800})
    };
    let backends = (0..1_024).map(|n| {
        json!({
            "group": group(n), "pod": {"namespace": "tenant-0", "name": format!("pod-of-some-length-{n}")},
            "uid": uid("tenant-0", n), "slot": n, "address": address(n), "state": "active",
            "established": 100, "exempt": 0, "pending": 0, "quota": null, "room": null, "health": null,
        })
    });
    let peaks = (0..1_024).map(|n| json!({"group": group(n), "connections": 9, "seconds_ago": 3}));
    let refused = (0..1_024).map(|n| {
        json!({
            "group": group(n), "source": address(n), "first_seconds_ago": 90, "last_seconds_ago": 1,
            "longest_pause_seconds": 30, "before_seconds_ago": null,
        })
    });
    let text = json!({
        "schema": 1, "node": OF_FIRST, "backends": backends.collect::<Vec<_>>(),
        "peaks": peaks.collect::<Vec<_>>(), "refused": refused.collect::<Vec<_>>(),
    });
    json!({
        "metadata": {
            "namespace": SYSTEM, "name": format!("balancer-{OF_FIRST}"),
            "resourceVersion": OF_FIRST,
            "labels": {"app.kubernetes.io/name": "balancer", "app.kubernetes.io/component": "publication"},
            "managedFields": [{"manager": "balancer", "operation": "Apply", "time": NOW}],
        },
        "data": {"publication.json": text.to_string()},
    })
    .to_string()
}

/// The time of the server, which has just taken the reports.
const NOW: &str = "2026-11-29T05:00:00Z";
const DATE: &str = "Sun, 29 Nov 2026 05:00:00 GMT";

fn address(number: usize) -> String {
    format!("10.244.{}.{}", number / 200, 1 + number % 200)
}

fn node(number: usize) -> String {
    format!("far-{}", number % REPORTS)
}

fn uid(namespace: &str, pod: usize) -> String {
    format!("11111111-2222-3333-{namespace}-{pod:012}")
}

/// The server, for as long as the process lives.
struct CrowdedApi {
    kubeconfig: TempDir,
    /// Bytes of the lists that it was asked for.
    listed: Arc<AtomicUsize>,
}

impl CrowdedApi {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let address = listener.local_addr().expect("it is bound");
        let listed = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&listed);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let listed = Arc::clone(&counts);
                thread::spawn(move || while answer(&stream, &listed).is_ok() {});
            }
        });
        let kubeconfig = TempDir::new().expect("a temporary directory can be made");
        fs::write(kubeconfig.path().join("config"), kubeconfig_for(address))
            .expect("the directory can be written");
        Self { kubeconfig, listed }
    }
}

fn kubeconfig_for(server: SocketAddr) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "crowd",
        "clusters": [{"name": "crowd", "cluster": {"server": format!("http://{server}")}}],
        "users": [{"name": "crowd", "user": {"token": "none"}}],
        "contexts": [{"name": "crowd", "context": {"cluster": "crowd", "user": "crowd"}}],
    })
    .to_string()
}

/// Answers the next request of a connection.
fn answer(stream: &TcpStream, listed: &AtomicUsize) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, uri) = words.next().zip(words.next()).context("no request")?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        if header.trim().is_empty() {
            break;
        }
        let (name, value) = header.split_once(':').unwrap_or_default();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse()?;
        }
    }
    std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    if query.contains("watch=true") {
        // It says nothing, for as long as somebody waits for it.
        send(stream, "200 OK", "Transfer-Encoding: chunked", "")?;
        reader.read_line(&mut String::new())?;
        anyhow::bail!("the watch has ended");
    }
    let (status, body) = match (method, population(path)) {
        ("GET", Some(population)) => {
            let body = page(population, path, query);
            listed.fetch_add(body.len(), Ordering::Relaxed);
            ("200 OK", body)
        }
        ("GET", None) => ("404 Not Found", missing().to_string()),
        _ => ("200 OK", written().to_string()),
    };
    let length = format!("Content-Length: {}", body.len());
    send(stream, status, &length, &body)
}

fn send(mut stream: &TcpStream, status: &str, header: &str, body: &str) -> Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nDate: {DATE}\r\n{header}\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    Ok(stream.write_all(body.as_bytes())?)
}

fn missing() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound", "message": "not found"})
}

fn written() -> Value {
    json!({"metadata": {"name": "x"}, "spec": {}, "status": {"allowed": true}})
}

fn population(path: &str) -> Option<&'static Population> {
    let resource = path.rsplit('/').next()?;
    POPULATIONS.iter().find(|one| one.resource == resource)
}

/// One page of a list.
fn page(population: &Population, path: &str, query: &str) -> String {
    let number = |key: &str| -> Option<usize> {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == key)?.1.parse().ok()
    };
    let mut parts = path.split('/').skip_while(|part| *part != "namespaces");
    let namespace = parts.nth(1);
    let first = number("continue").unwrap_or(0);
    let size = number("limit").unwrap_or(population.number);
    let end = population.number.min(first + size);
    let mut body = String::from("{\"metadata\":{\"resourceVersion\":\"5\"");
    if end < population.number {
        let _ = write!(body, ",\"continue\":\"{end}\"");
    }
    body += "},\"items\":[";
    for object in first..end {
        if object > first {
            body.push(',');
        }
        body += &(population.make)(object, namespace);
    }
    body + "]}"
}

/// Slices, Services, pods and node reports of others, all at once, when the daemon starts.
#[test]
fn ten_times_what_is_kept_of_a_cluster_leaves_heartbeat_and_memory_in_bounds() {
    Machine::with(|machine| {
        let api = CrowdedApi::start();
        let kubeconfig = api.kubeconfig.path().join("config");
        let kubeconfig = kubeconfig.to_str().expect("UTF-8").to_owned();
        let config = placing_config("{observed: 10m}");
        let mut balancer = Balancer::prepare(machine, &config).with_environment(&[
            ("KUBECONFIG", &kubeconfig),
            ("NODE_NAME", NODE),
            ("POD_NAME", "balancer-x"),
            ("POD_NAMESPACE", SYSTEM),
            ("NODE_IP", "10.89.0.11"),
        ]);
        balancer.launch();
        let pulse = Pulse::of(&balancer);
        let begun = Instant::now();
        let (gap, settled) = pulse.longest_gap(|| wait_until_listed(&balancer, &api));
        settled.expect("all of it is listed");
        let listed_after = begun.elapsed();
        let before = processor_time(&balancer);
        let pause = Duration::from_secs(if long() { 60 } else { 10 });
        thread::sleep(pause);
        let used = processor_time(&balancer).saturating_sub(before);
        let memory = peak_memory(&balancer);
        let megabytes = api.listed.load(Ordering::Relaxed) >> 20;
        println!(
            "{megabytes} MiB of lists in {listed_after:?}, {gap:?} without a heartbeat, at most \
             {memory} KiB, then {used:?} of processor time in {pause:?}"
        );
        assert!(gap < patiently(LONGEST_GAP), "{gap:?} without a heartbeat");
        assert!(memory < MOST_MEMORY, "{memory} KiB");
        let problems = cluster_status(&balancer)["problems"].to_string();
        assert!(problems.contains("more endpointslices"), "{problems}");
    });
}

/// In KiB: less than the 256 MiB that the chart lets the container have. Some 35 MiB of it are the
/// debug build itself.
const MOST_MEMORY: u64 = 224 << 10;

/// Waits until no list is asked for any more.
fn wait_until_listed(balancer: &Balancer, api: &CrowdedApi) -> Result<()> {
    let begun = Instant::now();
    let (mut before, mut since) = (0, Instant::now());
    while since.elapsed() < Duration::from_secs(8) {
        let now = api.listed.load(Ordering::Relaxed);
        if now != before {
            (before, since) = (now, Instant::now());
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(400),
            "it lists for ever: {}",
            balancer.logs()
        );
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(before > 0, "it has listed nothing: {}", balancer.logs());
    Ok(())
}
