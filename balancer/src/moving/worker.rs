//! The thread that moves connections: looks at each a few times a second, and takes the next step.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use balancer_common::abi::{BackendId, MAX_SLOTS, MovingSocket};
use balancer_common::http2::GOAWAY;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use tracing::debug;

use super::{Order, Outcome, Protocol, Report, Step, Unmovable, View, next_step};
use crate::dataplane::{MOST_WATCHED, MovingSockets};
use crate::discover::{SocketOwner, owned_by, owners};
use crate::sys::sock_diag::{self, Socket};
use crate::sys::{netns, socket};

/// Between two looks at a connection whose silence is waited for.
const PAUSE: Duration = Duration::from_millis(5);
/// Between two looks at one whose client was told.
const PAUSE_AFTER_TOLD: Duration = Duration::from_millis(200);
/// So many messages of whole frames are no chance.
const FRAMES_SEEN: u32 = 2;
/// So many messages without a whole frame are of another protocol, where none had one.
const OTHERS_SEEN: u32 = 8;

/// Moves what is ordered until nobody can order any more.
pub fn run(sockets: MovingSockets, orders: &Receiver<Order>, reports: &Sender<Report>) {
    let mut worker = Worker {
        sockets,
        protocols: HashMap::new(),
        moves: Vec::new(),
    };
    loop {
        let mut ordered = Vec::new();
        match worker.wait(orders) {
            Ok(order) => ordered.push(order),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        ordered.extend(orders.try_iter());
        for report in worker.begin(ordered).into_iter().chain(worker.go_on()) {
            if reports.send(report).is_err() {
                return;
            }
        }
    }
}

struct Worker {
    sockets: MovingSockets,
    /// What servers speak, as far as it was seen.
    protocols: HashMap<BackendId, Protocol>,
    moves: Vec<Move>,
}

/// A move that is under way.
struct Move {
    order: Order,
    owner: SocketOwner,
    began: Instant,
    /// The next look is not due before.
    due: Instant,
    watched: Option<Instant>,
    unwatched: Instant,
    was_watched: bool,
    told: Option<Instant>,
    hung_up: Option<Instant>,
    /// The step that the last look has led to.
    last: Step,
}

impl Worker {
    /// Waits for an order until the next look is due.
    fn wait(&self, orders: &Receiver<Order>) -> Result<Order, RecvTimeoutError> {
        let Some(due) = self.moves.iter().map(|one| one.due).min() else {
            return orders.recv().map_err(|_| RecvTimeoutError::Disconnected);
        };
        orders.recv_timeout(due.saturating_duration_since(Instant::now()))
    }

    /// Finds the processes that have the connections. Reports those that have none.
    fn begin(&mut self, ordered: Vec<Order>) -> Vec<Report> {
        if ordered.is_empty() {
            return Vec::new();
        }
        let found = find_owners(&ordered);
        let mut reports = Vec::new();
        for order in ordered {
            match found.get(&order.socket.inode) {
                Some(owner) => self.moves.push(Move::new(order, *owner)),
                None => reports.push(Report {
                    order,
                    outcome: Outcome::Stays(Unmovable::NoOwner),
                    took: Duration::ZERO,
                }),
            }
        }
        reports
    }

    /// Takes the next step of each move that is due; returns those that have ended.
    fn go_on(&mut self) -> Vec<Report> {
        let now = Instant::now();
        let mut reports = Vec::new();
        let mut moves = std::mem::take(&mut self.moves);
        moves.retain_mut(|one| {
            if one.due > now {
                return true;
            }
            let refused = |error| Some(Outcome::Stays(Unmovable::Refused(format!("{error:#}"))));
            let outcome = self.look(one, now).unwrap_or_else(refused);
            let Some(outcome) = outcome else {
                return true;
            };
            self.end(one);
            reports.push(one.report(outcome));
            false
        });
        self.moves = moves;
        reports
    }

    /// Looks at a connection and takes the next step; returns how the move has ended.
    fn look(&mut self, one: &mut Move, now: Instant) -> Result<Option<Outcome>> {
        // Each copy is closed within this call: while there is one, the server's close() sends no
        // FIN.
        let Some(copy) = one.copy() else {
            return Ok(Some(one.gone()));
        };
        let traffic = socket::traffic(&copy).context("cannot read what a connection does")?;
        if !traffic.established {
            return Ok(Some(one.gone()));
        }
        if one.watched.is_some() || one.last == Step::Wait && one.told.is_none() {
            self.note(one, &copy, now)?;
        }
        let view = one.view(self.protocol(&one.order), traffic, now);
        let step = next_step(&view);
        let confirmed = one.last == step;
        one.last = step.clone();
        one.due = now + one.pause();
        if step.is_final() && !confirmed {
            one.due = now + PAUSE;
            return Ok(None);
        }
        self.take(one, step, &copy, now)
    }

    fn take(
        &mut self,
        one: &mut Move,
        step: Step,
        copy: &OwnedFd,
        now: Instant,
    ) -> Result<Option<Outcome>> {
        let cookie = one.order.socket.cookie;
        match step {
            Step::Wait => {}
            Step::Watch { tell } => {
                if self.watched() < MOST_WATCHED as usize {
                    let tell = u32::from(tell);
                    let note = MovingSocket {
                        tell,
                        ..MovingSocket::default()
                    };
                    self.sockets.watch(cookie, copy, note)?;
                    one.watched = Some(now);
                }
            }
            Step::Unwatch => self.unwatch(one, now)?,
            Step::Tell => {
                if !tell(copy)? {
                    // Nobody could make sense of what comes after a part of a frame.
                    close(&one.order.socket, copy)?;
                    return Ok(Some(Outcome::Closed));
                }
                let told = MovingSocket {
                    told: 1,
                    ..MovingSocket::default()
                };
                self.sockets.set_note(copy, told)?;
                one.told = Some(now);
            }
            Step::HangUp => {
                shutdown(copy, Shutdown::Read).context("cannot end the receiving side")?;
                one.hung_up = Some(now);
            }
            Step::Close => {
                close(&one.order.socket, copy)?;
                return Ok(Some(Outcome::Closed));
            }
            Step::GiveUp(why) => return Ok(Some(Outcome::Stays(why))),
        }
        Ok(None)
    }

    /// Takes in what the kernel half has seen, or an earlier daemon has done.
    fn note(&mut self, one: &mut Move, copy: &OwnedFd, now: Instant) -> Result<()> {
        let Some(note) = self.sockets.note(copy)? else {
            return Ok(());
        };
        self.learn(one.order.backend, &note);
        if note.told != 0 {
            self.unwatch(one, now)?;
            one.told = Some(now);
        }
        Ok(())
    }

    fn learn(&mut self, backend: BackendId, note: &MovingSocket) {
        let seen = match (note.whole, note.messages) {
            (FRAMES_SEEN.., _) => Protocol::Http2,
            (0, OTHERS_SEEN..) => Protocol::Other,
            _ => return,
        };
        if self.protocols.len() >= 2 * MAX_SLOTS {
            self.protocols.clear();
        }
        let known = self.protocols.entry(backend).or_default();
        // What was seen once as frames stays: a connection in the middle of a long message shows
        // none.
        if *known != Protocol::Http2 {
            *known = seen;
        }
    }

    fn protocol(&self, order: &Order) -> Protocol {
        self.protocols
            .get(&order.backend)
            .copied()
            .unwrap_or_default()
    }

    fn watched(&self) -> usize {
        self.moves
            .iter()
            .filter(|one| one.watched.is_some())
            .count()
    }

    fn unwatch(&mut self, one: &mut Move, now: Instant) -> Result<()> {
        one.was_watched = true;
        one.unwatched = now;
        match one.watched.take() {
            Some(_) => self.sockets.unwatch(one.order.socket.cookie),
            None => Ok(()),
        }
    }

    fn end(&mut self, one: &mut Move) {
        if let Err(error) = self.unwatch(one, Instant::now()) {
            debug!("{error:#}");
        }
    }
}

impl Move {
    fn new(order: Order, owner: SocketOwner) -> Self {
        let now = Instant::now();
        Self {
            order,
            owner,
            began: now,
            due: now,
            watched: None,
            unwatched: now,
            was_watched: false,
            told: None,
            hung_up: None,
            last: Step::Wait,
        }
    }

    /// A copy of the server's descriptor; `None`: it has closed the connection.
    fn copy(&self) -> Option<OwnedFd> {
        let copy = self.owner.file().ok()?;
        let same = socket::cookie(&copy).is_ok_and(|cookie| cookie == self.order.socket.cookie);
        same.then_some(copy)
    }

    fn gone(&self) -> Outcome {
        match (self.told, self.hung_up) {
            (None, None) => Outcome::Gone,
            _ => Outcome::Left,
        }
    }

    fn view(&self, protocol: Protocol, traffic: socket::Traffic, now: Instant) -> View {
        let since = |at: Instant| now.saturating_duration_since(at);
        View {
            protocol,
            manner: self.order.manner,
            ordered: since(self.began),
            watched: self.watched.map(since),
            unwatched: since(self.unwatched),
            was_watched: self.was_watched,
            told: self.told.map(since),
            hung_up: self.hung_up.map(since),
            traffic,
        }
    }

    fn pause(&self) -> Duration {
        if self.told.is_some() || self.hung_up.is_some() {
            PAUSE_AFTER_TOLD
        } else {
            PAUSE
        }
    }

    fn report(&self, outcome: Outcome) -> Report {
        let took = self.began.elapsed();
        debug!(
            "{}: {outcome:?} after {:.1} s",
            self.order.socket.remote,
            took.as_secs_f64()
        );
        Report {
            order: self.order.clone(),
            outcome,
            took,
        }
    }
}

/// Writes a GOAWAY; false: a part of it. Nothing else waits to be sent, so that it goes as a whole.
fn tell(copy: &OwnedFd) -> Result<bool> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = send(copy, &GOAWAY, flags).context("cannot write to the client")?;
    Ok(sent == GOAWAY.len())
}

fn close(connection: &Socket, copy: &OwnedFd) -> Result<()> {
    let ended = socket::netns(copy)
        .and_then(|netns| netns::inside(&netns, || sock_diag::destroy(connection)))
        .and_then(|ended| ended);
    match ended {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context("cannot end a connection (CAP_NET_ADMIN, CONFIG_INET_DIAG_DESTROY)")
        }
        _ => Ok(()),
    }
}

/// The processes that have connections: most likely those that listen.
fn find_owners(ordered: &[Order]) -> HashMap<u32, SocketOwner> {
    let mut missing: HashSet<u32> = ordered.iter().map(|order| order.socket.inode).collect();
    let pids: HashSet<u32> = ordered.iter().map(|order| order.pid).collect();
    let mut found = HashMap::new();
    for pid in pids.into_iter().filter(|pid| *pid != 0) {
        found.extend(owned_by(pid, |inode| missing.contains(&inode)).unwrap_or_default());
    }
    missing.retain(|inode| *inode != 0 && !found.contains_key(inode));
    let others = owners(missing).unwrap_or_default();
    found.extend(
        others
            .into_iter()
            .filter_map(|(inode, all)| Some((inode, *all.first()?))),
    );
    found
}
