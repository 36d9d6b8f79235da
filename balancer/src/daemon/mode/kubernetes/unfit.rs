//! The part in its cluster of a daemon whose node can't be guarded: it tells the others so.

use anyhow::Result;

use super::group_quotas::GroupQuotas;
use super::{report, view};
use crate::config::Kubernetes;
use crate::kubernetes::{Cluster, ClusterStatus, Identity, MOST_UNFIT_BYTES, NodeReport, SCHEMA};

/// A daemon that only tells why its node can't be guarded.
pub struct UnfitMode {
    api: Cluster,
    own: NodeReport,
    why: String,
}

impl UnfitMode {
    /// Begins to watch the cluster, and to report `why`.
    ///
    /// # Errors
    /// When it is not known where in which cluster this is.
    pub fn start(config: &Kubernetes, why: &str) -> Result<Self> {
        let identity = Identity::from_env()?;
        let own = NodeReport {
            schema: SCHEMA,
            node: identity.node.clone(),
            unfit: Some(shortened(why)),
            ..NodeReport::default()
        };
        let api = Cluster::connect(config, identity)?;
        api.publish(own.clone());
        let why = shortened(why);
        Ok(Self { api, own, why })
    }

    /// Why the node can't be guarded, in a line.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// What `status --cluster` shows.
    pub fn status(&self) -> ClusterStatus {
        let why_not = Some("this node can't be guarded".to_owned());
        report::cluster_status(&view(&self.api), &self.own, &GroupQuotas::new(), why_not)
    }

    /// Why no daemon will follow this one; `None`: one will, or it is not known.
    pub async fn none_follows(&self) -> Option<String> {
        self.api.none_follows().await
    }
}

/// As much of the first line as a report takes: a log of the verifier may follow it.
pub fn shortened(why: &str) -> String {
    let line = why.lines().next().unwrap_or_default();
    let mut end = line.len().min(MOST_UNFIT_BYTES);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_line_within_the_bounds_of_a_report() {
        assert_eq!(shortened("it says:\na log"), "it says:");
        let long = "–".repeat(MOST_UNFIT_BYTES);
        assert_eq!(shortened(&long).len(), MOST_UNFIT_BYTES / 3 * 3);
    }
}
