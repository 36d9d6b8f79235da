//! Privileges, limits, file systems and kernel settings.

use std::{fs, path::Path};

use nix::sys::resource::{Resource, getrlimit};

use super::{Check, guarded::GuardedNetns, listing};
use crate::{discover::is_bpffs, sys::netns};

/// Fewer files than this may not do for one link a network namespace, the maps and the daemon's clients.
const FEWEST_FILES: u64 = 1024;

/// Capabilities (include/uapi/linux/capability.h): number, name, what needs it, and whether nothing goes without.
const CAPABILITIES: [(u32, &str, &str, bool); 5] = [
    (39, "CAP_BPF", "loading programs and maps", true),
    (
        38,
        "CAP_PERFMON",
        "programs that read kernel structures",
        true,
    ),
    (
        12,
        "CAP_NET_ADMIN",
        "attaching programs and destroying connections",
        true,
    ),
    (
        21,
        "CAP_SYS_ADMIN",
        "entering network namespaces and mounting bpffs",
        true,
    ),
    (
        19,
        "CAP_SYS_PTRACE",
        "taking over listeners that run already, and naming their owners",
        false,
    ),
];

pub(super) fn checks(state_dir: &Path) -> Vec<Check> {
    vec![
        capabilities(effective_capabilities().as_deref()),
        files(),
        bpffs(state_dir),
    ]
}

/// The line `CapEff` of our own status: 16 hexadecimal digits.
fn effective_capabilities() -> Option<String> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    Some(
        status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))?
            .trim()
            .to_owned(),
    )
}

fn capabilities(effective: Option<&str>) -> Check {
    const NAME: &str = "capabilities";
    let Some(set) = effective.and_then(|digits| u64::from_str_radix(digits, 16).ok()) else {
        return Check::fail(
            NAME,
            "can't be read from /proc/thread-self/status",
            "what is permitted is not known",
            "mount /proc",
        );
    };
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(number, ..)| set & (1 << number) == 0)
        .collect();
    if missing.is_empty() {
        return Check::ok(
            NAME,
            listing(&CAPABILITIES.map(|(_, name, ..)| name.to_owned())),
            "everything that the daemon does is permitted",
        );
    }
    let found = format!(
        "missing: {}",
        listing(
            &missing
                .iter()
                .map(|(_, name, ..)| (*name).to_owned())
                .collect::<Vec<_>>()
        )
    );
    let means = format!(
        "not permitted: {}",
        listing(
            &missing
                .iter()
                .map(|(_, _, purpose, _)| (*purpose).to_owned())
                .collect::<Vec<_>>()
        )
    );
    let advice = "run as root, or give the service these capabilities (AmbientCapabilities= in systemd, securityContext in Kubernetes)";
    let required = missing.iter().any(|(.., required)| *required);
    if required {
        Check::fail(NAME, found, means, advice)
    } else {
        Check::warn(NAME, found, means, advice)
    }
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

/// What a value of a kernel setting means, and what to do about it where that is needed.
type Meaning = (&'static str, Option<&'static str>);

/// A setting that each network namespace has for itself.
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
            Some("sysctl -w net.ipv4.tcp_syncookies=1, unless this is a test"),
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

pub(super) fn namespace_checks(namespaces: &[GuardedNetns]) -> Vec<Check> {
    if namespaces.is_empty() {
        return Vec::new();
    }
    SETTINGS
        .iter()
        .map(|setting| setting.check(namespaces))
        .collect()
}

impl Setting {
    /// One finding for all namespaces: the ones that need attention, or else what they have in common.
    fn check(&self, namespaces: &[GuardedNetns]) -> Check {
        let values: Vec<_> = namespaces
            .iter()
            .map(|namespace| (namespace, self.value(namespace)))
            .collect();
        let mut worrying: Vec<_> = values
            .iter()
            .filter(|(_, value)| {
                value
                    .as_deref()
                    .is_none_or(|value| (self.meaning)(value).1.is_some())
            })
            .collect();
        worrying.sort_by_key(|(_, value)| value.is_none());
        let Some((_, worst)) = worrying.first() else {
            let value = values[0].1.as_deref().unwrap_or_default();
            return Check::ok(
                self.name,
                format!("{value} in {}", places(&values)),
                (self.meaning)(value).0,
            );
        };
        let Some(worst) = worst else {
            return Check::warn(
                self.name,
                format!("can't be read in {}", places(&values)),
                "its effect isn't known",
                format!("look at {}", self.path),
            );
        };
        let those: Vec<_> = values
            .iter()
            .filter(|(_, value)| value.as_ref() == Some(worst))
            .cloned()
            .collect();
        let (means, advice) = (self.meaning)(worst);
        Check::warn(
            self.name,
            format!("{worst} in {}", places(&those)),
            means,
            advice.unwrap_or_default(),
        )
    }

    fn value(&self, namespace: &GuardedNetns) -> Option<String> {
        let text = netns::inside(namespace, || fs::read_to_string(self.path))
            .ok()?
            .ok()?;
        Some(text.trim().to_owned())
    }
}

fn places(values: &[(&GuardedNetns, Option<String>)]) -> String {
    listing(
        &values
            .iter()
            .map(|(namespace, _)| namespace.label.clone())
            .collect::<Vec<_>>(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn namespace(label: &str) -> GuardedNetns {
        GuardedNetns {
            label: label.to_owned(),
            file: netns::tests::fresh(),
        }
    }

    fn set(namespace: &GuardedNetns, path: &str, value: &str) {
        netns::inside(namespace, || fs::write(path, value))
            .expect("inside")
            .expect("written");
    }

    #[test]
    fn missing_capabilities_are_named() {
        let all = capabilities(Some("000001ffffffffff"));
        assert_eq!(all.status, Status::Ok);
        let none = capabilities(Some("0000000000000000"));
        assert_eq!(none.status, Status::Fail);
        assert!(
            none.found.contains("CAP_BPF") && none.found.contains("CAP_SYS_PTRACE"),
            "{none:?}"
        );
        let no_ptrace = capabilities(Some("000001fffff7ffff"));
        assert_eq!(
            (no_ptrace.status, no_ptrace.found.as_str()),
            (Status::Warn, "missing: CAP_SYS_PTRACE")
        );
        assert_eq!(capabilities(None).status, Status::Fail);
        assert_eq!(capabilities(Some("x")).status, Status::Fail);
        assert_eq!(
            capabilities(effective_capabilities().as_deref()).status,
            Status::Ok,
            "tests run as root"
        );
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
    fn settings_are_those_of_the_namespace() {
        let [first, second] = ["first", "second"].map(namespace);
        let by_name = |name| {
            let checks = namespace_checks(&[
                GuardedNetns {
                    label: "first".into(),
                    file: first.file.try_clone().expect("clone"),
                },
                GuardedNetns {
                    label: "second".into(),
                    file: second.file.try_clone().expect("clone"),
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
        for (value, status) in [("1", Status::Ok), ("0", Status::Warn), ("2", Status::Warn)] {
            for namespace in [&first, &second] {
                set(namespace, "/proc/sys/net/ipv4/tcp_syncookies", value);
            }
            let check = by_name("tcp_syncookies");
            assert_eq!(
                (check.status, check.found),
                (status, format!("{value} in first, second"))
            );
        }
    }
}
