//! The answers to the verbs that ask the daemon.

use std::path::Path;

use anyhow::Result;
use tracing::info;

use super::log_limit::BY_HAND;
use super::quotas::set_by_hand;
use super::reconcile::Daemon;
use crate::api::{Reply, Request, Response};

/// Answers a request to the daemon with this configuration file; true: everything is unloaded and
/// the daemon is to end.
pub fn answer(daemon: &mut Daemon, config: &Path, request: &Request, reply: Reply) -> bool {
    let done = |message| Response::Done { message };
    let response = match request {
        Request::SetQuota {
            service,
            slot,
            quota,
        } => set_quota(daemon, service, *slot, Some(*quota)).map(done),
        Request::ClearQuota { service, slot } => set_quota(daemon, service, *slot, None).map(done),
        Request::Rebalancing => Ok(done(daemon.rebalancing())),
        Request::Connection { client } => daemon.connection(*client).map(done),
        Request::Shed {
            backend,
            connections,
        } => by_hand(daemon.shed(backend, *connections as usize)).map(done),
        Request::Drain { backend } => by_hand(daemon.set_drained(backend, true)).map(done),
        Request::Undrain { backend } => by_hand(daemon.set_drained(backend, false)).map(done),
        Request::Reload => {
            (daemon.reload(config)).map(|()| done(format!("reloaded {}", config.display())))
        }
        // The answer must come after the deed, and the deed ends the daemon.
        Request::Unload => unload(daemon).map(done),
        Request::Ping => Ok(done("the daemon lives".into())),
        Request::Cluster => daemon.cluster_status().map(|status| {
            let cluster = Box::new(status);
            Response::Cluster { cluster }
        }),
    };
    let unloaded = matches!(request, Request::Unload) && response.is_ok();
    let response = response.unwrap_or_else(|error| Response::Failed {
        message: format!("{error:#}"),
    });
    match request {
        Request::Cluster => reply.send_long(&response),
        _ => reply.send(&response),
    }
    unloaded
}

fn unload(daemon: &Daemon) -> Result<String> {
    let left_open = daemon.writer.left_open();
    daemon.writer.loader.remove()?;
    let done = "the data plane is out of the kernel; the daemon ends".to_owned();
    Ok(match left_open {
        Some(left_open) => format!("{done}\n{left_open}"),
        None => done,
    })
}

/// Sets a quota by hand or, with `None`, clears it; in force when this returns.
fn set_quota(
    daemon: &mut Daemon,
    service: &str,
    slot: Option<u32>,
    quota: Option<u32>,
) -> Result<String> {
    let message = set_by_hand(&mut daemon.writer, service, slot, quota)?;
    daemon.apply_quotas_by_hand()?;
    by_hand(Ok(message))
}

/// Logs what was done by hand.
fn by_hand(done: Result<String>) -> Result<String> {
    if let Ok(message) = &done {
        info!(target: BY_HAND, "by hand: {message}");
    }
    done
}
