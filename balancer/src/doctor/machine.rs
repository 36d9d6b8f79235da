//! Privileges, limits, file systems and kernel settings.

use std::{fs, path::Path};

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};
use nix::sys::resource::{Resource, getrlimit};

use super::{
    Check,
    guarded::{self, GuardedNetns},
    listing,
};
use crate::{
    dataplane,
    discover::{is_bpffs, stays_here},
    sys::netns,
};

/// Open files that do for the maps, for a link for each netns, and for clients of the daemon's API.
const FEWEST_FILES: u64 = 1024;

/// A capability, what needs it, and whether nothing goes without.
type Needed = (Capability, &'static str, bool);

const CAPABILITIES: [Needed; 5] = [
    (Capability::CAP_BPF, "loading programs and maps", true),
    (
        Capability::CAP_PERFMON,
        "programs that read kernel structures",
        true,
    ),
    (Capability::CAP_NET_ADMIN, "attaching programs", true),
    (
        Capability::CAP_SYS_PTRACE,
        "taking over listeners that run already, and naming their owners",
        false,
    ),
    (
        Capability::CAP_DAC_READ_SEARCH,
        "the same for listeners of other users",
        false,
    ),
];

/// Not needed where the daemon guards its own netns alone and finds a BPF file system.
const ADMIN: Needed = (
    Capability::CAP_SYS_ADMIN,
    "entering network namespaces and mounting bpffs",
    true,
);

/// `own_alone`: no other netns than the own is to be guarded.
pub(super) fn checks(state_dir: &Path, own_alone: bool) -> Vec<Check> {
    let needs_admin = !own_alone || !is_bpffs(state_dir).unwrap_or(false);
    let needed: Vec<Needed> = CAPABILITIES
        .into_iter()
        .chain(needs_admin.then_some(ADMIN))
        .collect();
    vec![
        capabilities(&needed, caps::read(None, CapSet::Effective)),
        files(),
        bpffs(state_dir),
        state_directory(state_dir),
    ]
}

fn capabilities(needed: &[Needed], effective: Result<CapsHashSet, CapsError>) -> Check {
    const NAME: &str = "capabilities";
    let held = match effective {
        Ok(held) => held,
        Err(error) => {
            let found = format!("can't be read: {error}");
            return Check::fail(NAME, found, "what is permitted is not known", "run as root");
        }
    };
    let missing: Vec<_> = needed
        .iter()
        .filter(|(needed, ..)| !held.contains(needed))
        .collect();
    if missing.is_empty() {
        return Check::ok(
            NAME,
            listing(&(needed.iter().map(|(capability, ..)| capability)).collect::<Vec<_>>()),
            "everything that the daemon does is permitted",
        );
    }
    let names: Vec<_> = missing.iter().map(|(capability, ..)| capability).collect();
    let purposes: Vec<_> = missing.iter().map(|(_, purpose, _)| purpose).collect();
    let is_required = missing.iter().any(|(.., required)| *required);
    let check = if is_required {
        Check::fail
    } else {
        Check::warn
    };
    check(
        NAME,
        format!("missing: {}", listing(&names)),
        format!("not permitted: {}", listing(&purposes)),
        "run as root, or give the service these capabilities (AmbientCapabilities= in systemd, \
         securityContext in Kubernetes)",
    )
}

fn files() -> Check {
    const NAME: &str = "open files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) => files_of(soft, hard),
        Err(error) => Check::warn(
            NAME,
            format!("the limit can't be read: {error}"),
            "it isn't known",
            "see ulimit -n",
        ),
    }
}

fn files_of(soft: u64, hard: u64) -> Check {
    const NAME: &str = "open files";
    let found = format!("at most {soft} (may be raised to {hard})");
    if soft >= FEWEST_FILES {
        return Check::ok(
            NAME,
            found,
            "enough: the daemon holds a few a network namespace and none a connection",
        );
    }
    Check::warn(
        NAME,
        found,
        "the daemon holds a few files for each network namespace that it guards and may run out of them",
        format!("raise the limit to {FEWEST_FILES} or more (ulimit -n, LimitNOFILE= in systemd)"),
    )
}

fn bpffs(state_dir: &Path) -> Check {
    const NAME: &str = "bpffs";
    let place = state_dir.display();
    match is_bpffs(state_dir) {
        Ok(true) => Check::ok(
            NAME,
            format!("mounted where {place} is"),
            "the data plane outlives the daemon there",
        ),
        Ok(false) if stays_here(state_dir).unwrap_or(false) => Check::fail(
            NAME,
            "not mounted at /sys/fs/bpf, and a mount from this container would not reach the machine",
            "the data plane would end with the container, so the balancer won't start",
            "on the machine: mount -t bpf bpf /sys/fs/bpf",
        ),
        Ok(false) if state_dir.starts_with("/sys/fs/bpf") => Check::warn(
            NAME,
            "not mounted at /sys/fs/bpf",
            "`balancer run` mounts it when it starts; in a container that mount would end with the container, and the data plane with it",
            "mount -t bpf bpf /sys/fs/bpf; in a container, make the host's visible",
        ),
        Ok(false) => Check::fail(
            NAME,
            format!("{place} is not on a BPF file system"),
            "programs and maps can't be pinned there, so the balancer won't start",
            "choose a --state-dir below /sys/fs/bpf",
        ),
        Err(error) => Check::fail(
            NAME,
            format!("{error:#}"),
            "programs and maps can't be pinned there",
            "choose another --state-dir",
        ),
    }
}

fn state_directory(state_dir: &Path) -> Check {
    const NAME: &str = "state directory";
    let place = state_dir.display();
    match dataplane::refused(state_dir) {
        None => Check::ok(
            NAME,
            format!("{place} is nobody else's"),
            "no other user can replace what is pinned there",
        ),
        Some((why, advice)) => Check::fail(
            NAME,
            format!("{place}: {why}"),
            "`balancer run` refuses to start with it",
            advice,
        ),
    }
}

/// What a value of a kernel setting means, and what to do about it where that is needed.
type Meaning = (&'static str, Option<&'static str>);

/// A setting that each netns has for itself.
struct Setting {
    name: &'static str,
    path: &'static str,
    meaning: fn(&str) -> Meaning,
}

const SETTINGS: [Setting; 2] = [
    Setting {
        name: "tcp_syncookies",
        path: "/proc/sys/net/ipv4/tcp_syncookies",
        meaning: syncookies,
    },
    Setting {
        name: "tcp_migrate_req",
        path: "/proc/sys/net/ipv4/tcp_migrate_req",
        meaning: migrate_req,
    },
];

fn syncookies(value: &str) -> Meaning {
    match value {
        "0" => (
            "a flood of half-open connections can fill a backend's SYN queue, and honest clients then can't connect",
            Some("sysctl -w net.ipv4.tcp_syncookies=1"),
        ),
        "1" => ("cookies are used only while a SYN queue overflows", None),
        _ => (
            "every connection is made with a cookie: half-open ones aren't counted, and a backend over its quota refuses a client only after \
             its connect has succeeded",
            Some("unless this is a test, sysctl -w net.ipv4.tcp_syncookies=1"),
        ),
    }
}

fn migrate_req(value: &str) -> Meaning {
    match value {
        "0" => (
            "a connection stays with the listener that its SYN chose",
            None,
        ),
        _ => (
            "when a listener of a SO_REUSEPORT group closes, its waiting connections move to another one, which the counts follow only \
             when the daemon compares them with the socket table",
            Some("sysctl -w net.ipv4.tcp_migrate_req=0"),
        ),
    }
}

pub(super) fn settings(netns: &[GuardedNetns]) -> Vec<Check> {
    if netns.is_empty() {
        return Vec::new();
    }
    SETTINGS
        .iter()
        .map(|setting| setting.check(netns))
        .collect()
}

impl Setting {
    /// One finding for all netns: the ones that need attention, or else what they have in common.
    fn check(&self, netns: &[GuardedNetns]) -> Check {
        let values: Vec<_> = netns.iter().map(|netns| self.value(netns)).collect();
        let places = |wanted: Option<&String>| {
            let all = netns.iter().zip(&values);
            let those = all.filter(|(_, value)| wanted.is_none() || value.as_ref() == wanted);
            listing(&those.map(|(netns, _)| &netns.label).collect::<Vec<_>>())
        };
        let known = values.iter().flatten();
        if let Some((value, (means, Some(advice)))) = known
            .map(|value| (value, (self.meaning)(value)))
            .find(|(_, (_, advice))| advice.is_some())
        {
            let found = format!("{value} in {}", places(Some(value)));
            let elsewhere = netns
                .iter()
                .zip(&values)
                .any(|(netns, found)| found.as_ref() == Some(value) && netns.label != guarded::OWN);
            let inside = if elsewhere {
                " in that network namespace (`ip netns exec NAME …`, `nsenter --net=FILE …`)"
            } else {
                ""
            };
            return Check::warn(self.name, found, means, format!("{advice}{inside}"));
        }
        match values.iter().flatten().next() {
            Some(value) if !values.contains(&None) => {
                let found = format!("{value} in {}", places(None));
                Check::ok(self.name, found, (self.meaning)(value).0)
            }
            _ => Check::warn(
                self.name,
                format!("can't be read in {}", places(None)),
                "its effect isn't known",
                format!("look at {}", self.path),
            ),
        }
    }

    fn value(&self, netns: &GuardedNetns) -> Option<String> {
        let text = netns::inside(netns, || fs::read_to_string(self.path));
        Some(text.ok()?.ok()?.trim().to_owned())
    }
}

/// The daemon of this node, which says that it can do nothing here.
pub(super) fn unfit(said: &str) -> Check {
    Check::fail(
        "daemon",
        said,
        "connections of this node are neither counted nor steered, and nobody is refused; the other \
         nodes are not concerned",
        "see to the other findings; the daemon tries again every few minutes, and at once with \
         `balancer reload`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use std::os::unix::fs::chown;

    fn netns(label: &str) -> GuardedNetns {
        GuardedNetns {
            label: label.to_owned(),
            file: netns::tests::fresh(),
            for_backends_alone: false,
        }
    }

    fn set(netns: &GuardedNetns, path: &str, value: &str) {
        netns::inside(netns, || fs::write(path, value))
            .expect("inside")
            .expect("written");
    }

    #[test]
    fn missing_capabilities_are_named() {
        let needed = [&CAPABILITIES[..], &[ADMIN]].concat();
        let capabilities = |held| capabilities(&needed, held);
        let all = capabilities(Ok(caps::all()));
        assert_eq!(all.status, Status::Ok);
        let none = capabilities(Ok(CapsHashSet::new()));
        assert_eq!(none.status, Status::Fail);
        assert!(
            none.found.contains("CAP_BPF") && none.found.contains("CAP_SYS_PTRACE"),
            "{none:?}"
        );
        let without = |capability| {
            let mut most = caps::all();
            most.remove(&capability);
            let check = capabilities(Ok(most));
            assert_eq!(check.found, format!("missing: {capability}"));
            check.status
        };
        assert_eq!(without(Capability::CAP_SYS_PTRACE), Status::Warn);
        assert_eq!(without(Capability::CAP_DAC_READ_SEARCH), Status::Warn);
        assert_eq!(without(Capability::CAP_SYS_ADMIN), Status::Fail);
        assert_eq!(
            capabilities(Err(CapsError::from("no"))).status,
            Status::Fail
        );
        assert_eq!(
            capabilities(caps::read(None, CapSet::Effective)).status,
            Status::Ok,
            "tests run as root"
        );
    }

    #[test]
    fn who_guards_the_own_netns_alone_enters_none() {
        let names_admin = |state_dir: &str, own_alone| {
            let checks = checks(Path::new(state_dir), own_alone);
            checks[0].found.contains("CAP_SYS_ADMIN")
        };
        assert!(!names_admin("/sys/fs/bpf/no-such-balancer", true));
        assert!(names_admin("/sys/fs/bpf/no-such-balancer", false));
        assert!(names_admin("/no-such-directory", true), "to mount bpffs");
    }

    #[test]
    fn few_files_are_a_warning() {
        assert_eq!(files_of(1024, 4096).status, Status::Ok);
        let few = files_of(256, 4096);
        assert_eq!(few.status, Status::Warn);
        assert!(few.found.contains("256") && few.found.contains("4096"));
    }

    #[test]
    fn a_state_directory_elsewhere_fails() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(bpffs(directory.path()).status, Status::Fail);
    }

    #[test]
    fn a_state_directory_of_another_user_fails_with_advice() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(state_directory(directory.path()).status, Status::Ok);
        let missing = directory.path().join("missing");
        assert_eq!(state_directory(&missing).status, Status::Ok);
        chown(directory.path(), Some(65534), None).expect("chown, as root");
        let check = state_directory(directory.path());
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.contains("user 65534"), "{check:?}");
        let advice = check.advice.expect("advice");
        assert!(advice.contains("balancer unload --state-dir"), "{advice}");
    }

    #[test]
    fn settings_are_those_of_the_namespace() {
        let [first, second] = ["first", "second"].map(netns);
        let by_name = |name| {
            let checks = settings(&[
                GuardedNetns {
                    label: "first".into(),
                    file: first.file.try_clone().expect("clone"),
                    for_backends_alone: false,
                },
                GuardedNetns {
                    label: "second".into(),
                    file: second.file.try_clone().expect("clone"),
                    for_backends_alone: false,
                },
            ]);
            checks
                .into_iter()
                .find(|check| check.name == name)
                .expect(name)
        };
        assert_eq!(by_name("tcp_migrate_req").status, Status::Ok);
        set(&second, "/proc/sys/net/ipv4/tcp_migrate_req", "1");
        let check = by_name("tcp_migrate_req");
        assert_eq!(
            (check.status, check.found.as_str()),
            (Status::Warn, "1 in second")
        );
        let advice = check.advice.expect("advice");
        assert!(advice.contains("nsenter"), "it is not ours: {advice}");
        for (value, status) in [("1", Status::Ok), ("0", Status::Warn), ("2", Status::Warn)] {
            for netns in [&first, &second] {
                set(netns, "/proc/sys/net/ipv4/tcp_syncookies", value);
            }
            let check = by_name("tcp_syncookies");
            assert_eq!(
                (check.status, check.found),
                (status, format!("{value} in first, second"))
            );
        }
    }
}
