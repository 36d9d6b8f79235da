//! How much a node report may say. A report that says more was not written by a daemon, or by one
//! that is out of its mind: it is not believed at all.

use std::fmt::Display;

use balancer_common::abi::MAX_SLOTS;

use super::model::{GroupId, NodeReport, ObjectName, Peak, RefusedSource, ReportedBackend};
use crate::config::MAX_CONNECTIONS;

/// The largest age in a report, in seconds: a year.
pub const MOST_SECONDS_AGO: u64 = 365 * 24 * 3600;
/// The most backends of a report: all that the kernel half has slots for.
const MOST_BACKENDS: usize = MAX_SLOTS;
/// The most peaks of a report: one for each group.
const MOST_PEAKS: usize = 1024;
/// The most refused sources of a report.
pub const MOST_REFUSED: usize = 1024;
/// The most bytes of the sentence that says why a node can't be guarded.
pub const MOST_UNFIT_BYTES: usize = 1000;
/// The largest index of a slot, in any layout.
const MOST_SLOT: u32 = u16::MAX as u32;
/// The most bytes of a name: the API server takes no longer ones.
const MOST_NAME_BYTES: usize = 253;

impl NodeReport {
    /// Whether everything in it is within its bounds.
    ///
    /// # Errors
    /// The field that is not, with its value and the bound.
    pub(crate) fn check(&self) -> Result<(), String> {
        name("node", &self.node)?;
        within("number of backends", self.backends.len(), MOST_BACKENDS)?;
        within("number of peaks", self.peaks.len(), MOST_PEAKS)?;
        within("number of refused", self.refused.len(), MOST_REFUSED)?;
        let unfit = self.unfit.as_ref().map_or(0, String::len);
        within("number of bytes of unfit", unfit, MOST_UNFIT_BYTES)?;
        each("backends", &self.backends, backend)?;
        each("peaks", &self.peaks, peak)?;
        each("refused", &self.refused, refused)
    }
}

fn each<T>(
    list: &str,
    items: &[T],
    check: impl Fn(&T) -> Result<(), String>,
) -> Result<(), String> {
    let mut checked = items.iter().map(check).enumerate();
    checked.try_for_each(|(index, checked)| checked.map_err(|why| format!("{list}[{index}].{why}")))
}

fn backend(backend: &ReportedBackend) -> Result<(), String> {
    group(&backend.group)?;
    object("pod", &backend.pod)?;
    name("uid", &backend.uid)?;
    name("state", &backend.state)?;
    within("slot", backend.slot, MOST_SLOT)?;
    within("established", backend.established, MAX_CONNECTIONS)?;
    within("exempt", backend.exempt, MAX_CONNECTIONS)?;
    within("pending", backend.pending.unwrap_or(0), MAX_CONNECTIONS)?;
    within("quota", backend.quota.unwrap_or(0), MAX_CONNECTIONS)?;
    within("room", backend.room.unwrap_or(0), MAX_CONNECTIONS)?;
    within("moving", backend.moving, MAX_CONNECTIONS)?;
    within("returning", backend.returning, MAX_CONNECTIONS)?;
    let Some(health) = &backend.health else {
        return Ok(());
    };
    name("health.state", &health.state)?;
    within("health.seconds", health.seconds, MOST_SECONDS_AGO)
}

fn peak(peak: &Peak) -> Result<(), String> {
    group(&peak.group)?;
    within("connections", peak.connections, MAX_CONNECTIONS.into())?;
    within("seconds_ago", peak.seconds_ago, MOST_SECONDS_AGO)
}

fn refused(refused: &RefusedSource) -> Result<(), String> {
    group(&refused.group)?;
    let RefusedSource {
        first_seconds_ago: first,
        last_seconds_ago: last,
        longest_pause_seconds: pause,
        before_seconds_ago: before,
        ..
    } = *refused;
    within("first_seconds_ago", first, MOST_SECONDS_AGO)?;
    within("last_seconds_ago", last, MOST_SECONDS_AGO)?;
    within("longest_pause_seconds", pause, MOST_SECONDS_AGO)?;
    within(
        "before_seconds_ago",
        before.unwrap_or_default(),
        MOST_SECONDS_AGO,
    )
}

fn group(group: &GroupId) -> Result<(), String> {
    name("group.entry", &group.entry)?;
    object("group.service", &group.service)
}

fn object(field: &str, object: &ObjectName) -> Result<(), String> {
    name(&format!("{field}.namespace"), &object.namespace)?;
    name(&format!("{field}.name"), &object.name)
}

fn name(field: &str, text: &str) -> Result<(), String> {
    if text.len() <= MOST_NAME_BYTES {
        return Ok(());
    }
    let bytes = text.len();
    Err(format!(
        "{field} has {bytes} bytes, at most {MOST_NAME_BYTES} are possible"
    ))
}

fn within<T: Copy + PartialOrd + Display>(field: &str, value: T, most: T) -> Result<(), String> {
    if value <= most {
        return Ok(());
    }
    Err(format!("{field} is {value}, at most {most} is possible"))
}
