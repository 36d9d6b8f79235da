//! Established connections of a cluster are moved: to even out, and from a pod that is drained or
//! ends.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use testkit::fixtures::tcp::Listener;
use testkit::fixtures::{Balancer, eventually, remains};
use testkit::kubernetes::objects::Endpoint;

use super::fixture::{
    Cluster, OAPS, PORT, Pod, SETTLES_WITHIN, cluster_status, elsewhere, moving_config, own_report,
    with_cluster,
};
use super::placing::{cluster_ips, forward, in_place_of_kube_proxy, with_routes};
use crate::moving::{Client, Stop, answer, serve, taken_apart};

const QUOTA: &str = "{per_backend: 1000}";
/// How long evening out may take on a busy machine.
const EVENS_OUT_WITHIN: Duration = Duration::from_secs(200);
/// A client makes a call so often.
const EACH: Duration = Duration::from_millis(200);
/// A call that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// The calls of all clients.
#[derive(Debug, Default)]
struct Calls {
    answered: AtomicUsize,
    lost: AtomicUsize,
}

impl Calls {
    /// Nobody has lost a call, and they go on.
    #[track_caller]
    fn assert_none_lost(&self, balancer: &Balancer<'_>) {
        let answered = self.answered.load(Ordering::Relaxed);
        eventually(SETTLES_WITHIN, || {
            let now = self.answered.load(Ordering::Relaxed);
            ensure!(now > answered, "no call is answered any more: {now}");
            Ok(())
        });
        let lost = self.lost.load(Ordering::Relaxed);
        assert_eq!(lost, 0, "{self:?}\n{}", balancer.logs());
    }
}

/// Calls, and goes where it is told, as the clients of gRPC do.
fn call_on(to: SocketAddr, stop: &AtomicBool, calls: &Calls) {
    let mut client = Client::connect(to);
    while !stop.load(Ordering::Relaxed) {
        if call(&mut client, to, stop) {
            calls.answered.fetch_add(1, Ordering::Relaxed);
        } else if !stop.load(Ordering::Relaxed) {
            calls.lost.fetch_add(1, Ordering::Relaxed);
        }
        if client.ended.is_some() {
            client.connect_again(to, stop);
        }
        thread::sleep(EACH);
    }
}

/// Whether a call is answered. A client that was told before makes it on a new connection.
fn call(client: &mut Client, to: SocketAddr, stop: &AtomicBool) -> bool {
    client.read();
    if taken_apart(&client.bytes).goaways > 0 {
        client.connect_again(to, stop);
    }
    client.bytes.clear();
    let until = Instant::now() + PATIENCE;
    let mut open = client.stream.write_all(b"?").is_ok();
    while open && Instant::now() < until {
        open = client.read();
        if taken_apart(&client.bytes).pings > 0 {
            return true;
        }
    }
    false
}

/// Pods of this node whose servers answer, and a client beside them.
struct Place<'c> {
    cluster: &'c Cluster<'c>,
    client: Pod,
    frontend: SocketAddr,
    pods: Vec<Pod>,
    _kube_proxy: Listener,
}

impl<'c> Place<'c> {
    fn new(cluster: &'c Cluster<'c>, pods: u8) -> Self {
        let pods: Vec<Pod> = (5..)
            .take(pods.into())
            .map(|one| cluster.pod(one))
            .collect();
        forward(cluster);
        let client = cluster.pod(100);
        pods.iter().chain([&client]).for_each(with_routes);
        let frontend = SocketAddr::new(cluster_ips(cluster, "oap")[0], PORT);
        Self {
            cluster,
            client,
            frontend,
            pods,
            _kube_proxy: in_place_of_kube_proxy(cluster, frontend),
        }
    }

    /// Has the servers of the pods from this one on listen, and says that they are ready.
    fn begin<'s>(&'s self, from: usize, to: usize, scope: &'s Scope<'s, '_>, stop: &'s AtomicBool) {
        self.serve(to, |_, endpoint| endpoint);
        for pod in &self.pods[from..to] {
            let listen = || TcpListener::bind(("0.0.0.0", PORT)).expect("bind");
            serve(scope, self.cluster.in_pod(pod, listen), stop, answer);
        }
    }

    /// Says what the first pods are.
    fn serve(&self, number: usize, change: impl Fn(usize, Endpoint) -> Endpoint) {
        let pods = self.pods[..number].iter().enumerate();
        let endpoints = pods.map(|(index, pod)| change(index, pod.endpoint()));
        self.cluster.serve(&endpoints.collect::<Vec<_>>());
    }

    /// Clients that call until `stop`; waits until all are there.
    fn call<'s>(
        &'s self,
        number: usize,
        scope: &'s Scope<'s, '_>,
        stop: &'s AtomicBool,
        calls: &'s Calls,
        balancer: &Balancer<'_>,
    ) {
        eventually(SETTLES_WITHIN, || {
            let connect = || TcpStream::connect(self.frontend);
            let _stream = self.cluster.in_pod(&self.client, connect)?;
            let placing = balancer.status().placing;
            let endpoints = placing.iter().flat_map(|group| &group.endpoints);
            let placed: u64 = endpoints.map(|endpoint| endpoint.total).sum();
            ensure!(placed > 0, "nobody is placed: {placing:?}");
            Ok(())
        });
        balancer.wait_until(|service| service.established() == 0);
        for _ in 0..number {
            scope.spawn(|| {
                let call = || call_on(self.frontend, stop, calls);
                self.cluster.in_pod(&self.client, call);
            });
        }
        balancer.wait_until(|service| service.established() as usize == number);
    }

    /// The name of a pod, as verbs take it.
    fn name(&self, index: usize) -> String {
        format!("{OAPS}/{}", self.pods[index].name)
    }
}

/// What `status --cluster` says of a pod.
fn of_pod(balancer: &Balancer<'_>, pod: &Pod) -> anyhow::Result<Value> {
    let status = cluster_status(balancer);
    let backends = status["groups"][0]["backends"].as_array();
    let mut backends = backends.context("no group")?.iter();
    let found = backends.find(|one| one["pod"]["name"] == pod.name.as_str());
    Ok(found.context("no such pod")?.clone())
}

/// The connections of the pods.
fn held(balancer: &Balancer<'_>, pods: &[Pod]) -> anyhow::Result<Vec<u64>> {
    let of = |pod| {
        let told = of_pod(balancer, pod)?;
        let held = |key: &str| told[key].as_u64().context("not told yet");
        Ok(held("established")? - held("exempt")?)
    };
    pods.iter().map(of).collect()
}

fn are_even(held: &[u64]) -> bool {
    held.iter().max().unwrap_or(&0) - held.iter().min().unwrap_or(&0) <= 2
}

/// How many connections have left because they were moved.
fn moved(balancer: &Balancer<'_>) -> u64 {
    let service = balancer.service();
    let moves = service.backends.iter().map(|one| &one.moves);
    moves
        .map(|moves| moves.left + u64::from(moves.under_way))
        .sum()
}

/// Nobody moves while nothing is to move; a pod that joins is filled, and no call is lost.
#[test]
fn a_pod_that_joins_gets_its_share_of_what_is_established() {
    with_cluster(|cluster| {
        let place = Place::new(cluster, 4);
        let mut balancer = cluster.moving_balancer(QUOTA);
        let in_mode = |mode: &str| format!("{}mode: {mode}\n", moving_config(QUOTA));
        balancer.launch();
        let (stop, calls) = (AtomicBool::new(false), Calls::default());
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            place.begin(0, 3, scope, &stop);
            place.call(24, scope, &stop, &calls, &balancer);
            assert_eq!(moved(&balancer), 0, "{}", balancer.logs());

            balancer.configure(&in_mode("dry-run"));
            balancer.must(&["reload"]);
            place.begin(3, 4, scope, &stop);
            eventually(EVENS_OUT_WITHIN, || {
                let said = balancer.must(&["rebalance", "--dry-run"]);
                ensure!(said.contains("nothing moves. It would be:"), "{said}");
                ensure!(said.contains("sheds a connection: it holds "), "{said}");
                Ok(())
            });
            let off = moving_config(QUOTA).replace("quota:", "rebalance: off\n      quota:");
            balancer.configure(&off);
            balancer.must(&["reload"]);
            eventually(SETTLES_WITHIN, || {
                let said = balancer.must(&["rebalance"]);
                ensure!(said.contains("`rebalance: off`"), "{said}");
                Ok(())
            });
            remains(Duration::from_secs(3), || {
                let held = held(&balancer, &place.pods)?;
                ensure!(moved(&balancer) == 0 && held[3] == 0, "{held:?}");
                Ok(())
            });

            balancer.configure(&in_mode("on"));
            balancer.must(&["reload"]);
            eventually(EVENS_OUT_WITHIN, || {
                let held = held(&balancer, &place.pods)?;
                let said = balancer.must(&["rebalance"]);
                let all = held.iter().sum::<u64>() == 24;
                ensure!(
                    all && are_even(&held),
                    "{held:?}: {said}\n{}",
                    balancer.logs()
                );
                Ok(())
            });
            let moved = moved(&balancer);
            assert!((4..=12).contains(&moved), "{moved}\n{}", balancer.logs());
            calls.assert_none_lost(&balancer);
            let words = format!("{} (slot ", place.name(0));
            balancer.wait_for_log(&words, 0);
            balancer.wait_for_log("its share is", 0);
        });
    });
}

#[test]
fn a_drained_pod_gets_empty_and_nobody_is_placed_there_until_it_is_put_back() {
    with_cluster(|cluster| {
        let place = Place::new(cluster, 3);
        let mut balancer = cluster.moving_balancer("{clients: 18, headroom: 0%}");
        balancer.launch();
        let (stop, calls) = (AtomicBool::new(false), Calls::default());
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            place.begin(0, 3, scope, &stop);
            place.call(18, scope, &stop, &calls, &balancer);
            let said = balancer.must(&["drain", &place.name(1), "--timeout", "2m"]);
            assert!(said.ends_with("0 connections are left\n"), "{said}");
            eventually(SETTLES_WITHIN, || {
                let held = held(&balancer, &place.pods)?;
                ensure!(held[1] == 0 && held[0] + held[2] == 18, "{held:?}");
                ensure!(held[0].abs_diff(held[2]) <= 2, "{held:?}");
                let drained = of_pod(&balancer, &place.pods[1])?;
                ensure!(
                    drained["drained"] == true && drained["moving"] == 0,
                    "{drained}"
                );
                let own = own_report(cluster)?.to_string();
                ensure!(own.contains(r#"\"drained\":true"#), "{own}");
                // What it had is shared among the others.
                let quotas = of_pod(&balancer, &place.pods[0])?["quota"].clone();
                ensure!(quotas.as_u64() >= Some(9), "{quotas}");
                Ok(())
            });
            let text = balancer.must(&["status", "--cluster"]);
            assert!(text.contains("drained"), "{text}");
            calls.assert_none_lost(&balancer);
            balancer.wait_for_log("moving all", 0);

            balancer.must(&["undrain", &place.name(1)]);
            balancer.must(&["shed", &place.name(0), "3"]);
            eventually(SETTLES_WITHIN, || {
                let held = held(&balancer, &place.pods)?;
                ensure!(held[1] > 0 && held.iter().sum::<u64>() == 18, "{held:?}");
                Ok(())
            });
            calls.assert_none_lost(&balancer);
            let elsewhere = balancer.verb(&["drain", "skywalking/far-1"]);
            assert_eq!(elsewhere.code, 1);
            assert!(
                elsewhere.stderr.contains("no service has a pod"),
                "{elsewhere:?}"
            );
        });
    });
}

/// Its server says nothing: the kernel says it for it.
#[test]
fn a_pod_that_ends_is_emptied_before_and_no_call_is_lost() {
    with_cluster(|cluster| {
        let place = Place::new(cluster, 3);
        let mut balancer = cluster.moving_balancer(QUOTA);
        balancer.launch();
        let (stop, calls) = (AtomicBool::new(false), Calls::default());
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            place.begin(0, 3, scope, &stop);
            place.call(24, scope, &stop, &calls, &balancer);
            let began = Instant::now();
            place.serve(3, |index, endpoint| match index {
                2 => endpoint.terminating(),
                _ => endpoint,
            });
            eventually(SETTLES_WITHIN, || {
                let held = held(&balancer, &place.pods)?;
                ensure!(held[2] == 0 && held[0] + held[1] == 24, "{held:?}");
                ensure!(held[0].abs_diff(held[1]) <= 2, "{held:?}");
                Ok(())
            });
            println!("empty after {:?}", began.elapsed());
            calls.assert_none_lost(&balancer);
            let ending = format!("{} (slot ", place.name(2));
            balancer.wait_for_log(&ending, 0);
            balancer.wait_for_log("its pod is ending", 0);
            balancer.wait_for_log(": moved ", 0);

            // Nobody is left who could take them: they stay.
            let before = moved(&balancer);
            place.serve(3, |_, endpoint| endpoint.terminating());
            remains(Duration::from_secs(5), || {
                ensure!(moved(&balancer) <= before, "{}", balancer.logs());
                Ok(())
            });
        });
    });
}

/// A node says that its pod has nobody, whoever goes there.
#[test]
fn a_report_that_lies_moves_each_connection_once_and_then_none() {
    with_cluster(|cluster| {
        let place = Place::new(cluster, 1);
        let mut balancer = cluster.moving_balancer(QUOTA);
        balancer.configure(&moving_config(QUOTA).replace("place: on", "place: off"));
        balancer.launch();
        let (stop, calls) = (AtomicBool::new(false), Calls::default());
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            place.begin(0, 1, scope, &stop);
            let at = place.pods[0].at();
            for _ in 0..24 {
                let (client, stop, calls) = (&place.client, &stop, &calls);
                scope.spawn(move || cluster.in_pod(client, || call_on(at, stop, calls)));
            }
            balancer.wait_until(|service| service.established() == 24);
            cluster.serve(&[place.pods[0].endpoint(), elsewhere(1)]);
            let mut renewed = 0;
            eventually(EVENS_OUT_WITHIN, || {
                // What is written anew without a change is no renewal.
                renewed ^= 1;
                cluster.publish("node2", &[("far-1", renewed)]);
                thread::sleep(Duration::from_secs(2));
                let said = balancer.must(&["rebalance"]);
                let ends = ["came back to it", "were moved of late"];
                let ends = ends.iter().any(|words| said.contains(words));
                ensure!(ends, "{said}\n{}", balancer.logs());
                Ok(())
            });
            let moved = moved(&balancer);
            assert!((1..=24).contains(&moved), "{moved}\n{}", balancer.logs());
            // A number that no machine has is not believed, and nothing moves by what is unknown.
            cluster.publish("node2", &[("far-1", u32::MAX)]);
            eventually(SETTLES_WITHIN, || {
                let problems = cluster_status(&balancer)["problems"].to_string();
                ensure!(problems.contains("established is 4294967295"), "{problems}");
                let said = balancer.must(&["rebalance"]);
                ensure!(
                    said.contains("nothing was heard of skywalking/far-1"),
                    "{said}"
                );
                Ok(())
            });
            calls.assert_none_lost(&balancer);
        });
    });
}
