//! A real Kubernetes for tests, in namespaces: its API server alone, where a test itself writes
//! what nodes would, or a cluster of nodes with containers.
//!
//! All its programs are one, `kubeall`, which `cargo xtask test` builds and names in the
//! environment. They end with the test, also when that is killed.
//!
//! ```no_run
//! use testkit::fixtures::Machine;
//! use testkit::kubernetes::{ApiServer, objects};
//!
//! Machine::with(|machine| {
//!     let api = ApiServer::start(&machine.netns);
//!     api.admin().apply(&objects::node("node1"));
//!     api.admin().apply(&objects::pod("default", "oap-0", "node1", &["10.244.1.5"]));
//! });
//! ```

mod api;
mod cluster;
pub mod images;
mod keeper;
mod kubectl;
pub mod objects;
mod pki;
mod run;

pub use api::{ApiServer, Program};
pub use cluster::Cluster;
pub use kubectl::Kubectl;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Once;

use tempfile::TempDir;

use crate::fixtures::{sweep_shared, unique_name};

/// What names `kubeall`.
const KUBEALL: &str = "BALANCER_KUBEALL";

/// `kubeall`, to be started as this program.
///
/// # Panics
/// When nobody says where it is.
#[track_caller]
fn program(name: &str) -> Command {
    let mut command = Command::new(kubeall());
    command.arg(name);
    command
}

#[track_caller]
fn kubeall() -> PathBuf {
    let path = std::env::var_os(KUBEALL).map(PathBuf::from);
    let found = path.filter(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "this test needs a Kubernetes, and {KUBEALL} names none: start it with `cargo xtask test`, which builds one"
        )
    })
}

/// A directory for data and logs. Those of test processes that were killed are removed first.
fn directory() -> TempDir {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| sweep_shared(&std::env::temp_dir()));
    let made = tempfile::Builder::new()
        .prefix(&format!("{}-", unique_name()))
        .tempdir();
    made.expect("a temporary directory can be made")
}
