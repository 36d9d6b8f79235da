//! What is remembered of connections that were to move.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::batch::Batch;
use crate::moving::{Order, Outcome};

/// A connection that stays is not tried again before.
const RETRY: Duration = Duration::from_secs(60);
/// So many connections that were moved are remembered.
const MOST_REMEMBERED: usize = 1024;

/// What has become of connections that were to move.
#[derive(Default)]
pub struct History {
    /// Those that stay, by their cookies, since when, and why.
    staying: HashMap<u64, (Instant, String)>,
    /// Those that were moved, the last one first.
    moved: VecDeque<Moved>,
}

/// A connection that was moved.
struct Moved {
    client: SocketAddr,
    at: Instant,
    /// The backend that had it, as the log calls it.
    from: String,
    why: &'static str,
}

impl Moved {
    fn sentence(&self) -> String {
        let Self {
            client, from, why, ..
        } = self;
        let seconds = self.at.elapsed().as_secs();
        format!("{from}: the connection of {client} was moved {seconds} s ago: {why}")
    }
}

impl History {
    /// Notes what has become of a connection. Where it was moved, the moves it was one of say why.
    pub fn add(&mut self, order: &Order, outcome: &Outcome, batch: Option<&Batch>) {
        let now = Instant::now();
        if let Outcome::Stays(why) = outcome {
            let cookie = order.socket.cookie;
            self.staying.insert(cookie, (now, why.to_string()));
        } else if outcome.has_left() {
            self.moved.truncate(MOST_REMEMBERED - 1);
            self.moved.push_front(Moved {
                client: order.socket.remote,
                at: now,
                from: batch.map_or_else(String::new, |batch| batch.name.clone()),
                why: batch.map_or("", |batch| batch.cause.words()),
            });
        }
    }

    /// Forgets what is too long ago to matter.
    pub fn forget_old(&mut self) {
        self.staying.retain(|_, (since, _)| since.elapsed() < RETRY);
    }

    /// Whether a connection has stayed of late.
    pub fn has_stayed(&self, cookie: u64) -> bool {
        self.staying.contains_key(&cookie)
    }

    /// Since when a connection has stayed, and why.
    pub fn why_stays(&self, cookie: u64) -> Option<&(Instant, String)> {
        self.staying.get(&cookie)
    }

    /// A sentence about a connection that was moved; `None`: no such one is remembered.
    pub fn moved(&self, client: SocketAddr) -> Option<String> {
        let mut moved = self.moved.iter();
        let moved = moved.find(|moved| canonical(moved.client) == canonical(client));
        moved.map(Moved::sentence)
    }
}

/// An address as the other family of a dual-stack socket has it, too.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
