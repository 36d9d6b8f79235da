//! Processes that end with the test, however that ends.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};

use crate::fixtures::{Cgroup, Netns, in_thread, process};

/// A process namespace, and the processes that were started in it.
///
/// Its first process reads from a pipe whose other end only this process holds: it ends when this
/// one does, even by SIGKILL, and the kernel kills the whole namespace with it
/// (`zap_pid_ns_processes` in `kernel/pid_namespace.c`), also what has made itself a daemon there.
pub(super) struct Keeper {
    first: Child,
    namespace: Namespace,
    children: BTreeMap<&'static str, Child>,
}

/// A test may run inside a machine's cgroup: what is started here is not on that machine.
fn leave_the_machines_cgroup() {
    let threads = Cgroup::base().join("cgroup.threads");
    fs::write(threads, gettid().to_string()).expect("a thread can go back to its process's cgroup");
}

/// A process namespace.
pub(super) struct Namespace(File);

impl Namespace {
    /// Makes processes that the calling thread starts from then on begin there; the thread itself
    /// stays where it is.
    ///
    /// # Panics
    /// When the kernel refuses.
    #[track_caller]
    pub(super) fn enter(&self) {
        setns(&self.0, CloneFlags::CLONE_NEWPID).expect("the namespace can be entered");
    }
}

impl Keeper {
    pub(super) fn new() -> Self {
        let first = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWPID).expect("a process namespace can be made");
            let mut first = Command::new("cat");
            first.stdin(Stdio::piped()).stdout(Stdio::null());
            first.process_group(0);
            process::spawn(&mut first).expect("`cat` can be started")
        });
        let namespace = File::open(format!("/proc/{}/ns/pid", first.id()));
        Self {
            namespace: Namespace(namespace.expect("the namespace of a child can be opened")),
            first,
            children: BTreeMap::new(),
        }
    }

    /// The namespace itself, for processes that are waited for.
    pub(super) fn namespace(&self) -> Namespace {
        let handle = self.namespace.0.try_clone();
        Namespace(handle.expect("a descriptor can be copied"))
    }

    /// Starts a process under a name by which it is found again.
    ///
    /// # Panics
    /// When it can't be started, or one of that name runs.
    #[track_caller]
    pub(super) fn start(&mut self, name: &'static str, netns: &Netns, command: &mut Command) {
        assert!(!self.runs(name), "{name} runs already");
        // A terminal's Ctrl-C is not for it: whoever holds this guard ends it.
        command.process_group(0);
        let namespace = &self.namespace;
        let child = netns.run(|| {
            namespace.enter();
            leave_the_machines_cgroup();
            process::spawn(command)
        });
        let child = child.unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        self.children.insert(name, child);
    }

    /// Whether it was started and has not ended since.
    pub(super) fn runs(&mut self, name: &str) -> bool {
        let child = self.children.get_mut(name);
        child.is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The id, as this process sees it.
    #[track_caller]
    pub(super) fn id(&self, name: &str) -> Pid {
        let child = self.children.get(name);
        let child = child.unwrap_or_else(|| panic!("{name} was not started"));
        Pid::from_raw(i32::try_from(child.id()).expect("a process id"))
    }

    /// Kills it and waits until it is gone.
    #[track_caller]
    pub(super) fn kill(&mut self, name: &str) {
        let child = self.children.remove(name);
        let mut child = child.unwrap_or_else(|| panic!("{name} was not started"));
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }

    #[track_caller]
    pub(super) fn signal(&self, name: &str, signal: Signal) {
        kill(self.id(name), signal).expect("a child can be signalled");
    }

    /// Kills everything, and waits until it is gone.
    pub(super) fn end(&mut self) {
        let _ = self.first.kill();
        // The first process of a namespace is not gone before all others are, and of these the
        // children of this process only when it has waited for them.
        for child in self.children.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = self.first.wait();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}
