//! What the daemon does alone on a host, and what it does in a Kubernetes cluster.

mod kubernetes;
mod standalone;

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use self::kubernetes::KubernetesMode;
pub use self::kubernetes::{UnfitMode, fuzzing, status_from_outside};
use self::standalone::StandaloneMode;
use super::attach::GuardedNetns;
use super::down::{self, Named};
use super::moves::Departures;
use super::rebalancing::BackendGroup;
use crate::config::{Config, Effect};
use crate::dataplane::{PlacingNotes, Plan, RefusedSource, SlotView, Writer};
use crate::kubernetes::ClusterStatus;
use crate::place::PlacePlan;

/// Where the daemon runs.
pub enum Mode {
    /// Alone on a host: the file lists the services.
    Standalone(StandaloneMode),
    /// On a node of a Kubernetes cluster.
    Kubernetes(Box<KubernetesMode>),
}

impl Mode {
    /// The mode that a configuration is for; in a cluster, with what the API server has told within
    /// a while.
    ///
    /// # Errors
    /// When it is not known where in which cluster this is.
    pub async fn start(config: &Config) -> Result<Self> {
        Ok(match &config.kubernetes {
            None => Self::Standalone(StandaloneMode::new(config)),
            Some(kubernetes) => {
                Self::Kubernetes(Box::new(KubernetesMode::start(kubernetes.clone()).await?))
            }
        })
    }

    /// Follows a new configuration.
    ///
    /// # Errors
    /// When it is for the other mode; then nothing changes.
    pub fn reconfigure(&mut self, config: &Config) -> Result<()> {
        match (self, &config.kubernetes) {
            (Self::Standalone(mode), None) => mode.reconfigure(config),
            (Self::Kubernetes(mode), Some(kubernetes)) => mode.reconfigure(kubernetes.clone()),
            _ => bail!(
                "a daemon does not become one of a cluster, or leave it, by a reload: restart it \
                 (TERM, then `balancer run`: nothing is lost meanwhile)"
            ),
        }
        Ok(())
    }

    /// Waits until something in the cluster has changed; for ever, where there is none. Cancel
    /// safe.
    pub async fn changed(&mut self) {
        match self {
            Self::Standalone(_) => std::future::pending().await,
            Self::Kubernetes(mode) => mode.changed().await,
        }
    }

    /// Takes in what is known of the cluster now.
    pub fn refresh(&mut self) {
        if let Self::Kubernetes(mode) = self {
            mode.refresh();
        }
    }

    /// Goes on with the services of an earlier daemon.
    ///
    /// # Errors
    /// When the services can't be read.
    pub fn resume(&mut self, writer: &Writer) -> Result<()> {
        match self {
            Self::Standalone(_) => Ok(()),
            Self::Kubernetes(mode) => mode.resume(writer),
        }
    }

    /// What the maps should hold by what is known now; `None`: that is not known yet.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn plan(&mut self, guarded: &GuardedNetns, writer: &Writer) -> Result<Option<Plan>> {
        match self {
            Self::Standalone(mode) => Ok(Some(mode.plan(guarded))),
            Self::Kubernetes(mode) => mode.plan(writer),
        }
    }

    /// Finds out whose listeners always get a slot, for an audit that looks everywhere.
    pub fn look_at_cgroups(&mut self, writer: &mut Writer) {
        if let Self::Kubernetes(mode) = self {
            mode.look_at_cgroups(writer);
        }
    }

    /// Finds the pods of the listeners that are there.
    ///
    /// # Errors
    /// When slots or network namespaces can't be read.
    pub fn find_pods(&mut self, guarded: &mut GuardedNetns, writer: &mut Writer) -> Result<()> {
        match self {
            Self::Standalone(_) => Ok(()),
            Self::Kubernetes(mode) => mode.find_pods(guarded, writer).map(drop),
        }
    }

    /// Attaches `steer` to the network namespaces of backends that it is not attached to yet.
    ///
    /// # Errors
    /// When slots or network namespaces can't be read.
    pub fn attach(&mut self, guarded: &mut GuardedNetns, writer: &mut Writer) -> Result<()> {
        let found = match self {
            Self::Standalone(_) => guarded.find_unguarded(writer, |_| true)?,
            Self::Kubernetes(mode) => mode.find_pods(guarded, writer)?,
        };
        guarded.attach_to(&found, writer);
        Ok(())
    }

    /// Computes quotas and puts them in force at the next SYN; in a cluster, also reports to the
    /// other daemons.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply_quotas(&mut self, guarded: &GuardedNetns, writer: &mut Writer) -> Result<()> {
        match self {
            Self::Standalone(mode) => mode.apply_quotas(guarded, writer),
            Self::Kubernetes(mode) => mode.apply_quotas(writer),
        }
    }

    /// The backends that are named and don't listen.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn down(&self, writer: &Writer) -> Result<BTreeSet<Named>> {
        match self {
            Self::Standalone(_) => down::of_file(writer),
            Self::Kubernetes(mode) => mode.down(writer),
        }
    }

    /// What this node should place where by what is known now; `None`: that is not known yet.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn place_plan(&mut self, writer: &Writer) -> Result<Option<PlacePlan>> {
        match self {
            Self::Standalone(mode) => Ok(Some(mode.place_plan())),
            Self::Kubernetes(mode) => mode.place_plan(writer),
        }
    }

    /// Notes refusals of a source on a port.
    pub fn on_refusals(&mut self, port: u16, refused: &RefusedSource) {
        if let Self::Kubernetes(mode) = self {
            mode.on_refusals(port, refused);
        }
    }

    /// Why no daemon will follow this one, which is told to end; `None`: one will, or it is not
    /// known.
    pub async fn none_follows(&self) -> Option<String> {
        match self {
            Self::Standalone(_) => None,
            Self::Kubernetes(mode) => mode.none_follows().await,
        }
    }

    /// Notes what of this node can't be guarded, a sentence each, for the report to the other
    /// daemons.
    pub fn note_unfit(&mut self, problems: &[String]) {
        if let Self::Kubernetes(mode) = self {
            mode.note_unfit(problems);
        }
    }

    /// The backends between which connections may be moved.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn backend_groups(&self, writer: &Writer, slots: &[SlotView]) -> Result<Vec<BackendGroup>> {
        match self {
            Self::Standalone(mode) => mode.backend_groups(writer, slots),
            Self::Kubernetes(mode) => Ok(mode.backend_groups(slots)),
        }
    }

    /// Notes how many connections of this node's backends are being moved, for the report to the
    /// other daemons.
    pub fn note_departures(&mut self, departures: Departures) {
        if let Self::Kubernetes(mode) = self {
            mode.note_departures(departures);
        }
    }

    /// What `status --cluster` shows; `effect` and `notes` say how this node places.
    ///
    /// # Errors
    /// When this is no cluster, or the slots can't be read.
    pub fn cluster_status(
        &self,
        writer: &Writer,
        effect: Effect,
        notes: PlacingNotes,
    ) -> Result<ClusterStatus> {
        match self {
            Self::Standalone(_) => bail!(
                "this daemon is not in a Kubernetes cluster: its configuration has no section \
                 `kubernetes`"
            ),
            Self::Kubernetes(mode) => mode.status(writer, effect, notes),
        }
    }
}
