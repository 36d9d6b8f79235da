//! `kubectl` as one user.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::program;
use crate::fixtures::{Finished, Netns, process};

/// Longer than anything that `kubectl` waits for here.
const ENDS_WITHIN: Duration = Duration::from_secs(180);

/// `kubectl` with somebody's kubeconfig, in the network namespace from which the API server is reached.
pub struct Kubectl {
    netns: Netns,
    kubeconfig: PathBuf,
    cache: PathBuf,
}

impl Kubectl {
    pub(super) fn new(netns: &Netns, kubeconfig: &Path) -> Self {
        Self {
            netns: netns.share(),
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

    /// Makes an object what this JSON says (`apply`, with the server's merge), `status` included where there is one.
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

    /// The object, or the list if `arguments` name no single one: `["pods", "-n", "shop"]`.
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
        // Files and not pipes: nobody has to empty them while it runs.
        let mut files = [(); 3].map(|()| tempfile::tempfile().expect("a file can be made"));
        let [stdin, stdout, stderr] = &mut files;
        stdin.write_all(input).expect("a file can be written");
        stdin.rewind().expect("a file can be rewound");
        let handle = |file: &File| Stdio::from(file.try_clone().expect("a file can be shared"));
        let mut command = program("kubectl");
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(&self.cache)
            .args(arguments)
            .env_remove("KUBECONFIG")
            .stdin(handle(stdin))
            .stdout(handle(stdout))
            .stderr(handle(stderr));
        let child = self.netns.run(|| process::spawn(&mut command));
        let code = wait(child.expect("kubectl can be started"), arguments);
        Finished {
            code,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }
}

#[track_caller]
fn wait(mut child: Child, arguments: &[&str]) -> i32 {
    let deadline = Instant::now() + ENDS_WITHIN;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status.code().unwrap_or(-1);
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("kubectl {} did not end", arguments.join(" "));
        }
        std::thread::sleep(Duration::from_millis(5));
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

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().expect("a file can be rewound");
    file.read_to_end(&mut bytes).expect("a file can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The objects of a `List`, else the object itself.
fn items(object: &Value) -> Vec<&Value> {
    let items = object["items"].as_array();
    items.map_or_else(|| vec![object], |items| items.iter().collect())
}
