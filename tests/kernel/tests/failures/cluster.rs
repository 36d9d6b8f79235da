//! The pods of a cluster: each listens on its own port in a netns of its own and has a share of a
//! computed quota. A client takes one of their addresses by chance, as kube-proxy does.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::ensure;
use serde_json::Value;
use testkit::fixtures::{Balancer, eventually};
use testkit::kubernetes::objects;

use super::clients::{Client, Clients};
use super::server::Server;
use super::{ASKS_STATUS_EVERY, Failure, Outcome, play, state, status};
use crate::in_cluster::fixture::{
    Cluster, PORT, Pod, SETTLES_WITHIN, labelled_as_oap, with_cluster, with_route_back,
};

/// Where all pods listen, as `status` shows it.
const LISTENS: &str = "0.0.0.0:11800";
const FIRST_POD: u8 = 5;

/// Plays these failures side by side, each with a Service and pods of its own, under one daemon.
pub fn on_own_ports(failures: &[Failure], clients: usize) -> Vec<Outcome> {
    let outcomes = Mutex::new(Vec::new());
    with_cluster(|cluster| {
        cluster.machine.netns.ip("address add 10.98.0.1/16 dev lo");
        let mut numbers = FIRST_POD..;
        let groups: Vec<Vec<Pod>> = failures
            .iter()
            .map(|failure| {
                let numbers = numbers.by_ref().take(failure.servers);
                numbers.map(|number| cluster.pod(number)).collect()
            })
            .collect();
        for (number, pods) in groups.iter().enumerate() {
            make_group(cluster, &namespace(number), pods);
        }
        let mut balancer = cluster.balancer(&format!("{{clients: {clients}}}"));
        balancer.launch();
        let groups: Vec<_> = groups
            .iter()
            .enumerate()
            .map(|(number, pods)| (pods, start(cluster, &namespace(number), pods)))
            .collect();
        wait_for_quotas(
            &balancer,
            failures.iter().map(|failure| failure.servers).sum(),
        );
        let status = Recent::new(&balancer);
        let played = thread::scope(|scope| {
            let _over = Over(&status);
            scope.spawn(|| status.follow(&balancer));
            let cells: Vec<_> = failures
                .iter()
                .zip(groups)
                .enumerate()
                .map(|(number, (failure, (pods, servers)))| {
                    let status = &status;
                    scope.spawn(move || {
                        cluster.machine.netns.enter();
                        let clients = start_clients(number, clients, pods);
                        cell(failure, pods, servers, &clients, status)
                    })
                })
                .collect();
            cells
                .into_iter()
                .map(|cell| {
                    cell.join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        });
        *outcomes.lock().expect("no panic") = played;
    });
    outcomes.into_inner().expect("no panic")
}

/// A Service of a namespace of its own, with these pods.
fn make_group(cluster: &Cluster, namespace: &str, pods: &[Pod]) {
    let service = objects::service(namespace, "oap", &[("grpc", PORT)]);
    cluster.api.admin().apply(&objects::list(&[
        objects::namespace(namespace),
        labelled_as_oap(service),
    ]));
    let endpoints: Vec<_> = pods.iter().map(Pod::endpoint).collect();
    cluster.make_pods(namespace, &endpoints);
    cluster.write_slice(namespace, "oap", PORT, &endpoints);
}

fn namespace(group: usize) -> String {
    format!("failures-{group}")
}

fn start<'a>(cluster: &'a Cluster, namespace: &str, pods: &'a [Pod]) -> Vec<Server<'a>> {
    let listens = LISTENS.parse().expect("an address with a port");
    let start = |(number, pod): (usize, &Pod)| {
        with_route_back(pod);
        let namespace = namespace.to_owned();
        let server = cluster.in_pod(pod, || Server::start(listens));
        server.that_leaves_by(move || {
            let mut endpoints: Vec<_> = pods.iter().map(Pod::endpoint).collect();
            endpoints[number] = pods[number].endpoint().unready();
            cluster.write_slice(&namespace, "oap", PORT, &endpoints);
        })
    };
    pods.iter().enumerate().map(start).collect()
}

fn wait_for_quotas(balancer: &Balancer, pods: usize) {
    eventually(SETTLES_WITHIN, || {
        let services = balancer.status().services;
        let backends = services.iter().flat_map(|service| &service.backends);
        let limited = backends.filter(|backend| backend.quota.is_some()).count();
        ensure!(
            limited == pods,
            "{limited} of {pods} pods have a quota:\n{}",
            balancer.logs()
        );
        Ok(())
    });
}

fn start_clients(group: usize, clients: usize, pods: &[Pod]) -> Clients {
    let first = u32::from(Ipv4Addr::new(10, 98, 0, 1))
        + u32::try_from(group * 256).expect("a small number");
    let client = |number| Client {
        from: SocketAddr::new(Ipv4Addr::from(first + number).into(), 0),
        to: pods.iter().map(Pod::at).collect(),
    };
    let clients = u32::try_from(clients).expect("a small number");
    Clients::start((0..clients).map(client).collect())
}

fn cell(
    failure: &Failure,
    pods: &[Pod],
    mut servers: Vec<Server<'_>>,
    clients: &Clients,
    status: &Recent,
) -> Outcome {
    let cookie = |pod: &Pod| pod.netns.run(balancer::sys::netns::cookie);
    let backend = |pod: &Pod| {
        (
            cookie(pod).expect("a netns has a cookie"),
            pod.at().to_string(),
        )
    };
    let backends: Vec<_> = pods.iter().map(backend).collect();
    let outcome = play(failure, &mut servers, clients, || {
        let status = status.get();
        let backends = backends.iter();
        backends
            .map(|(netns, named)| state(&status, LISTENS, *netns, named))
            .collect()
    });
    Outcome {
        have_shares: true,
        ..outcome
    }
}

/// The status as it was a moment ago, for all cells.
struct Recent {
    last: Mutex<Value>,
    is_over: AtomicBool,
}

impl Recent {
    fn new(balancer: &Balancer) -> Self {
        Self {
            last: Mutex::new(status(balancer)),
            is_over: AtomicBool::new(false),
        }
    }

    /// Asks again and again.
    fn follow(&self, balancer: &Balancer) {
        while !self.is_over.load(Ordering::Relaxed) {
            let status = status(balancer);
            *self.last.lock().expect("no panic") = status;
            thread::sleep(ASKS_STATUS_EVERY);
        }
    }

    fn get(&self) -> Value {
        self.last.lock().expect("no panic").clone()
    }
}

/// Ends [`Recent::follow`] when it is dropped, also by a panic.
struct Over<'a>(&'a Recent);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}
