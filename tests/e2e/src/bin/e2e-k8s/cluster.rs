//! The cluster, and the balancer in it: what any scenario on it needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::fixtures::{Finished, binary, process};
use testkit::kubernetes::{Cluster, objects};
use testkit::scenario::interrupt;

use crate::layout::{NODES, OAPS, RELEASE, SYSTEM, WORKLOADS};
use crate::picture;

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/helm/balancer");

/// What is tried.
#[derive(Args)]
pub struct Product {
    /// The program `helm`.
    #[arg(long)]
    pub helm: PathBuf,
    /// The archive of the balancer's image.
    #[arg(long)]
    pub image: PathBuf,
    /// What the image is called.
    #[arg(long)]
    pub name: String,
    /// The balancer that is in it.
    #[arg(long)]
    pub balancer: PathBuf,
    /// Install the chart with `privileged: false`.
    #[arg(long)]
    pub unprivileged: bool,
}

impl Product {
    /// The chart's values with this configuration.
    pub fn values(&self, config: &Value) -> Value {
        let (repository, tag) = self.name.rsplit_once(':').unwrap_or((&self.name, ""));
        json!({
            "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
            "privileged": !self.unprivileged,
            "config": config,
        })
    }
}

/// The cluster.
pub struct TestCluster {
    pub kubernetes: Cluster,
    pub product: Product,
    directory: TempDir,
    logs: PathBuf,
}

impl TestCluster {
    /// Starts so many nodes that have the balancer's image and that of its peers, which is written
    /// for it, and makes the namespaces.
    ///
    /// # Errors
    /// When files can't be written.
    pub fn start(
        product: Product,
        nodes: usize,
        write_image: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        let image = directory.path().join("image.tar");
        write_image(&image)?;
        println!("Starting {nodes} nodes");
        let kubernetes = Cluster::start(nodes, &[&product.image, &image]);
        for namespace in [OAPS, WORKLOADS, SYSTEM] {
            kubernetes.admin().apply(&objects::namespace(namespace));
        }
        let logs = binary().with_file_name("e2e-k8s-logs");
        if logs.exists() {
            fs::remove_dir_all(&logs).context("cannot remove the logs of an earlier run")?;
        }
        fs::create_dir(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        Ok(Self {
            kubernetes,
            product,
            directory,
            logs,
        })
    }

    /// Where logs are kept.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Where the picture is drawn.
    pub fn picture(&self) -> PathBuf {
        self.logs.join(picture::NAME)
    }

    /// `kubectl`; what it prints.
    ///
    /// # Errors
    /// With what it complains about.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        interrupt::check()?;
        let finished = self.kubernetes.admin().attempt(arguments);
        succeeded("kubectl", arguments, finished)
    }

    /// An object, or a list.
    ///
    /// # Errors
    /// When there is none, or no API server.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], arguments].concat())?;
        serde_json::from_str(&text).context("kubectl does not print JSON")
    }

    /// Whether all that belongs to a Deployment, `DaemonSet` or `StatefulSet` is as it says.
    ///
    /// # Errors
    /// When there is none, or no API server.
    pub fn rolled_out(&self, namespace: &str, what: &str) -> Result<bool> {
        let status = ["rollout", "status", what, "-n", namespace, "--watch=false"];
        let said = self.kubectl(&status)?;
        // The second is what it says of a StatefulSet.
        let complete = ["successfully rolled out", "roll out complete"];
        Ok(complete.iter().any(|words| said.contains(words)))
    }

    /// Waits until that is so.
    ///
    /// # Errors
    /// When it is not within a time.
    pub fn wait_rolled_out(&self, namespace: &str, what: &str, within: Duration) -> Result<()> {
        let deadline = std::time::Instant::now() + within;
        while !self.rolled_out(namespace, what)? {
            ensure!(
                std::time::Instant::now() < deadline,
                "{what} is not complete within {within:?}: {}",
                self.kubectl(&["get", "pods", "-n", namespace, "-o", "wide"])?
            );
            interrupt::pause(Duration::from_millis(200))?;
        }
        Ok(())
    }

    /// Runs a command on a node; what it prints.
    ///
    /// # Errors
    /// With what it complains about.
    pub fn on_node(&self, node: &str, command: &[&str]) -> Result<String> {
        interrupt::check()?;
        succeeded(node, command, self.kubernetes.enter(node, command))
    }

    /// The balancer of the image as a program on a node, beside the daemon: it needs no API server.
    ///
    /// # Errors
    /// With what it complains about.
    pub fn balancer(&self, node: &str, arguments: &[&str]) -> Result<String> {
        let program = self.product.balancer.display().to_string();
        self.on_node(node, &[&[&*program], arguments].concat())
    }

    /// The nodes that a check of `doctor --cluster` names.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn named_by_doctor(&self, check: &str) -> Result<String> {
        let kubeconfig = self.kubernetes.admin().kubeconfig().display().to_string();
        let program = self.product.balancer.display().to_string();
        let doctor = format!("KUBECONFIG={kubeconfig} {program} doctor --cluster -o json || true");
        let said = self.on_node(NODES[0], &["sh", "-c", &doctor])?;
        let said: Value = serde_json::from_str(&said).context("doctor does not print JSON")?;
        let checks = said["checks"].as_array().cloned().unwrap_or_default();
        let found = checks.iter().find(|found| found["name"] == check);
        let found = found.map_or_else(String::new, |check| check["found"].to_string());
        let named = NODES.iter().filter(|node| found.contains(*node));
        Ok(named.copied().collect::<Vec<_>>().join(" "))
    }

    /// Installs the chart with these values, or upgrades it to them.
    ///
    /// # Errors
    /// With what helm complains about.
    pub fn helm_upgrade(&self, values: &Value) -> Result<()> {
        let file = self.directory.path().join("values.json");
        fs::write(&file, values.to_string()).context("cannot write the values")?;
        let file = file.display().to_string();
        let upgrade = ["upgrade", "--install", RELEASE, CHART, "--values", &file];
        self.helm(&upgrade).map(drop)
    }

    /// helm, in the balancer's namespace.
    ///
    /// # Errors
    /// With what it complains about.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        interrupt::check()?;
        let own = self.directory.path();
        let mut helm = Command::new(&self.product.helm);
        helm.args(arguments)
            .args(["--namespace", SYSTEM, "--kubeconfig"])
            .arg(self.kubernetes.admin().kubeconfig());
        for (variable, directory) in [
            ("HELM_CACHE_HOME", "cache"),
            ("HELM_CONFIG_HOME", "config"),
            ("HELM_DATA_HOME", "data"),
        ] {
            helm.env(variable, own.join(directory));
        }
        let output = self.kubernetes.outside().run(|| process::output(&mut helm));
        let output = output.context("cannot start helm")?;
        succeeded("helm", arguments, output.into())
    }

    /// A file on a node, as it is seen from here.
    pub fn file_on(&self, node: &str, path: &str) -> PathBuf {
        self.kubernetes
            .root(node)
            .join(path.trim_start_matches('/'))
    }

    /// Says how somebody gets into the cluster.
    pub fn print_how_to_reach_it(&self) {
        let outside = self.kubernetes.outside().path();
        let kubeconfig = self.kubernetes.admin().kubeconfig();
        println!("\nThe cluster stays until Ctrl-C. From outside the nodes:\n");
        println!(
            "    alias kubectl='nsenter --net={} {} kubectl --kubeconfig {}'",
            outside.display(),
            Path::new(&std::env::var_os("BALANCER_KUBEALL").unwrap_or_default()).display(),
            kubeconfig.display()
        );
        println!("    kubectl get pods -A -o wide\n\nOn a node:\n");
        for node in NODES.iter().filter(|node| self.kubernetes.runs(node)) {
            let enter = self.kubernetes.on_node(node);
            let words = std::iter::once(enter.get_program()).chain(enter.get_args());
            let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
            let balancer = self.product.balancer.display();
            println!("    {} {balancer} status --cluster", words.join(" "));
        }
    }
}

fn succeeded(program: &str, arguments: &[&str], finished: Finished) -> Result<String> {
    ensure!(
        finished.code == 0,
        "{program} {}: {}{}",
        arguments.join(" "),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    Ok(finished.stdout)
}
