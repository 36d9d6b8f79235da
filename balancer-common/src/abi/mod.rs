//! The layout of the pinned maps. A change of anything here is a new [`VERSION`].
//!
//! Words that both sides or several CPUs write are `u64`s with packed fields, read and written
//! atomically as one.

mod address;
mod backend;
mod counts;
mod daemon;
mod disowned;
mod events;
mod health;
mod keepalive;
mod limits;
pub mod maps;
mod moving;
mod place;
mod service;
mod ticks;

pub use address::*;
pub use backend::*;
pub use counts::*;
pub use daemon::*;
pub use disowned::*;
pub use events::*;
pub use health::*;
pub use keepalive::*;
pub use limits::*;
pub use moving::*;
pub use place::*;
pub use service::*;
pub use ticks::*;

/// The version of this layout; names the directory of the pins.
pub const VERSION: u32 = 9;

const _: () = {
    assert!(size_of::<PortKey>() == 32);
    assert!(size_of::<ServicePort>() == 8);
    assert!(size_of::<ListenRule>() == 8);
    assert!(size_of::<Backend>() == 72);
    assert!(size_of::<SlotPolicy>() == 32);
    assert!(size_of::<Counts>() == 48);
    assert!(size_of::<Health>() == 64);
    assert!(size_of::<Members>() == 128);
    assert!(size_of::<ServiceState>() == 40);
    assert!(size_of::<RefusedKey>() == 32);
    assert!(size_of::<Refusals>() == 32);
    assert!(size_of::<Totals>() == 8);
    assert!(size_of::<AuditTotals>() == 40);
    assert!(size_of::<Connection>() == 8);
    assert!(size_of::<ExemptKey>() == 20);
    assert!(size_of::<Heartbeat>() == 16);
    assert!(size_of::<Event>() == 48);
    assert!(size_of::<ServiceInfo>() == 484);
    assert!(size_of::<KeepaliveWord>() == 8);
    assert!(size_of::<Silence>() == 8);
    assert!(size_of::<Disowned>() == 8);
    assert!(size_of::<MovingSocket>() == 24);
    assert!(size_of::<SlotMoves>() == 24);
};
