//! Measurement 6: how evenly gRPC clients, and what they send, are spread when a server joins.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use standin::Client;
use testkit::fixtures::{Balancer, Machine, process};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::children::{Helper, Place};
use crate::interrupt;
use crate::peers::envoy::{Envoy, Layer};
use crate::peers::{FRONT, balancer_file, nft};
use crate::report::{Rows, Section};
use crate::serve;
use crate::settings::{POLICIES, Settings, processors};
use crate::statistics::{Dice, Summary, as_f64, max_over_mean, zipf};

/// Clients before the fourth server joins, and those that come then.
const CLIENTS: [usize; 2] = [180, 60];
const SERVERS: [u16; 2] = [3, 4];
/// Messages a second of all clients together.
const MESSAGES: f64 = 1_200.0;
/// Envoy has read its new list and checked the new server's health by then.
const NOTICED: Duration = Duration::from_millis(1500);

const SUBJECTS: [&str; 4] = ["service", "envoy-l4", "envoy-l7", "balancer"];

#[derive(Serialize)]
struct Row {
    subject: &'static str,
    servers: u16,
    /// Of the server's connections; with HTTP/2 proxies, those of the proxy.
    connections_max_over_mean: f64,
    connections_spread: f64,
    messages_max_over_mean: f64,
    messages_spread: f64,
    rounds: usize,
}

/// Largest over mean.
#[derive(Clone, Copy)]
struct Seen {
    connections: f64,
    messages: f64,
}

/// Measures.
///
/// # Errors
/// When a subject can't be started, or a call fails.
pub fn measure(settings: &Settings) -> Result<Section> {
    let rounds = settings.pick(1, 7);
    let window = settings.pick(Duration::from_secs(1), Duration::from_secs(4));
    let mut seen: [Vec<[Seen; 2]>; 4] = Default::default();
    for seed in 0..rounds {
        // The same clients for all.
        let rates = rates(seed);
        for (subject, seen) in SUBJECTS.into_iter().zip(&mut seen) {
            interrupt::check()?;
            seen.push(round(settings, subject, &rates, window).context(subject)?);
        }
    }
    let mut rows = Vec::new();
    for (subject, seen) in SUBJECTS.into_iter().zip(&seen) {
        for (phase, servers) in SERVERS.into_iter().enumerate() {
            rows.push(row(
                subject,
                servers,
                &seen.iter().map(|seen| seen[phase]).collect::<Vec<_>>(),
            ));
        }
    }
    rows.sort_by_key(|row| row.servers);
    Ok(section(&rows))
}

/// Messages a second of each client, in the order of their arrival: few send much, and nobody knows
/// when they come.
fn rates(seed: u64) -> Vec<f64> {
    let mut rates = zipf(CLIENTS.iter().sum());
    Dice::new(seed + 1).shuffle(&mut rates);
    rates.iter().map(|share| share * MESSAGES).collect()
}

/// What stands between clients and servers.
enum Subject<'a> {
    Service(&'a Machine),
    Envoy(Envoy),
    Balancer(Balancer<'a>),
}

impl<'a> Subject<'a> {
    fn start(
        settings: &Settings,
        machine: &'a Machine,
        name: &str,
        backends: &[SocketAddr],
    ) -> Result<Self> {
        Ok(match name {
            "service" => {
                nft::service(machine, FRONT, backends)?;
                Self::Service(machine)
            }
            "balancer" => {
                let file = balancer_file(POLICIES[0], SERVERS[1], None);
                let balancer = Balancer::start(machine, &file);
                balancer.wait_active(backends.len());
                Self::Balancer(balancer)
            }
            layer => {
                let layer = if layer == "envoy-l7" {
                    Layer::L7
                } else {
                    Layer::L4
                };
                let file = format!("evenness-{name}");
                let mut envoy = Envoy::start(settings, machine, &file, layer, backends)?;
                interrupt::pause(NOTICED)?;
                envoy.check()?;
                Self::Envoy(envoy)
            }
        })
    }

    /// These are its servers from now on.
    fn set(&self, backends: &[SocketAddr]) -> Result<()> {
        match self {
            Self::Service(machine) => nft::service(machine, FRONT, backends),
            Self::Envoy(envoy) => {
                envoy.set_backends(backends)?;
                interrupt::pause(NOTICED)
            }
            Self::Balancer(balancer) => {
                balancer.wait_active(backends.len());
                Ok(())
            }
        }
    }
}

fn round(settings: &Settings, name: &str, rates: &[f64], window: Duration) -> Result<[Seen; 2]> {
    let machine = Machine::new();
    let mut servers = Vec::new();
    start_servers(&machine, &mut servers, SERVERS[0])?;
    let subject = Subject::start(settings, &machine, name, &serve::backends(SERVERS[0]))?;
    let runtime = runtime(&machine)?;
    let mut clients = Vec::new();
    let mut phase = |servers: &mut Vec<Helper>, new: usize| -> Result<Seen> {
        for _ in 0..new {
            let rate = rates[clients.len()];
            clients.push((inside(&machine, &runtime, arrive(clients.len()))?, rate));
        }
        let connections = connections(&machine, servers)?;
        let before = calls(servers)?;
        clients = inside(
            &machine,
            &runtime,
            talk(std::mem::take(&mut clients), window),
        )?;
        let messages: Vec<_> = calls(servers)?
            .iter()
            .zip(&before)
            .map(|(after, before)| as_f64(after - before))
            .collect();
        Ok(Seen {
            connections: max_over_mean(&connections),
            messages: max_over_mean(&messages),
        })
    };
    let first = phase(&mut servers, CLIENTS[0])?;
    start_servers(&machine, &mut servers, SERVERS[1] - SERVERS[0])?;
    subject.set(&serve::backends(SERVERS[1]))?;
    let second = phase(&mut servers, CLIENTS[1])?;
    drop(runtime);
    Ok([first, second])
}

fn start_servers(machine: &Machine, servers: &mut Vec<Helper>, number: u16) -> Result<()> {
    for _ in 0..number {
        let index = servers.len();
        let address = serve::backends(SERVERS[1])[index].to_string();
        let arguments = ["serve-grpc", "--listen", &address];
        servers.push(Helper::start(Place::Inside(machine), arguments)?.0);
    }
    Ok(())
}

/// Its threads, and so the clients' connections, are in the machine's netns.
fn runtime(machine: &Machine) -> Result<Runtime> {
    let build = || {
        Builder::new_multi_thread()
            .worker_threads(processors())
            .enable_all()
            .build()
    };
    machine.netns.run(build).context("cannot start a runtime")
}

fn inside<T: Send>(
    machine: &Machine,
    runtime: &Runtime,
    work: impl Future<Output = Result<T>> + Send,
) -> Result<T> {
    machine.netns.run(|| runtime.block_on(work))
}

async fn arrive(number: usize) -> Result<Client> {
    let (client, attempts) = Client::connect(format!("client-{number}"), vec![FRONT]).await;
    let mut client =
        client.with_context(|| format!("client {number} was not let in: {attempts:?}"))?;
    client.ping().await.context("the first call")?;
    Ok(client)
}

/// All send at their own rate for so long.
async fn talk(clients: Vec<(Client, f64)>, window: Duration) -> Result<Vec<(Client, f64)>> {
    let (mut talks, mut dice) = (JoinSet::new(), Dice::new(0));
    for (number, (client, rate)) in clients.into_iter().enumerate() {
        let phase = dice.fraction();
        talks.spawn(async move { (number, talk_alone(client, rate, phase, window).await) });
    }
    let mut back: Vec<_> = talks.join_all().await;
    back.sort_by_key(|(number, _)| *number);
    back.into_iter().map(|(_, client)| client).collect()
}

/// One message at a time; the first after a part of the usual pause.
async fn talk_alone(
    mut client: Client,
    rate: f64,
    phase: f64,
    window: Duration,
) -> Result<(Client, f64)> {
    let (pause, began) = (Duration::from_secs_f64(1.0 / rate), Instant::now());
    let mut next = began + pause.mul_f64(phase);
    let attempts = client.attempts();
    while next < began + window {
        sleep_until(next).await;
        client.ping().await.context("a call")?;
        next += pause;
    }
    ensure!(
        client.attempts() == attempts,
        "a client lost its connection"
    );
    Ok((client, rate))
}

fn calls(servers: &mut [Helper]) -> Result<Vec<u64>> {
    servers
        .iter_mut()
        .map(|server| server.ask("calls"))
        .collect()
}

/// The connections that each server's process holds, by `ss`.
fn connections(machine: &Machine, servers: &[Helper]) -> Result<Vec<f64>> {
    let mut ss = Command::new("ss");
    ss.args(["--tcp", "--numeric", "--processes", "--no-header"]);
    ss.args(["state", "established"]);
    let output = machine.netns.run(|| process::output(&mut ss));
    let output = output.context("cannot start ss: run `cargo xtask setup`")?;
    ensure!(
        output.status.success(),
        "ss: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut counts: HashMap<u32, f64> = HashMap::new();
    for owner in String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(owner)
    {
        *counts.entry(owner).or_default() += 1.0;
    }
    let of = |server: &Helper| counts.get(&server.id()).copied().unwrap_or(0.0);
    Ok(servers.iter().map(of).collect())
}

/// The process in `users:(("bench",pid=4711,fd=9))`.
fn owner(row: &str) -> Option<u32> {
    row.split_once("pid=")?.1.split(',').next()?.parse().ok()
}

fn row(subject: &'static str, servers: u16, seen: &[Seen]) -> Row {
    let of = |value: fn(&Seen) -> f64| Summary::of(&seen.iter().map(value).collect::<Vec<_>>());
    let (connections, messages) = (of(|seen| seen.connections), of(|seen| seen.messages));
    Row {
        subject,
        servers,
        connections_max_over_mean: connections.median,
        connections_spread: connections.spread,
        messages_max_over_mean: messages.median,
        messages_spread: messages.spread,
        rounds: connections.rounds,
    }
}

fn section(rows: &[Row]) -> Section {
    let mut table = Rows::new(
        1,
        &[
            "subject",
            "servers",
            "connections, max/mean",
            "messages, max/mean",
        ],
    );
    for row in rows {
        table.add([
            row.subject.to_owned(),
            row.servers.to_string(),
            format!(
                "{:.3} ± {:.3}",
                row.connections_max_over_mean, row.connections_spread
            ),
            format!(
                "{:.3} ± {:.3}",
                row.messages_max_over_mean, row.messages_spread
            ),
        ]);
    }
    Section {
        key: "evenness",
        title: "Evenness of load",
        rows: json!(rows),
        table,
        goals: Vec::new(),
        chart: None,
    }
}
