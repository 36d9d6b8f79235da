//! The data plane as user space sees it: the only code that names aya or bpffs.
//!
//! [`open`] gives readers the pinned maps; [`Writer`] is the daemon's: it loads, attaches, adopts and changes them.

mod adopt;
mod census;
mod events;
mod explain;
mod heritage;
mod load;
mod lock;
mod measure;
mod migrated;
mod paths;
mod pins;
mod plan;
mod rosters;
mod services;
mod slots;
mod snapshot;
mod tables;
mod truth;
mod wire;
mod writer;

pub use events::Events;
pub use explain::Explanation;
pub use load::trial;
pub use lock::{Held, Lock};
pub use measure::{Cost, ProgramCost, Stack, measure};
pub use paths::Paths;
pub use pins::unload;
pub use plan::{ListenAt, Plan, ServicePlan};
pub use slots::{QuotaSource, SlotQuota};
pub use snapshot::{
    AgentSnapshot, BackendSnapshot, Image, Reader, ServiceImage, ServiceSnapshot, Snapshot, open,
};
pub use tables::SlotView;
pub use writer::Writer;
