//! Rebalancing, as a decision: which connections of this node's backends should be told to move
//! now, and why not more. Pure: the caller says what there is and what time it is.
//!
//! Each node plans for its own backends only, by the same rule and the same inputs as all others:
//! nobody leads. A backend sheds no more than what it holds above its own share, so that nodes
//! which plan at once from old counts don't shed more together than is too much.
//!
//! The caller asks once a second, in this order: [`Memory::note`], [`plan()`], and
//! [`Memory::told`] for each connection that was told to move indeed. Without the last it is a
//! dry run.
//!
//! Times are since some start that the caller keeps to.

mod by_load;
mod memory;
mod pick;
mod plan;
mod ramp;
mod sentence;
mod share;
#[cfg(test)]
#[expect(
    clippy::cast_precision_loss,
    reason = "the numbers of a simulation are small"
)]
#[expect(
    clippy::print_stdout,
    reason = "a test prints the tables of the documentation"
)]
mod simulation;
mod standing;
#[cfg(test)]
mod tests;

pub use memory::Memory;
pub use plan::plan;
pub use ramp::{WHOLE, bound_of_whole_connections, ramp};

use std::net::IpAddr;
use std::time::Duration;

use balancer_common::abi::HealthState;

/// For so long a backend must hold too much before anything moves.
pub const HOLD: Duration = Duration::from_secs(15);
/// Counts that are older are not acted upon. Nodes publish what has changed within seconds, and
/// what has not each 30 seconds.
pub const TOO_OLD: Duration = Duration::from_secs(40);
/// Nothing is acted upon after the other nodes have been silent for longer.
pub const UNHEARD: Duration = Duration::from_secs(10);
/// For so long after a change of the ready backends nothing moves, except from one that is drained.
pub const SETTLES: Duration = Duration::from_secs(30);
/// For so long a client that was told to move is expected to come back, and counts as a connection
/// of the group though nobody holds it.
pub const COMES_BACK: Duration = Duration::from_secs(15);
/// For so long a connection that came back is left where it is.
pub const COOLDOWN: Duration = Duration::from_secs(600);
/// A connection that is still open so long after it was told counts as held again.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// For so long it is not told again.
pub const UNMOVABLE_FOR: Duration = Duration::from_secs(3600);

/// An endpoint group: the backends that share the clients of a service.
#[derive(Clone, Debug)]
pub struct Group {
    /// Whether anything is to be moved: `rebalance`.
    pub is_on: bool,
    /// What is to be even.
    pub balance_by: BalanceBy,
    /// How long a new backend's share grows; 0: not at all.
    pub slow_start: Duration,
    /// Whether a client was refused for want of room within the last seconds.
    pub are_refused: bool,
    /// For how long nothing was heard of the other nodes that should have been.
    pub unheard_for: Duration,
    /// All backends: those that are not ready and hold nothing may be left out.
    pub backends: Vec<Backend>,
}

impl Group {
    /// The phase of a backend; `None`: there is none of that name.
    pub fn phase(&self, backend: &str) -> Option<Phase> {
        let mut backends = self.backends.iter();
        let backend = backends.find(|one| one.name == backend)?;
        Some(backend.phase)
    }

    /// Whether any backend is ready.
    pub fn has_ready(&self) -> bool {
        let mut backends = self.backends.iter();
        backends.any(|backend| backend.phase == Phase::Ready)
    }
}

/// What is to be even: `balance_by`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalanceBy {
    /// The number of connections.
    Connections,
    /// The bytes a second that they receive, while their numbers stay within a tenth of even.
    Bytes,
}

/// A backend of the group, and what is known of it.
#[derive(Clone, Debug)]
pub struct Backend {
    /// What makes it itself among the others: the pod's namespace, name and uid, or the address.
    pub name: String,
    /// Its share beside the others'.
    pub weight: u32,
    /// Whether it gets new connections.
    pub phase: Phase,
    /// Whether it takes what it gets.
    pub fitness: Fitness,
    /// The most connections that it may hold: its quota; `None`: as many as come.
    pub limit: Option<u64>,
    /// What it holds.
    pub counts: Counts,
}

/// Whether a backend gets new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is ready.
    Ready,
    /// It is not: what it holds stays.
    NotReady,
    /// Somebody drains it.
    Draining,
    /// It is about to end.
    Terminating,
}

impl Phase {
    /// Whether everything should move from it.
    pub const fn is_leaving(self) -> bool {
        matches!(self, Self::Draining | Self::Terminating)
    }
}

/// Whether a backend takes what it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fitness {
    /// It does.
    Serves,
    /// It accepts or reads nothing.
    Stalled,
    /// Its connections fail.
    Failing,
}

impl From<HealthState> for Fitness {
    fn from(state: HealthState) -> Self {
        match state {
            HealthState::Serving => Self::Serves,
            HealthState::Stalled | HealthState::Hung => Self::Stalled,
            HealthState::Failing => Self::Failing,
        }
    }
}

/// What a backend holds. Exempt connections don't count.
#[derive(Clone, Debug)]
pub enum Counts {
    /// A backend of this node.
    Own {
        /// Its established connections, counted now.
        established: u64,
        /// Each of them, as when they were last looked at: every 5 seconds will do, and each
        /// second while any is moving.
        connections: Vec<Connection>,
    },
    /// A backend of another node, as that node said.
    Published(Published),
}

/// What a node tells the others of a backend: [`Memory::published`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Its connections, without those that were told to move: these count as gone.
    pub held: u64,
    /// How many were told to move within [`COMES_BACK`], gone or not.
    pub moving: u64,
    /// Bytes a second that the held ones receive.
    pub load: u64,
    /// Bytes a second that the moving ones received.
    pub moving_load: u64,
    /// How long ago that was; [`Duration::MAX`]: it was never told.
    pub age: Duration,
}

/// A connection of a backend of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The socket's cookie.
    pub cookie: u64,
    /// Whose it is.
    pub client: IpAddr,
    /// When it was opened or first seen.
    pub opened: Duration,
    /// Bytes a second that it receives, smoothed over 30 seconds and more; of a younger one over
    /// its whole life. 0 where only the number matters.
    pub load: u64,
    /// Whether it may be told: it is not exempt, and there is a way to move it.
    pub is_movable: bool,
}

/// What to do about a backend of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The backend's name.
    pub backend: String,
    /// What to do about it.
    pub action: Action,
}

/// What to do about a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell these to move, by cookie: there is at least one.
    Shed {
        /// Which.
        cookies: Vec<u64>,
        /// Why, in words.
        why: Why,
    },
    /// Nothing now.
    Stay(Stay),
}

/// Why connections should move. [`std::fmt::Display`] makes it a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The backend is drained or ends.
    Leaves {
        /// What it still holds.
        held: u64,
        /// Whether its pod is ending by itself.
        terminating: bool,
    },
    /// It holds more connections than its share.
    Connections {
        /// What it holds.
        held: u64,
        /// What it should hold.
        share: u64,
    },
    /// Its connections receive more than its share.
    Load {
        /// Bytes a second that they receive.
        load: u64,
        /// Bytes a second that they should receive.
        share: u64,
        /// Who is expected to take the connection.
        taker: String,
    },
}

/// Why nothing moves. [`std::fmt::Display`] makes it a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stay {
    /// `rebalance: off`.
    Off,
    /// It holds no more than its share, or so little more that a move isn't worth it.
    Even {
        /// What it holds: connections, or bytes a second.
        held: u64,
        /// Its share of the same.
        share: u64,
    },
    /// It holds too much, but not for [`HOLD`] yet.
    NotLongEnough {
        /// For how long.
        uneven_for: Duration,
    },
    /// What is known of a backend is older than [`TOO_OLD`].
    InputsTooOld {
        /// Of which.
        backend: String,
        /// How old; `None`: nothing was ever heard.
        age: Option<Duration>,
    },
    /// Nothing was heard of the other nodes for longer than [`UNHEARD`].
    Unheard {
        /// For how long.
        unheard_for: Duration,
    },
    /// Somebody is refused for want of room.
    Refused,
    /// The ready backends have changed within [`SETTLES`].
    ReadySetChanged {
        /// How long ago.
        ago: Duration,
    },
    /// Nobody else has room: they are full, stalled, failing, or new and at their limit.
    NobodyTakes,
    /// Each that is left can't be moved, or was moved of late.
    NoneMovable {
        /// How many can't be moved, were told in vain, or are on their way.
        unmovable: u64,
        /// How many are in their cooldown.
        cooling: u64,
    },
    /// More would be faster than the rate.
    RateLimit,
    /// The connections that were moved came back to this backend.
    InVain {
        /// For how long nothing is tried.
        pause: Duration,
    },
    /// The connection that makes it uneven is larger than the gap to the one that would take it.
    Elephant {
        /// Whose it is.
        client: IpAddr,
        /// Bytes a second that it receives.
        load: u64,
        /// By how many bytes a second the other receives less.
        gap: u64,
    },
    /// No connection is of a size that evens it out.
    NoneFits,
}
