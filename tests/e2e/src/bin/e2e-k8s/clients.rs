//! The clients, in pods and outside of the cluster, and what they have seen.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use standin::{self, Tally};
use testkit::fixtures::{binary, process};

use crate::cluster::TestCluster;
use crate::layout::{ANSWERS, OUTSIDE, PORT, SERVICE, WORKLOADS};
use crate::oaps::text;

/// All clients.
pub struct Clients {
    pods: Vec<Pod>,
    outside: Option<Outside>,
}

struct Pod {
    node: String,
    address: SocketAddr,
}

/// What clients had seen at some moment.
pub struct Mark {
    since: u64,
    before: Tally,
}

impl Clients {
    /// Those in pods, which must run.
    ///
    /// # Errors
    /// When one does not.
    pub fn in_pods(cluster: &TestCluster) -> Result<Self> {
        let list = cluster.get(&["pods", "-n", WORKLOADS, "-l", "agent=java"])?;
        let pods = list["items"].as_array().context("a list has items")?;
        let stay = pods
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let pods = stay.map(|pod| {
            Ok(Pod {
                node: text(&pod["spec"]["nodeName"])?,
                address: format!("{}:{ANSWERS}", text(&pod["status"]["podIP"])?).parse()?,
            })
        });
        Ok(Self {
            pods: pods.collect::<Result<_>>()?,
            outside: None,
        })
    }

    /// How many pods there are.
    pub const fn pods(&self) -> usize {
        self.pods.len()
    }

    /// Starts those outside.
    ///
    /// # Errors
    /// When the program can't be started.
    pub fn start_outside(&mut self, cluster: &TestCluster) -> Result<()> {
        self.outside = Some(Outside::start(cluster)?);
        Ok(())
    }

    /// Ends those outside.
    pub fn end_outside(&mut self) {
        self.outside = None;
    }

    /// Forgets those on a node.
    pub fn forget(&mut self, node: &str) {
        self.pods.retain(|pod| pod.node != node);
    }

    /// What all have seen.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn tally(&self, cluster: &TestCluster) -> Result<Tally> {
        self.ask(cluster, "tell")
    }

    /// Tells all to close their connections and open new ones within a time.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn reconnect(&self, cluster: &TestCluster, within: Duration) -> Result<()> {
        self.ask(cluster, &format!("reconnect {}", within.as_millis()))
            .map(drop)
    }

    /// What they have seen until now.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn mark(&self, cluster: &TestCluster) -> Result<Mark> {
        Ok(Mark {
            since: standin::now(),
            before: self.tally(cluster)?,
        })
    }

    fn ask(&self, cluster: &TestCluster, question: &str) -> Result<Tally> {
        let mut all = Tally::default();
        let outside = self.outside.iter().map(|_| Outside::answers());
        let addresses: Vec<_> = self
            .pods
            .iter()
            .map(|pod| pod.address)
            .chain(outside)
            .collect();
        cluster.kubernetes.outside().run(|| {
            for address in addresses {
                let tally = standin::ask(address, question)
                    .with_context(|| format!("the clients at {address} do not answer"))?;
                all.add(&tally);
            }
            Ok(all)
        })
    }
}

impl Mark {
    /// Connections that were lost since.
    pub fn lost(&self, now: &Tally) -> u64 {
        now.lost() - self.before.lost()
    }

    /// Connects that were refused since.
    pub fn refused(&self, now: &Tally) -> u64 {
        now.refused - self.before.refused
    }

    /// Connects since that nothing answered.
    pub fn timed_out(&self, now: &Tally) -> u64 {
        now.timed_out - self.before.timed_out
    }

    /// Connects since that failed in another way, the first call on the connection included.
    pub fn failed(&self, now: &Tally) -> u64 {
        now.failed - self.before.failed
    }

    /// How long a client was without a connection since, at most.
    pub fn longest_outage(&self, now: &Tally) -> Duration {
        now.longest_outage(self.since, standin::now())
    }
}

/// The clients outside, one process.
struct Outside {
    child: Child,
}

impl Outside {
    fn start(cluster: &TestCluster) -> Result<Self> {
        let mut client = Command::new(binary().with_file_name("standin-client"));
        client
            .arg(format!("--to={SERVICE}:{PORT}"))
            .arg(format!("--connections={OUTSIDE}"))
            .arg(format!("--answer={}", Self::answers()))
            .arg("--until-stdin-ends")
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let spawn = || -> io::Result<Child> { process::spawn(&mut client) };
        let child = cluster.kubernetes.outside().run(spawn);
        Ok(Self {
            child: child.context("cannot start standin-client")?,
        })
    }

    fn answers() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, ANSWERS).into()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // Both fail only where it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
