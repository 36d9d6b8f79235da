//! What the kernel can do, seen by trying.

use std::io;
use std::path::Path;

use aya::{
    maps::MapType,
    programs::{ProgramError, ProgramType},
    sys::{is_helper_supported, is_map_supported, is_program_supported},
};
use aya_obj::generated::bpf_func_id::BPF_FUNC_loop;

use super::{Check, listing};
use crate::{
    dataplane::{self, PROGRAMS, Paths, Program},
    discover::kernel_offsets,
    sys::{
        clock,
        sock_diag::{Family, Query, State, States, tcp_sockets},
    },
};

/// The oldest kernel on which the balancer is tried.
const OLDEST: (u32, u32) = (6, 1);

/// A kind of map: a name, what it is for, how it comes into a kernel.
type Map = (MapType, &'static str, &'static str, &'static str);

const MAPS: [Map; 4] = [
    (
        MapType::SkStorage,
        "socket storage",
        "ties each connection to its backend",
        "Linux 5.4 and CONFIG_INET",
    ),
    (
        MapType::SockMap,
        "socket map",
        "holds the listening sockets",
        "CONFIG_BPF_STREAM_PARSER or CONFIG_NET_SOCK_MSG",
    ),
    (
        MapType::RingBuf,
        "ring buffer",
        "tells the daemon what happened",
        "Linux 5.8",
    ),
    (
        MapType::LpmTrie,
        "prefix tree",
        "finds exempt sources by their network",
        "CONFIG_BPF_SYSCALL",
    ),
];

/// What is missing, if anything; an error where that can't be told.
type Missing = io::Result<Option<String>>;

/// What the kernel can do of what the programs need. Whether it takes the programs themselves is
/// seen by [`programs`].
pub(super) fn checks() -> Vec<Check> {
    let names = nix::sys::utsname::uname();
    let build = names.map(|names| names.version().to_string_lossy().into_owned());
    let mut checks = vec![version(&release()), preemption(&build.unwrap_or_default())];
    checks.extend(PROGRAMS.iter().map(|program| {
        let supported = is_program_supported(program.hook.program_type());
        let missing = absent(supported.map_err(io_error));
        feature(program.hook.name(), program.purpose, program.needs, missing)
    }));
    let bounded_loop = is_helper_supported(ProgramType::SkLookup, BPF_FUNC_loop);
    checks.push(feature(
        "bpf_loop",
        "looks through up to 256 backends",
        "Linux 5.17",
        absent(bounded_loop.map_err(io_error)),
    ));
    checks.extend(MAPS.map(|(kind, name, purpose, needs)| {
        let supported = is_map_supported(kind).map_err(|error| error.io_error);
        feature(name, purpose, needs, absent(supported))
    }));
    checks.extend([
        feature(
            "socket table",
            "finds listeners and checks the counts",
            "CONFIG_INET_TCP_DIAG (modprobe tcp_diag)",
            socket_table(),
        ),
        feature(
            "helpers",
            "does for the programs what only the kernel can",
            "Linux 5.17",
            helpers(&PROGRAMS),
        ),
        layout(),
        tick(),
    ]);
    checks
}

fn absent(supported: io::Result<bool>) -> Missing {
    supported.map(|supported| (!supported).then(|| "it doesn't know it".to_owned()))
}

fn io_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::SyscallError(error) => error.io_error,
        other => io::Error::other(other),
    }
}

pub(super) fn release() -> String {
    nix::sys::utsname::uname()
        .map(|names| names.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn version(release: &str) -> Check {
    const NAME: &str = "kernel";
    let found = format!("Linux {release}");
    if is_new_enough(release) {
        return Check::ok(
            NAME,
            found,
            "new enough; what counts is what it can do, below",
        );
    }
    let (major, minor) = OLDEST;
    Check::warn(
        NAME,
        found,
        format!(
            "the balancer is tried on Linux {major}.{minor} and newer; this one may still do if everything below is well"
        ),
        format!("use a kernel of Linux {major}.{minor} or newer"),
    )
}

/// What to say of the running kernel where it is older than any on which the balancer is tried.
pub(super) fn too_old(release: &str) -> Option<String> {
    let (major, minor) = OLDEST;
    (!is_new_enough(release)).then(|| {
        format!(
            "Linux {release} is too old for this: use Linux {major}.{minor} or newer (`balancer doctor` says what this one lacks)"
        )
    })
}

/// By what `uname -v` says: `#1 SMP PREEMPT_RT ...`.
fn preemption(build: &str) -> Check {
    const NAME: &str = "preemption";
    if build.split_whitespace().all(|word| word != "PREEMPT_RT") {
        return Check::ok(
            NAME,
            "not a real-time kernel",
            "a decision is finished before another one begins on the same processor",
        );
    }
    Check::warn(
        NAME,
        "a real-time kernel (PREEMPT_RT)",
        "the balancer is not tried on one. Decisions may interrupt each other on a processor and \
         mix up what they have found: a connection may get another backend than it should, or a \
         wrong refusal. Counts are not concerned",
        "use a kernel without PREEMPT_RT",
    )
}

fn is_new_enough(release: &str) -> bool {
    parse(release).is_some_and(|version| version >= OLDEST)
}

/// `6.1.0-18-amd64`: the first two numbers.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn feature(name: &'static str, purpose: &str, needs: &str, missing: Missing) -> Check {
    let why = match missing {
        Ok(None) => return Check::ok(name, "the kernel takes it", purpose),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            return Check::fail(
                name,
                "can't be tried: not permitted",
                format!("without it nothing {purpose}"),
                "run as root, or with the capabilities that the check \"capabilities\" names; in a \
                 container, allow bpf(2) in its seccomp profile; before Linux 5.11 maps count as \
                 locked memory (`ulimit -l unlimited`)",
            );
        }
        Ok(Some(why)) => why,
        Err(error) => error.to_string(),
    };
    Check::fail(
        name,
        format!("the kernel refuses it: {why}"),
        format!("without it nothing {purpose}"),
        format!("needs {needs}; kernel lockdown must not be \"confidentiality\""),
    )
}

/// Lists our own netns' listeners: the kernel module that does it may be missing.
fn socket_table() -> Missing {
    tcp_sockets(&Query::new(Family::V4, States::of(&[State::Listen]))).map(|_| None)
}

fn helpers(programs: &[Program]) -> Missing {
    let mut missing = Vec::new();
    for program in programs {
        for helper in program.helpers {
            if !is_helper_supported(program.hook.program_type(), *helper).map_err(io_error)? {
                let missed = format!("{helper:?} in {:?}", program.hook);
                missing.push(missed.replace("BPF_FUNC_", "bpf_"));
            }
        }
    }
    Ok((!missing.is_empty()).then(|| format!("no {}", listing(&missing))))
}

fn layout() -> Check {
    const NAME: &str = "kernel types";
    const MEANS: &str = "queue lengths and SYN cookie state are read where the kernel's own type information says they are";
    match kernel_offsets() {
        Ok(_) => Check::ok(NAME, "BTF is there and names every field", MEANS),
        Err(error) => Check::fail(
            NAME,
            format!("{error:#}"),
            "the programs can't be made to fit this kernel",
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y, Linux 6.1 or newer; in a container, make /sys/kernel/btf visible",
        ),
    }
}

/// The programs themselves: a kernel may have every feature and still refuse what is made of them.
pub(super) fn programs(state_dir: &Path) -> Check {
    const NAME: &str = "programs";
    match dataplane::trial(&Paths::new(state_dir)) {
        Ok(None) => Check::ok(
            NAME,
            "the kernel takes all of them",
            "the balancer can be loaded here",
        ),
        Ok(Some(why)) => Check::warn(
            NAME,
            format!("the kernel takes all but one: {why}"),
            "what this node places is counted, but not compared with its sockets: a count that goes \
             wrong stays wrong until the daemon's data plane is made anew",
            "nothing else is missing; a kernel without lockdown takes it",
        ),
        Err(error) => Check::fail(
            NAME,
            format!("{error:#}"),
            "the balancer can't be loaded here",
            "see to the other findings first; if there are none, this kernel and this build do not fit: report it with what was found",
        ),
    }
}

fn tick() -> Check {
    const NAME: &str = "tick rate";
    match clock::jiffies_per_second() {
        Ok(hz) => Check::ok(
            NAME,
            format!("{hz} jiffies a second"),
            "tells how long ago a SYN queue overflowed",
        ),
        Err(error) => Check::fail(
            NAME,
            error.to_string(),
            "whether SYN cookies are in use can't be told, and under a flood connections would be steered apart",
            "run on a real Linux kernel",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dataplane::Hook, doctor::Status};
    use aya_obj::generated::bpf_func_id::{BPF_FUNC_sk_assign, BPF_FUNC_sock_map_update};

    #[test]
    fn versions_are_compared_as_numbers() {
        let status = |release| version(release).status;
        assert_eq!(status("6.18.44-fc-v669"), Status::Ok);
        assert_eq!(status("6.1.0-18-amd64"), Status::Ok);
        assert_eq!(status("10.0-rc1"), Status::Ok);
        assert_eq!(status("5.15.0"), Status::Warn);
        assert_eq!(status("5.100"), Status::Warn);
        assert_eq!(status("nonsense"), Status::Warn);
        assert_eq!(too_old("6.1.0-18-amd64"), None);
        let said = too_old("5.10.0-32-amd64").expect("it is");
        assert!(said.contains("5.10.0") && said.contains("Linux 6.1 or newer"));
    }

    #[test]
    fn a_real_time_kernel_is_a_warning() {
        let status = |build| preemption(build).status;
        let debian = "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1 (2026-01-10)";
        assert_eq!(status(debian), Status::Ok);
        assert_eq!(
            status("#1 SMP PREEMPT_RT Debian 6.12.117-1 (2026-01-10)"),
            Status::Warn
        );
    }

    #[test]
    fn a_helper_is_told_by_the_kind_of_program() {
        assert_eq!(helpers(&PROGRAMS).expect("tests run as root"), None);
        let with = |hook| Program {
            name: "wrong",
            hook,
            purpose: "",
            needs: "",
            helpers: &[BPF_FUNC_sk_assign, BPF_FUNC_sock_map_update],
        };
        let missing = helpers(&[with(Hook::SkLookup), with(Hook::SockOps)]);
        assert_eq!(
            missing.expect("tests run as root").as_deref(),
            Some("no bpf_sock_map_update in SkLookup, bpf_sk_assign in SockOps")
        );
    }

    #[test]
    fn a_missing_feature_says_what_it_needs() {
        let check = feature("x", "does y", "Linux 9.9", Ok(Some("EINVAL".to_owned())));
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.contains("EINVAL") && check.means == "without it nothing does y");
        assert!(check.advice.expect("advice").contains("Linux 9.9"));
        let refused = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            feature("x", "does y", "Linux 9.9", Err(error)).advice
        };
        assert!(refused(libc::EINVAL).expect("advice").contains("Linux 9.9"));
        let advice = refused(libc::EPERM).expect("advice");
        assert!(advice.contains("capabilities"), "{advice}");
    }
}
