//! The cgroup, and what other programs sit where ours are to be attached.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::{Check, Options, guarded::GuardedNetns, listing};
use crate::{
    config::Config,
    dataplane::{Paths, Program, has_frontends},
    discover::{cgroup2_mount, cgroups, is_cgroup2},
    sys::bpf::{self, Attached, Object},
};
use aya_obj::generated::{
    BPF_F_ALLOW_MULTI, BPF_F_ALLOW_OVERRIDE,
    bpf_attach_type::{
        self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_SOCK_OPS,
        BPF_SK_LOOKUP,
    },
};

/// As many links as the kernel allows at one netns (`NETNS_BPF_MAX_PROGS`,
/// `kernel/bpf/net_namespace.c`).
const MOST_SK_LOOKUPS: usize = 64;
/// As many cgroups below are looked at: hundreds of pods have fewer, and a look takes microseconds.
const MOST_CGROUPS: usize = 20_000;
/// Pins lie at most this deep below the state directory.
const PIN_DEPTH: usize = 3;

pub(super) fn checks(options: &Options, netns: &[GuardedNetns]) -> Vec<Check> {
    let ours = pinned_programs(&options.state_dir, PIN_DEPTH);
    let mut checks = match cgroup(options.cgroup.as_deref()) {
        Ok(path) => {
            let means = match options.cgroup {
                None => "every process of this machine is counted",
                Some(_) => "only sockets made by processes in it are counted",
            };
            let found = Check::ok("cgroup2", path.display().to_string(), means);
            let mut checks = vec![found, sock_ops(&path, &ours)];
            let places = options.config.as_ref().is_some_and(places);
            if places || has_frontends(&Paths::new(&options.state_dir)) {
                checks.push(connect(&path, &ours));
            }
            checks
        }
        Err(check) => vec![check],
    };
    if !netns.is_empty() {
        checks.push(sk_lookup(netns, &ours));
    }
    checks
}

/// Whether a file says where connects of clients go, whatever its mode.
fn places(config: &Config) -> bool {
    let in_cluster = config.kubernetes.as_ref();
    in_cluster.is_some_and(|kubernetes| kubernetes.place) || !config.connects.is_empty()
}

/// The cgroup that `account` is attached to, or why there is none.
pub(super) fn cgroup(chosen: Option<&Path>) -> Result<PathBuf, Check> {
    let fail = |found: String, advice: &str| {
        let means = "connections can't be counted, so the balancer won't start";
        Check::fail("cgroup2", found, means, advice)
    };
    let Some(path) = chosen else {
        return cgroup2_mount()
            .map_err(|error| fail(format!("{error:#}"), "mount -t cgroup2 none /sys/fs/cgroup"));
    };
    match is_cgroup2(path) {
        Ok(true) => Ok(path.to_owned()),
        Ok(false) => Err(fail(
            format!("{} is no cgroup2 directory", path.display()),
            "give one below the cgroup2 mount with --cgroup",
        )),
        Err(error) => Err(fail(
            format!("{}: {error}", path.display()),
            "make the cgroup first, or give another with --cgroup",
        )),
    }
}

const SOCK_OPS: &str = "other sock_ops";

fn sock_ops(cgroup: &Path, ours: &HashSet<u32>) -> Check {
    let levels = match above(cgroup, BPF_CGROUP_SOCK_OPS) {
        Ok(levels) => levels,
        Err(error) => return unlisted(SOCK_OPS, &error),
    };
    let Some(exclusive) = blocking(&levels) else {
        let below = below(cgroup, BPF_CGROUP_SOCK_OPS, MOST_CGROUPS);
        return beside(levels, below, ours);
    };
    Check::fail(
        SOCK_OPS,
        exclusively(exclusive, ours),
        "`account` can't be attached (EPERM), so nothing is counted",
        "have its owner attach it with BPF_F_ALLOW_MULTI or a link, or give the balancer a cgroup \
         that isn't below it with --cgroup",
    )
}

fn unlisted(name: &'static str, error: &io::Error) -> Check {
    let found = format!("can't be listed: {error}");
    Check::warn(name, found, "whether others run isn't known", "run as root")
}

/// Names the programs at a cgroup that allow no others.
fn exclusively((path, attached): &(PathBuf, Attached), ours: &HashSet<u32>) -> String {
    let programs = attached.programs.iter().map(|id| described(*id, ours));
    format!(
        "{} at {} doesn't allow others beside it",
        listing(&programs.collect::<Vec<_>>()),
        path.display()
    )
}

const CONNECT: &str = "other connect";

/// What else sits at `connect()`, where connections of clients are placed.
fn connect(cgroup: &Path, ours: &HashSet<u32>) -> Check {
    let mut first = Vec::new();
    for attach_type in [BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT] {
        let levels = match above(cgroup, attach_type) {
            Ok(levels) => levels,
            Err(error) => return unlisted(CONNECT, &error),
        };
        if let Some(exclusive) = blocking(&levels) {
            return Check::warn(
                CONNECT,
                exclusively(exclusive, ours),
                "the programs that place clients' connections can't be attached (EPERM): clients \
                 go where they would without the balancer, and everything else works",
                "have its owner attach it with BPF_F_ALLOW_MULTI or a link (newer versions of \
                 Cilium do), or give the balancer a cgroup that isn't at or below it with \
                 --cgroup, such as kubepods.slice",
            );
        }
        let below = below(cgroup, attach_type, MOST_CGROUPS);
        first.extend(before_ours(&levels, &below, ours));
    }
    Check::warn_of(
        CONNECT,
        &first,
        (
            "none runs before ours",
            "nobody else chooses first where clients' connections go",
        ),
        "where it changes the destination of a connect to a frontend, its choice stands: that \
         connection is not placed",
        "see that it leaves the frontends alone (bpftool cgroup tree). Since Linux 6.12 ours comes \
         first at its own cgroup, and on older ones whoever was attached first: start the balancer \
         before it",
    )
}

/// The programs that run before ours at `connect()`: those that come first at its cgroup, and those
/// of the cgroups below, whose turn is always earlier (`compute_effective_progs`,
/// kernel/bpf/cgroup.c).
fn before_ours(levels: &[(PathBuf, Attached)], below: &Below, ours: &HashSet<u32>) -> Vec<String> {
    let is_ours = |id: &&u32| ours.contains(id);
    let own = levels
        .first()
        .filter(|(_, attached)| attached.programs.iter().any(|id| ours.contains(id)))
        .map(|(path, attached)| {
            let earlier = attached.programs.iter().take_while(|id| !is_ours(id));
            (path, earlier.copied().collect::<Vec<_>>())
        });
    let lower = below.levels.iter().map(|(path, attached)| {
        let foreign = attached.programs.iter().filter(|id| !is_ours(id));
        (path, foreign.copied().collect())
    });
    own.into_iter()
        .chain(lower)
        .flat_map(|(path, programs)| {
            let named = programs.into_iter().map(|id| described(id, ours));
            named.map(|name| format!("{name} at {}", path.display()))
        })
        .collect()
}

/// Programs that run beside ours: those at the cgroup and above for all connections, those below
/// for the ones of their cgroup.
fn beside(levels: Vec<(PathBuf, Attached)>, below: Below, ours: &HashSet<u32>) -> Check {
    let levels = levels.into_iter().chain(below.levels);
    let foreign: Vec<_> = levels
        .flat_map(|(path, attached)| {
            let names = foreign(&attached, ours);
            names
                .into_iter()
                .map(move |name| format!("{name} at {}", path.display()))
        })
        .collect();
    if foreign.is_empty() && below.cut {
        return Check::warn(
            SOCK_OPS,
            format!("none at the first {MOST_CGROUPS} cgroups"),
            "there are more cgroups than are looked at; whether others run at those isn't known",
            "give the balancer's own cgroup with --cgroup, or list them all with `bpftool cgroup tree`",
        );
    }
    Check::warn_of(
        SOCK_OPS,
        &foreign,
        (
            "none",
            "nobody else changes what is reported of connections",
        ),
        "it sees the same connections; if it sets their callback flags without keeping the ones that \
         are set, they are no longer counted",
        "see that it adds to bpf_sock_ops_cb_flags instead of replacing them; `balancer status` shows \
         counts to compare with `ss -t`",
    )
}

/// What is attached to a cgroup and to those above it, from the inside out.
fn above(cgroup: &Path, attach_type: bpf_attach_type) -> io::Result<Vec<(PathBuf, Attached)>> {
    let mut levels = Vec::new();
    for path in cgroup.ancestors() {
        if !is_cgroup2(path)? {
            break;
        }
        let attached = bpf::prog_query(File::open(path)?, attach_type)?;
        levels.push((path.to_owned(), attached));
    }
    Ok(levels)
}

/// What is attached below a cgroup.
#[derive(Debug, Default)]
struct Below {
    /// The cgroups that have programs, the nearest first.
    levels: Vec<(PathBuf, Attached)>,
    /// There are more cgroups than were looked at.
    cut: bool,
}

/// Looks at so many cgroups below one. Those that vanish meanwhile are left out.
fn below(cgroup: &Path, attach_type: bpf_attach_type, most: usize) -> Below {
    let mut found = Below::default();
    // One that can't be listed is left out as well.
    let mut paths = cgroups(cgroup).filter_map(Result::ok).skip(1);
    for path in paths.by_ref().take(most) {
        let attached = File::open(&path).and_then(|file| bpf::prog_query(file, attach_type));
        if let Ok(attached) = attached
            && !attached.programs.is_empty()
        {
            found.levels.push((path, attached));
        }
    }
    found.cut = paths.next().is_some();
    found
}

/// The level that keeps a link from being attached to the innermost one, by the rules of
/// `hierarchy_allows_attach` and `__cgroup_bpf_attach` (kernel/bpf/cgroup.c): a program that allows
/// no others, here; one that allows nothing at all, above.
fn blocking(levels: &[(PathBuf, Attached)]) -> Option<&(PathBuf, Attached)> {
    let (innermost, outer) = levels.split_first()?;
    if !innermost.1.programs.is_empty() && innermost.1.flags & BPF_F_ALLOW_MULTI == 0 {
        return Some(innermost);
    }
    let decides = |level: &&(PathBuf, Attached)| {
        !level.1.programs.is_empty() || level.1.flags & BPF_F_ALLOW_MULTI != 0
    };
    let allowing = BPF_F_ALLOW_MULTI | BPF_F_ALLOW_OVERRIDE;
    outer
        .iter()
        .find(decides)
        .filter(|level| level.1.flags & allowing == 0)
}

fn sk_lookup(netns: &[GuardedNetns], ours: &HashSet<u32>) -> Check {
    const NAME: &str = "other sk_lookup";
    let mut others = Vec::new();
    let mut full = Vec::new();
    let mut unknown = Vec::new();
    for netns in netns {
        match bpf::prog_query(netns, BPF_SK_LOOKUP) {
            Ok(attached) => {
                let foreign = foreign(&attached, ours);
                if foreign.len() >= MOST_SK_LOOKUPS {
                    full.push(netns.label.clone());
                }
                let named = foreign
                    .into_iter()
                    .map(|name| format!("{name} in {}", netns.label));
                others.extend(named);
            }
            Err(error) => unknown.push(format!("{}: {error}", netns.label)),
        }
    }
    if !full.is_empty() {
        return Check::fail(
            NAME,
            format!("{MOST_SK_LOOKUPS} in {}", listing(&full)),
            "the kernel allows no more at one network namespace: `steer` can't be attached",
            "remove one of them (bpftool net, bpftool link)",
        );
    }
    if others.is_empty() && !unknown.is_empty() {
        let found = format!("can't be listed: {}", listing(&unknown));
        return Check::warn(
            NAME,
            found,
            "whether others choose sockets isn't known",
            "run as root",
        );
    }
    Check::warn_of(
        NAME,
        &others,
        ("none", "nobody else chooses sockets for connections"),
        "where it chooses a socket its choice wins: such connections are neither steered nor refused \
         (reason foreign-sk-lookup)",
        "see that it leaves the services' ports alone (bpftool prog, bpftool link)",
    )
}

/// The names of the programs that aren't ours.
fn foreign(attached: &Attached, ours: &HashSet<u32>) -> Vec<String> {
    let foreign = attached.programs.iter().filter(|id| !ours.contains(id));
    foreign.map(|id| described(*id, ours)).collect()
}

fn described(id: u32, ours: &HashSet<u32>) -> String {
    let info = bpf::prog_by_id(id).and_then(bpf::prog_info);
    match info.map(|info| info.name).unwrap_or_default() {
        name if name.is_empty() => format!("a program without a name (id {id})"),
        name if !ours.contains(&id) && Program::named(&name).is_some() => {
            format!("another balancer's {name} (id {id})")
        }
        name => format!("{name} (id {id})"),
    }
}

/// Ids of the programs that are pinned below a directory, themselves or through their links.
fn pinned_programs(directory: &Path, depth: usize) -> HashSet<u32> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(pinned_program(&entry.path()).ok().flatten());
        } else if depth > 0 {
            found.extend(pinned_programs(&entry.path(), depth - 1));
        }
    }
    found
}

fn pinned_program(pin: &Path) -> io::Result<Option<u32>> {
    let object = bpf::obj_get(pin)?;
    Ok(match Object::of(&object)? {
        Some(Object::Program) => Some(bpf::prog_info(&object)?.id),
        Some(Object::Link) => Some(bpf::link_program(&object)?),
        Some(Object::Map) | None => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::Hook,
        doctor::Status,
        sys::{bpffs::DetachedBpffs, netns},
    };
    use std::{
        os::fd::OwnedFd,
        sync::atomic::{AtomicU32, Ordering},
    };

    /// A directory that nobody else has, removed at the end.
    struct Own(PathBuf);

    impl Own {
        fn below(parent: &Path) -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("balancer-doctor-{}-{number}", std::process::id()));
            fs::create_dir(&path).expect("a directory of our own");
            Self(path)
        }

        fn cgroup() -> Self {
            Self::below(&cgroup2_mount().expect("cgroup2"))
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            let _ = fs::remove_dir(&self.0);
        }
    }

    fn program(hook: Hook, name: &str) -> (OwnedFd, u32) {
        let program = testbpf::idle(hook.program_type().into(), hook.attach_type(), name);
        let id = bpf::prog_info(&program).expect("info").id;
        (program, id)
    }

    fn guarded(label: &str) -> GuardedNetns {
        GuardedNetns {
            label: label.to_owned(),
            file: netns::tests::fresh(),
            for_backends_alone: false,
        }
    }

    fn none() -> HashSet<u32> {
        HashSet::new()
    }

    #[test]
    fn another_sk_lookup_program_is_named_with_its_namespace() {
        let netns = [guarded("left"), guarded("right")];
        assert_eq!(sk_lookup(&netns, &none()).status, Status::Ok);
        let (program, id) = program(Hook::SkLookup, "tubular");
        let _link = bpf::link_create(&program, &netns[1], BPF_SK_LOOKUP).expect("attach");
        let check = sk_lookup(&netns, &none());
        assert_eq!(
            (check.status, check.found),
            (Status::Warn, format!("tubular (id {id}) in right"))
        );
        assert_eq!(
            sk_lookup(&netns, &HashSet::from([id])).status,
            Status::Ok,
            "unless it is ours"
        );
    }

    #[test]
    fn another_balancers_program_is_told_as_such() {
        let netns = guarded("here");
        let (program, id) = program(Hook::SkLookup, "steer");
        let _link = bpf::link_create(&program, &netns, BPF_SK_LOOKUP).expect("attach");
        assert_eq!(
            sk_lookup(&[netns], &none()).found,
            format!("another balancer's steer (id {id}) in here")
        );
    }

    #[test]
    fn a_namespace_without_room_fails() {
        let netns = guarded("here");
        let (program, _) = program(Hook::SkLookup, "many");
        let _links: Vec<_> =
            std::iter::from_fn(|| bpf::link_create(&program, &netns, BPF_SK_LOOKUP).ok()).collect();
        let check = sk_lookup(&[netns], &none());
        assert_eq!(
            (check.status, check.found.as_str()),
            (Status::Fail, "64 in here")
        );
    }

    #[test]
    fn another_sock_ops_program_is_named_here_and_above() {
        let outer = Own::cgroup();
        let inner = Own::below(&outer.0);
        assert_eq!(sock_ops(&inner.0, &none()).status, Status::Ok);
        let (program, id) = program(Hook::SockOps, "tcptuner");
        let _link = bpf::link_create(
            &program,
            File::open(&outer.0).expect("open"),
            BPF_CGROUP_SOCK_OPS,
        )
        .expect("attach");
        for cgroup in [&outer.0, &inner.0] {
            let check = sock_ops(cgroup, &none());
            let expected = format!("tcptuner (id {id}) at {}", outer.0.display());
            assert_eq!((check.status, check.found), (Status::Warn, expected));
            assert_eq!(
                sock_ops(cgroup, &HashSet::from([id])).status,
                Status::Ok,
                "unless it is ours"
            );
        }
    }

    #[test]
    fn another_sock_ops_program_is_named_below() {
        let outer = Own::cgroup();
        let inner = Own::below(&outer.0);
        let innermost = Own::below(&inner.0);
        let empty = Own::below(&outer.0);
        let (program, id) = program(Hook::SockOps, "podtuner");
        let attach = |cgroup: &Own| {
            let cgroup = File::open(&cgroup.0).expect("open");
            bpf::link_create(&program, cgroup, BPF_CGROUP_SOCK_OPS).expect("attach")
        };
        let at = |cgroup: &Own| format!("podtuner (id {id}) at {}", cgroup.0.display());
        let deep = attach(&innermost);
        let check = sock_ops(&outer.0, &none());
        assert_eq!((check.status, check.found), (Status::Warn, at(&innermost)));
        let _near = attach(&inner);
        assert_eq!(
            sock_ops(&outer.0, &none()).found,
            format!("{}, {}", at(&inner), at(&innermost)),
            "the nearest first"
        );
        assert_eq!(
            sock_ops(&outer.0, &HashSet::from([id])).status,
            Status::Ok,
            "unless it is ours"
        );
        assert_eq!(
            sock_ops(&empty.0, &none()).status,
            Status::Ok,
            "beside is not below"
        );
        bpf::link_detach(deep).expect("detach");
        assert_eq!(sock_ops(&outer.0, &none()).found, at(&inner));
    }

    #[test]
    fn programs_that_come_before_ours_at_connect_are_named() {
        let outer = Own::cgroup();
        let inner = Own::below(&outer.0);
        let below = Own::below(&inner.0);
        let attach = |(program, _): &(OwnedFd, u32), cgroup: &Own| {
            let cgroup = File::open(&cgroup.0).expect("open");
            bpf::link_create(program, cgroup, BPF_CGROUP_INET6_CONNECT).expect("attach")
        };
        let [first, own, late, last, pods] =
            ["first", "place", "late", "last", "pods"].map(|name| program(Hook::Connect6, name));
        let _links = [
            attach(&first, &inner),
            attach(&own, &inner),
            attach(&late, &inner),
            attach(&last, &outer),
            attach(&pods, &below),
        ];
        let check = connect(&inner.0, &HashSet::from([own.1]));
        let expected = format!(
            "first (id {}) at {}, pods (id {}) at {}",
            first.1,
            inner.0.display(),
            pods.1,
            below.0.display()
        );
        assert_eq!((check.status, check.found), (Status::Warn, expected));
        assert_eq!(
            connect(&below.0, &HashSet::from([pods.1])).status,
            Status::Ok
        );
    }

    #[test]
    fn one_at_connect_that_allows_no_others_is_named_and_no_failure() {
        let outer = Own::cgroup();
        let inner = Own::below(&outer.0);
        let (exclusive, id) = program(Hook::Connect4, "exclusive");
        let cgroup = File::open(&outer.0).expect("open");
        testbpf::cgroup_attach(&exclusive, &cgroup, BPF_CGROUP_INET4_CONNECT, 0).expect("attach");
        let check = connect(&inner.0, &none());
        assert_eq!(check.status, Status::Warn);
        assert!(
            check.found.contains(&format!("exclusive (id {id})")),
            "{check:?}"
        );
        testbpf::cgroup_detach(&exclusive, &cgroup, BPF_CGROUP_INET4_CONNECT).expect("detach");
        assert_eq!(connect(&inner.0, &none()).status, Status::Ok);
    }

    #[test]
    fn one_below_that_allows_no_others_is_no_failure() {
        let outer = Own::cgroup();
        let inner = Own::below(&outer.0);
        let (exclusive, id) = program(Hook::SockOps, "exclusive");
        let cgroup = File::open(&inner.0).expect("open");
        testbpf::cgroup_attach(&exclusive, &cgroup, BPF_CGROUP_SOCK_OPS, 0).expect("attach");
        let check = sock_ops(&outer.0, &none());
        let expected = format!("exclusive (id {id}) at {}", inner.0.display());
        assert_eq!((check.status, check.found), (Status::Warn, expected));
        testbpf::cgroup_detach(&exclusive, &cgroup, BPF_CGROUP_SOCK_OPS).expect("detach");
        assert_eq!(sock_ops(&outer.0, &none()).status, Status::Ok);
    }

    #[test]
    fn the_look_at_cgroups_below_is_bounded() {
        let outer = Own::cgroup();
        let _inner: Vec<_> = (0..4).map(|_| Own::below(&outer.0)).collect();
        let below = |path: &Path, most| below(path, BPF_CGROUP_SOCK_OPS, most);
        assert!(!below(&outer.0, 4).cut);
        let cut = below(&outer.0, 3);
        assert!(cut.cut);
        assert_eq!(beside(Vec::new(), cut, &none()).status, Status::Warn);
        assert!(!below(Path::new("/no/such/cgroup"), 1).cut);
    }

    /// What doctor says must be what the kernel does.
    #[test]
    fn a_cgroup_that_allows_no_second_program_fails_as_the_kernel_does() {
        let (exclusive, _) = program(Hook::SockOps, "exclusive");
        let (second, _) = program(Hook::SockOps, "second");
        for (flags, here, below) in [
            (0, Status::Fail, Status::Fail),
            (BPF_F_ALLOW_OVERRIDE, Status::Fail, Status::Ok),
            (BPF_F_ALLOW_MULTI, Status::Ok, Status::Ok),
        ] {
            let outer = Own::cgroup();
            let inner = Own::below(&outer.0);
            testbpf::cgroup_attach(
                &exclusive,
                File::open(&outer.0).expect("open"),
                BPF_CGROUP_SOCK_OPS,
                flags,
            )
            .expect("attach");
            for (cgroup, expected) in [(&outer.0, here), (&inner.0, below)] {
                let check = sock_ops(cgroup, &none());
                assert_eq!(
                    check.status == Status::Fail,
                    expected == Status::Fail,
                    "flags {flags}: {check:?}"
                );
                let link = bpf::link_create(
                    &second,
                    File::open(cgroup).expect("open"),
                    BPF_CGROUP_SOCK_OPS,
                );
                assert_eq!(
                    link.is_err(),
                    expected == Status::Fail,
                    "flags {flags} at {}: {link:?}",
                    cgroup.display()
                );
                if expected == Status::Fail {
                    assert!(check.found.contains("exclusive"), "{check:?}");
                }
            }
        }
    }

    #[test]
    fn pinned_programs_and_links_are_ours() {
        let bpffs = DetachedBpffs::new().expect("a BPF file system");
        let state = Own::below(bpffs.path());
        let inner = Own::below(&state.0);
        let ((first, first_id), (second, second_id)) = (
            program(Hook::SkLookup, "first"),
            program(Hook::SkLookup, "second"),
        );
        let netns = guarded("here");
        let link = bpf::link_create(&second, &netns, BPF_SK_LOOKUP).expect("attach");
        let pins = [state.0.join("program"), inner.0.join("link")];
        bpf::obj_pin(&first, &pins[0]).expect("pin");
        bpf::obj_pin(&link, &pins[1]).expect("pin");
        let found = pinned_programs(&state.0, PIN_DEPTH);
        for pin in &pins {
            fs::remove_file(pin).expect("unpin");
        }
        assert_eq!(found, HashSet::from([first_id, second_id]));
        assert!(pinned_programs(&bpffs.path().join("no-such-balancer"), PIN_DEPTH).is_empty());
    }

    #[test]
    fn a_cgroup_that_is_none_fails() {
        let directory = tempfile::tempdir().expect("a directory");
        for path in [
            directory.path(),
            Path::new("/no/such/cgroup"),
            Path::new("/proc/self/status"),
        ] {
            let check = cgroup(Some(path)).expect_err("no cgroup");
            assert_eq!(check.status, Status::Fail);
            assert!(
                check.found.contains(path.to_str().expect("text")),
                "{check:?}"
            );
        }
        let own = Own::cgroup();
        assert_eq!(cgroup(Some(&own.0)).expect("a cgroup"), own.0);
        assert_eq!(
            cgroup(None).expect("the root"),
            cgroup2_mount().expect("cgroup2")
        );
    }
}
