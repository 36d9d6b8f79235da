//! `ZooKeeper` and the OAP servers that it joins into a cluster.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use e2e::oap::cache::Cache;
use e2e::oap::graphql;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::scenario::process::{Process, command};

use crate::layout::{AGENTS, ALS, NODES, REST_PORT, ZOOKEEPER, node};

/// The running servers.
pub struct Cluster {
    nodes: [Option<Process>; NODES],
    /// The one that is stopped.
    stopped: Option<usize>,
    zookeeper: Process,
    class_path: String,
    logs: PathBuf,
    _data: Data,
}

impl Cluster {
    /// Starts all of them and does not wait.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub fn start(cache: &Cache) -> Result<Self> {
        let class_path = cache.oap_class_path()?;
        let data = Data::make(cache.data())?;
        let config = data.0.join("zoo.cfg");
        fs::write(&config, zookeeper_config(&data.0)).context("cannot write zoo.cfg")?;
        let mut server = java(64, &class_path);
        server.arg("org.apache.zookeeper.server.ZooKeeperServerMain");
        server.arg(config);
        let mut cluster = Self {
            nodes: [const { None }; NODES],
            stopped: None,
            zookeeper: Process::start("zookeeper", &cache.logs(), server)?,
            class_path,
            logs: cache.logs(),
            _data: data,
        };
        for index in 0..NODES {
            cluster.launch(index)?;
        }
        Ok(cluster)
    }

    /// Starts one OAP.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(&mut self, index: usize) -> Result<()> {
        let address = node(index).to_string();
        let mut server = java(768, &self.class_path);
        server.env("SW_CLUSTER_ZK_HOST_PORT", ZOOKEEPER.to_string());
        for host in ["SW_CORE_GRPC_HOST", "SW_CORE_REST_HOST", "SW_ALS_GRPC_HOST"] {
            server.env(host, &address);
        }
        server.env("SW_CORE_GRPC_PORT", AGENTS.backend_port.to_string());
        server.env("SW_ALS_GRPC_PORT", ALS.backend_port.to_string());
        server.env("SW_CORE_REST_PORT", REST_PORT.to_string());
        server.arg("org.apache.skywalking.oap.server.starter.OAPServerStartUp");
        let name = format!("oap-{}", index + 1);
        self.nodes[index] = Some(Process::start(&name, &self.logs, server)?);
        Ok(())
    }

    /// Kills one OAP with SIGKILL.
    pub fn kill(&mut self, index: usize) {
        self.stopped = self.stopped.filter(|stopped| *stopped != index);
        self.nodes[index] = None;
    }

    /// Stops one OAP: it is there, and does nothing.
    ///
    /// # Errors
    /// When it has been killed.
    pub fn stop(&mut self, index: usize) -> Result<()> {
        self.signal(index, Signal::SIGSTOP)?;
        self.stopped = Some(index);
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When it has been killed.
    pub fn go_on(&mut self, index: usize) -> Result<()> {
        self.stopped = None;
        self.signal(index, Signal::SIGCONT)
    }

    fn signal(&self, index: usize, signal: Signal) -> Result<()> {
        let node = self.nodes[index].as_ref();
        let process = node.context("this OAP has been killed")?.id();
        let process = Pid::from_raw(i32::try_from(process).context("no process id")?);
        kill(process, signal).with_context(|| format!("cannot signal OAP {}", index + 1))
    }

    /// The OAP whose process this is.
    pub fn index_of(&self, process: u32) -> Option<usize> {
        self.nodes
            .iter()
            .position(|node| node.as_ref().is_some_and(|node| node.id() == process))
    }

    /// The OAPs that are neither killed nor stopped.
    pub fn running(&self) -> Vec<usize> {
        (0..NODES)
            .filter(|index| self.nodes[*index].is_some() && self.stopped != Some(*index))
            .collect()
    }

    /// The processes of all servers.
    pub fn processes(&self) -> Vec<u32> {
        let nodes = self.nodes.iter().flatten().map(Process::id);
        nodes.chain([self.zookeeper.id()]).collect()
    }

    /// How many OAPs answer queries; the last thing that they learn when they start.
    pub fn answering(&self) -> usize {
        self.running()
            .into_iter()
            .filter(|index| graphql::version(Self::rest(*index)).is_ok())
            .count()
    }

    /// Where an OAP answers queries.
    pub fn rest(index: usize) -> SocketAddr {
        SocketAddr::new(node(index), REST_PORT)
    }

    /// Fails if a process has ended that was not killed.
    ///
    /// # Errors
    /// Then.
    pub fn check(&mut self) -> Result<()> {
        self.zookeeper.check()?;
        self.nodes.iter_mut().flatten().try_for_each(Process::check)
    }
}

/// A small JVM: the second compiler would only make the start longer.
pub fn java(heap_megabytes: u32, class_path: &str) -> Command {
    let mut java = command("java");
    java.arg(format!("-Xmx{heap_megabytes}m"));
    java.args(["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp"]);
    java.arg(class_path);
    java
}

/// Short sessions: a killed OAP leaves the cluster after four seconds.
fn zookeeper_config(data: &Path) -> String {
    format!(
        "dataDir={}\nclientPort={}\nclientPortAddress={}\nmaxClientCnxns=0\nadmin.enableServer=false\ntickTime=500\nmaxSessionTimeout=4000\n",
        data.display(),
        ZOOKEEPER.port(),
        ZOOKEEPER.ip(),
    )
}

/// `ZooKeeper`'s directory; removed when dropped.
struct Data(PathBuf);

impl Data {
    /// An empty one, also where a killed run has left its own.
    fn make(path: PathBuf) -> Result<Self> {
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}
