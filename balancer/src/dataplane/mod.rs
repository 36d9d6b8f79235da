//! The data plane as user space sees it: the only code that names aya or bpffs.
//!
//! [`open`] gives readers the pinned maps; [`Writer`] is the daemon's: it loads, attaches, adopts
//! and changes them.

mod audit;
mod cgroup;
pub mod down;
pub mod endpoints;
mod events;
mod frontends;
mod loader;
mod lock;
pub mod look;
mod moving;
mod notes;
mod object;
mod paths;
mod pins;
mod place_notes;
mod place_tables;
mod placing;
mod plain;
mod plan;
mod programs;
mod read;
mod refusals;
pub mod services;
pub mod slots;
mod tables;
mod writer;

pub use audit::Known;
pub use events::Events;
#[doc(hidden)]
pub use events::parse as parse_event;
pub use lock::{Lock, refused};
pub use moving::{MOST_WATCHED, MovingSockets};
pub use notes::{DaemonNotes, DaemonState, FailedReload};
pub use object::{open_detached, trial};
pub use paths::{Link, Paths};
pub use pins::unload;
pub use place_notes::PlacingNotes;
pub use placing::{Placing, has_frontends};
pub use plan::{ListenAt, Plan, ServicePlan};
pub use programs::{GOAWAY, Hook, PLACED_SOCKETS, PROGRAMS, Part, Program, Target};
pub use read::connect::{Client, ConnectExplanation};
pub use read::explain::{
    Answer, Avoided, Explanation, ListeningBackend, NetnsChoice, SeveralNetns, Syn, Unsuited,
};
pub use read::placing::{EndpointGroupSnapshot, EndpointSnapshot, PlacingContents};
pub use read::snapshot::{
    BackendHealth, BackendSnapshot, DaemonSnapshot, DownBackend, MapContents, ServerSnapshot,
    ServiceContents, ServiceSnapshot, Snapshot,
};
pub use read::{Reader, open};
pub use refusals::{RefusedSource, take as take_refusals};
pub use slots::SlotQuota;
pub use tables::{Pulse, SlotView};
pub use writer::{Found, Writer};
