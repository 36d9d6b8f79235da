//! What the API server of a Kubernetes cluster says, and what daemons tell each other through it.
//!
//! Nothing here knows of maps or netns: the daemon reads a [`View`] and hands in a [`NodeReport`].

mod access;
mod bounds;
mod client;
mod cluster;
mod daemon_set;
mod echo;
mod fleet;
mod health;
mod identity;
mod model;
mod own_node;
mod report_writer;
mod server_clock;
mod status;
mod successor;
mod survey;
#[cfg(test)]
mod tests;
mod watch;

pub use access::{permissions, reachable};
pub use bounds::{MOST_REFUSED, MOST_SECONDS_AGO, MOST_UNFIT_BYTES};
pub use client::{Connection, connection, connection_of_user};
pub use cluster::Cluster;
pub use health::{ApiRequest, Target};
pub use identity::Identity;
pub use model::{
    Demand, Endpoint, GroupId, NodeReport, ObjectName, Offered, Peak, ReceivedReport,
    RefusedSource, ReportedBackend, ReportedHealth, SCHEMA, STALE, ServicePort, Traffic, View,
};
pub use status::{
    BackendStatus, ClusterStatus, DaemonsStatus, GroupStatus, PlacedService, PlacingStatus,
    PodHealth, Restriction,
};
pub use survey::{Survey, SurveyedDaemon, SurveyedReport, installed_config, survey};
#[doc(hidden)]
pub use watch::{node_reports::parse_text as parse_report, slices::groups_beside_slice};
