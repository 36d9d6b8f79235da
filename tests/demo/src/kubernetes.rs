//! What the balancer is compared with: a Kubernetes Service.

use std::io::Write;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::process::{Command, Stdio};

use testkit::fixtures::Machine;

use crate::node;

/// The rule of a Service: a backend at random for each new connection, as kube-proxy writes it for
/// nftables. Gone when dropped.
pub struct KubernetesService<'a> {
    machine: &'a Machine,
}

impl<'a> KubernetesService<'a> {
    /// Sends connections to `address` to the OAPs with these numbers.
    ///
    /// # Panics
    /// With what nft said, when it fails.
    pub fn start(machine: &'a Machine, address: SocketAddr, oaps: RangeInclusive<u16>) -> Self {
        let oaps: Vec<_> = oaps.map(node::address).collect();
        Self::to(machine, address, &oaps)
    }

    /// Sends connections to `address` to these backends.
    ///
    /// # Panics
    /// With what nft said, when it fails.
    pub fn to(machine: &'a Machine, address: SocketAddr, backends: &[SocketAddr]) -> Self {
        let backends: Vec<_> = backends
            .iter()
            .enumerate()
            .map(|(index, oap)| format!("{index} : {} . {}", oap.ip(), oap.port()))
            .collect();
        let rule = format!(
            "ip daddr {} tcp dport {} dnat to numgen random mod {} map {{ {} }}",
            address.ip(),
            address.port(),
            backends.len(),
            backends.join(", ")
        );
        // -100 is "dstnat", a word that nft does not know at this hook.
        nft(
            machine,
            &format!(
                "table ip service {{ chain output {{\ntype nat hook output priority -100\n{rule}\n}}\n}}\n"
            ),
        );
        Self { machine }
    }
}

impl Drop for KubernetesService<'_> {
    fn drop(&mut self) {
        nft(self.machine, "delete table ip service");
    }
}

fn nft(machine: &Machine, script: &str) {
    let mut nft = Command::new("nft");
    nft.args(["--file", "-"]).stdin(Stdio::piped());
    let mut process = machine
        .netns
        .run(|| nft.spawn())
        .expect("`nft` of nftables can be started");
    let mut input = process.stdin.take().expect("its input is piped");
    input
        .write_all(script.as_bytes())
        .expect("nft reads its rules");
    drop(input);
    let status = process.wait().expect("nft can be waited for");
    assert!(status.success(), "nft refused: {script}; see above");
}
