//! What an instance has in the kernel: its pins, and the programs, maps and links behind them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use aya_obj::generated::bpf_attach_type::{BPF_CGROUP_SOCK_OPS, BPF_SK_LOOKUP};
use balancer::sys::bpf;
use testkit::fixtures::{Balancer, Machine, eventually};

/// The kernel frees maps and programs from work queues.
const FREED_WITHIN: Duration = Duration::from_secs(10);

/// What a pin holds, with the kernel's ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pin {
    Map(u32),
    Program(u32),
    Link { id: u32, program: u32 },
    Directory,
}

/// Everything below a state directory, by its path within it.
pub fn pins(state: &Path) -> BTreeMap<PathBuf, Pin> {
    let mut found = BTreeMap::new();
    list(state, Path::new(""), &mut found);
    found
}

fn list(state: &Path, below: &Path, found: &mut BTreeMap<PathBuf, Pin>) {
    for entry in fs::read_dir(state.join(below)).into_iter().flatten() {
        let entry = entry.expect("bpffs can be listed");
        let name = below.join(entry.file_name());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(state, &name, found);
            found.insert(name, Pin::Directory);
        } else {
            let object = bpf::obj_get(&entry.path())
                .unwrap_or_else(|error| panic!("{}: {error}", entry.path().display()));
            let pin = kind(&text_of(&object)).expect("a pin is a map, a program or a link");
            found.insert(name, pin);
        }
    }
}

fn text_of(file: impl AsFd) -> String {
    let number = file.as_fd().as_raw_fd();
    fs::read_to_string(format!("/proc/thread-self/fdinfo/{number}")).expect("fdinfo is readable")
}

/// What a descriptor holds, by its `fdinfo` (`bpf_map_show_fdinfo` and its like,
/// kernel/bpf/syscall.c).
fn kind(fdinfo: &str) -> Option<Pin> {
    let number = |key: &str| -> Option<u32> {
        let line = fdinfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().parse().ok()
    };
    match (number("link_id:"), number("map_id:"), number("prog_id:")) {
        (Some(id), _, program) => Some(Pin::Link {
            id,
            program: program.unwrap_or(0),
        }),
        (None, Some(id), _) => Some(Pin::Map(id)),
        (None, None, Some(id)) => Some(Pin::Program(id)),
        (None, None, None) => None,
    }
}

/// The links below a state directory, with their programs.
pub fn links(state: &Path) -> BTreeMap<PathBuf, (u32, u32)> {
    let link = |(path, pin)| match pin {
        Pin::Link { id, program } => Some((path, (id, program))),
        _ => None,
    };
    pins(state).into_iter().filter_map(link).collect()
}

/// The directories of data planes in a state directory.
pub fn versions(state: &Path) -> Vec<String> {
    let entries = fs::read_dir(state).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The one directory of a data plane.
#[track_caller]
pub fn only_version(state: &Path) -> String {
    let mut names = versions(state);
    assert_eq!(names.len(), 1, "one data plane: {names:?}");
    names.swap_remove(0)
}

/// How many programs are attached to the cgroup and in the netns of the machine.
pub fn attached(machine: &Machine) -> (usize, usize) {
    let cgroup = File::open(machine.cgroup.path()).expect("the cgroup is there");
    let netns = File::open(machine.netns.path()).expect("the netns is there");
    let number = |target: &File, kind| {
        let attached = bpf::prog_query(target, kind).expect("programs can be listed");
        attached.programs.len()
    };
    (
        number(&cgroup, BPF_CGROUP_SOCK_OPS),
        number(&netns, BPF_SK_LOOKUP),
    )
}

/// The objects that an instance was seen to have, some of them gone long ago.
#[derive(Debug, Default)]
pub struct Traces {
    maps: BTreeSet<u32>,
    programs: BTreeSet<u32>,
    links: BTreeSet<u32>,
}

impl Traces {
    /// Remembers what is pinned now.
    pub fn note(&mut self, state: &Path) {
        for pin in pins(state).into_values() {
            match pin {
                Pin::Map(id) => self.maps.insert(id),
                Pin::Program(id) => self.programs.insert(id),
                Pin::Link { id, program } => self.links.insert(id) | self.programs.insert(program),
                Pin::Directory => continue,
            };
        }
    }

    /// Shows that an instance which was unloaded, and has no daemon, has left nothing.
    #[track_caller]
    pub fn assert_gone(&self, machine: &Machine, balancer: &Balancer) {
        assert!(
            !balancer.state().exists(),
            "left: {:?}",
            pins(balancer.state())
        );
        assert_eq!(attached(machine), (0, 0), "programs that are attached");
        let name = balancer.state().file_name().expect("it has a name");
        let name = name.to_string_lossy();
        let holders = fs::read_dir("/run/balancer")
            .into_iter()
            .flatten()
            .flatten();
        // Names of other instances may begin in the same way.
        let mine = format!("-{name}.");
        for holder in holders {
            let file = holder.file_name().to_string_lossy().into_owned();
            assert!(!file.contains(&mine), "/run/balancer/{file} is left");
        }
        assert!(!balancer.socket().exists(), "the admin socket is left");
        eventually(FREED_WITHIN, || {
            for id in &self.programs {
                let gone = bpf::prog_by_id(*id)
                    .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
                ensure!(gone, "program {id} is left");
            }
            self.nobody_holds_any()
        });
    }

    /// No process has a descriptor of any of them.
    fn nobody_holds_any(&self) -> Result<()> {
        for process in fs::read_dir("/proc")?.flatten() {
            // A process may end at any moment.
            for file in fs::read_dir(process.path().join("fd"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let bpf = fs::read_link(file.path())
                    .is_ok_and(|link| link.to_string_lossy().starts_with("anon_inode:bpf"));
                if !bpf {
                    continue;
                }
                let info = process.path().join("fdinfo").join(file.file_name());
                let mine = match kind(&fs::read_to_string(info).unwrap_or_default()) {
                    Some(Pin::Map(id)) => self.maps.contains(&id),
                    Some(Pin::Program(id)) => self.programs.contains(&id),
                    Some(Pin::Link { id, .. }) => self.links.contains(&id),
                    Some(Pin::Directory) | None => false,
                };
                ensure!(!mine, "{} is left", file.path().display());
            }
        }
        Ok(())
    }
}
