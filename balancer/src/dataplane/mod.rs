//! The data plane as user space sees it: the only code that names aya or bpffs.
//!
//! [`open`] gives readers the pinned maps; [`Writer`] is the daemon's: it loads, attaches, adopts and changes them.

mod audit;
mod events;
mod lock;
mod measure;
mod paths;
mod pins;
mod plain;
mod plan;
mod programs;
mod read;
mod rosters;
mod services;
mod slots;
mod tables;
mod writer;

pub use events::Events;
pub use lock::{Held, Lock};
pub use measure::{Cost, ProgramCost, Stack, measure};
pub use paths::Paths;
pub use pins::unload;
pub use plan::{ListenAt, Plan, ServicePlan};
pub use programs::trial;
pub use read::explain::Explanation;
pub use read::snapshot::{
    BackendSnapshot, DaemonSnapshot, MapContents, Reader, ServiceContents, ServiceSnapshot,
    Snapshot, open,
};
pub use slots::{QuotaSource, SlotQuota};
pub use tables::SlotView;
pub use writer::Writer;
