//! `kubectl` as one user.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::keeper::Namespace;
use super::{program, run};
use crate::fixtures::{Finished, Netns};

/// `kubectl` with somebody's kubeconfig, in the network namespace from which the API server is
/// reached.
pub struct Kubectl {
    netns: Netns,
    namespace: Namespace,
    kubeconfig: PathBuf,
    cache: PathBuf,
}

impl Kubectl {
    /// It runs in these namespaces.
    pub(super) fn new(netns: &Netns, namespace: Namespace, kubeconfig: &Path) -> Self {
        Self {
            netns: netns.share(),
            namespace,
            kubeconfig: kubeconfig.to_owned(),
            cache: kubeconfig.with_extension("cache"),
        }
    }

    /// The file that says where the API server is, and who this is.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Runs it; what it prints.
    ///
    /// # Panics
    /// With what it complains about, when it fails.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        succeeded(arguments, self.attempt(arguments))
    }

    /// Runs it, whatever comes out.
    ///
    /// # Panics
    /// When it does not end within three minutes.
    #[track_caller]
    pub fn attempt(&self, arguments: &[&str]) -> Finished {
        self.attempt_with_input(arguments, b"")
    }

    /// Makes an object what this JSON says (`apply`, with the server's merge), `status` included
    /// where there is one.
    ///
    /// # Panics
    /// With what the API server says against it.
    #[track_caller]
    pub fn apply(&self, object: &Value) {
        let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.run_with_input(&apply, object);
        for object in items(object) {
            if object.get("status").is_some() {
                let with_status = [&apply[..], &["--subresource=status"]].concat();
                self.run_with_input(&with_status, object);
            }
        }
    }

    /// Tries to make an object what this JSON says, without its status.
    ///
    /// # Panics
    /// When it does not end within three minutes.
    #[track_caller]
    pub fn attempt_to_apply(&self, object: &Value) -> Finished {
        let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.attempt_with_input(&apply, object.to_string().as_bytes())
    }

    /// Merges this into the object's status.
    ///
    /// # Panics
    /// With what the API server says against it.
    #[track_caller]
    pub fn patch_status(&self, kind: &str, namespace: &str, name: &str, status: &Value) {
        let patch = json!({ "status": status }).to_string();
        self.run(&[
            "patch",
            kind,
            name,
            "--namespace",
            namespace,
            "--subresource=status",
            "--type=merge",
            "--patch",
            &patch,
        ]);
    }

    /// The object, or the list if `arguments` name no single one: `["pods", "-n", "workloads"]`.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn get(&self, arguments: &[&str]) -> Value {
        let text = self.run(&[&["get", "-o", "json"], arguments].concat());
        serde_json::from_str(&text).expect("`kubectl get -o json` prints JSON")
    }

    #[track_caller]
    fn run_with_input(&self, arguments: &[&str], input: &Value) {
        let input = input.to_string();
        succeeded(
            arguments,
            self.attempt_with_input(arguments, input.as_bytes()),
        );
    }

    #[track_caller]
    fn attempt_with_input(&self, arguments: &[&str], input: &[u8]) -> Finished {
        let mut command = program("kubectl");
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(&self.cache)
            .args(arguments)
            .env_remove("KUBECONFIG");
        self.netns.run(|| {
            self.namespace.enter();
            run::to_its_end(&mut command, input)
        })
    }
}

#[track_caller]
fn succeeded(arguments: &[&str], finished: Finished) -> String {
    assert!(
        finished.code == 0,
        "kubectl {}: {}",
        arguments.join(" "),
        finished.stderr.trim()
    );
    finished.stdout
}

/// The objects of a `List`, else the object itself.
fn items(object: &Value) -> Vec<&Value> {
    let items = object["items"].as_array();
    items.map_or_else(|| vec![object], |items| items.iter().collect())
}
