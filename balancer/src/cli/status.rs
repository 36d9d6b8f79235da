//! `balancer status`

mod cluster;
mod json;
mod placing;
mod text;

use anyhow::{Context, Result};
use clap::Args;

pub(super) use self::{
    json::{Json, JsonEndpoint},
    text::{back_from_own, by_address, is_own_override, shared_quotas, text},
};
use super::{Place, in_runtime, output::Output};
use crate::daemon;
use crate::dataplane::DaemonNotes;
use crate::doctor;

/// Show services, backends, their connections and quotas, and how look-ups ended (changes nothing)
///
/// Reads the kernel's own counters, so it works without the daemon. ESTABLISHED is what the socket
/// table says, EXEMPT are those of them that are never refused and don't count against the quota,
/// PENDING are SYNs sent to it in the last 1.1 s that have not become established. A backend takes
/// a connection while ESTABLISHED - EXEMPT, plus the half-open connections that may still complete,
/// is below its QUOTA. Those are read from its listener at each SYN, so PENDING may differ from
/// them.
///
/// Where connects of this node are placed, there is a block for each endpoint group: PLACED are
/// connections of this node in ESTABLISHED, IN FLIGHT those whose SYN is not answered yet, OTHERS
/// those of other nodes by what was PUBLISHED last.
///
/// Lines with `!` say what is wrong. Those about listeners and addresses are about the network
/// namespace in which it is run; `balancer doctor` looks at all that are guarded.
///
/// Verdicts are look-ups, nearly always one for each new connection, but stray packets and other
/// programs look up sockets too.
///
/// In a Kubernetes cluster --cluster shows the backends of all nodes, as the daemon of this node
/// knows them: its own now, the others as their daemons told last.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer status
  balancer status --cluster
  watch -n1 balancer status
  balancer status -o json | jq '.services[].backends[] | {address, established, quota}'")]
pub(super) struct Status {
    /// The backends of all nodes of the Kubernetes cluster (asks the daemon of this node; where
    /// there is none, the API server of the kubeconfig)
    #[arg(long)]
    cluster: bool,
    /// The namespace of the cluster's balancer, where this machine is none of its nodes [default:
    /// the only one that there is]
    #[arg(long, value_name = "NAME", requires = "cluster")]
    namespace: Option<String>,
    #[command(flatten)]
    output: Output,
}

impl Status {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        if self.cluster {
            let report = if place.admin_socket.exists() {
                place.ask_for_cluster()?
            } else {
                in_runtime(daemon::status_from_outside(self.namespace.as_deref()))?
            };
            return self.output.show(&report, || cluster::text(&report));
        }
        let reader = place.reader()?;
        let mut snapshot = reader
            .snapshot()
            .context("can't read the balancer's maps")?;
        doctor::add_warnings(&mut snapshot, &reader, &place.state_dir)
            .context("can't compare the services with their listeners")?;
        let notes = DaemonNotes::read(&place.paths());
        self.output
            .show(&Json::new(&snapshot, &notes), || text(&snapshot, &notes))
    }
}
