//! Clients by the hundred.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use standin::{Attempt, Client, Ending};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

const WATCH_EVERY: Duration = Duration::from_millis(500);

/// What one client went through.
pub struct Arrival {
    /// None: nobody took it.
    pub client: Option<Client>,
    /// The client's connects, in order.
    pub attempts: Vec<Attempt>,
    /// From its first SYN until its first calls were answered, or until the last server had
    /// refused.
    pub took: Duration,
}

impl Arrival {
    /// From its first SYN until a connection stood, or until the last server had refused.
    pub fn connecting(&self) -> Duration {
        self.attempts.iter().map(|attempt| attempt.took).sum()
    }

    /// How long the first refusal took, if there was one.
    pub fn refusal(&self) -> Option<Duration> {
        self.attempts
            .iter()
            .find(|attempt| attempt.ending == Ending::Refused)
            .map(|attempt| attempt.took)
    }
}

/// `number` clients arrive, evenly over a time. Each connects to the first of its servers that
/// takes it, and makes both calls. While they do, `watch` is called twice a second.
///
/// # Panics
/// When a call fails on a connection that stands: a live connection is never to be touched.
pub async fn arrive(
    number: usize,
    over: Duration,
    servers: impl Fn(usize) -> Vec<SocketAddr>,
    mut watch: impl FnMut(),
) -> Vec<Arrival> {
    let mut arrivals = JoinSet::new();
    let count = u32::try_from(number.max(1)).expect("fewer clients than that");
    for index in 0..number {
        let wait = over / count * u32::try_from(index).expect("fewer clients than that");
        arrivals.spawn(one(format!("client-{index}"), servers(index), wait));
    }
    let mut tick = tokio::time::interval(WATCH_EVERY);
    // Looking takes time itself: after a late look the next one is not early.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await;
    let mut arrived = Vec::with_capacity(number);
    loop {
        tokio::select! {
            next = arrivals.join_next() => match next {
                Some(arrival) => arrived.push(arrival.expect("a client does not panic")),
                None => return arrived,
            },
            _ = tick.tick() => watch(),
        }
    }
}

/// Every client makes another call; returns how many of them did so on the connection that they
/// had.
pub async fn still_there(clients: &mut [Client]) -> usize {
    let mut there = 0;
    for client in clients {
        let before = client.attempts();
        if client.ping().await.is_ok() && client.attempts() == before {
            there += 1;
        }
    }
    there
}

async fn one(name: String, servers: Vec<SocketAddr>, wait: Duration) -> Arrival {
    tokio::time::sleep(wait).await;
    let began = Instant::now();
    let (mut client, attempts) = Client::connect(name, servers).await;
    if let Some(client) = &mut client {
        client.ping().await.expect("a unary call is answered");
        client
            .report(3)
            .await
            .expect("a stream of segments is answered");
    }
    Arrival {
        client,
        attempts,
        took: began.elapsed(),
    }
}
