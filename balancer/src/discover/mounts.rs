//! Where cgroup2 and bpffs are mounted.

use std::{
    ffi::OsString,
    fs, io,
    os::{fd::AsRawFd as _, unix::ffi::OsStringExt as _},
    path::{Component, Path, PathBuf},
};

use crate::sys::limits::present;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs},
};

/// Of the calling thread, which may be in another mount namespace than the others.
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";
/// Where every distribution mounts bpffs.
const BPFFS: &str = "/sys/fs/bpf";

/// One line of `/proc/PID/mountinfo`, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    id: u64,
    /// Which directory of the file system is mounted.
    root: PathBuf,
    /// The directory that it is mounted on.
    point: PathBuf,
    kind: String,
    /// Whether what is mounted on it is seen in other mount namespaces too.
    shared: bool,
    /// Whether it gets what is mounted elsewhere and hands nothing on, as in a container.
    only_receives: bool,
}

/// The root of the cgroup2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid
/// machine.
///
/// # Errors
/// Where none is mounted in this mount namespace.
pub fn cgroup2_mount() -> Result<PathBuf> {
    let text = fs::read(MOUNTINFO)
        .with_context(|| format!("cannot read {MOUNTINFO}: is /proc mounted?"))?;
    first_cgroup2(cgroup2(mounts(&text)), is_cgroup2)
}

/// The first path that is a cgroup. Where one before it could not be looked at, nobody knows which
/// is the first.
fn first_cgroup2(
    paths: impl Iterator<Item = PathBuf>,
    is_cgroup2: impl Fn(&Path) -> io::Result<bool>,
) -> Result<PathBuf> {
    for path in paths {
        let is_it = is_cgroup2(&path)
            .with_context(|| format!("cannot look at the cgroup2 mount {}", path.display()))?;
        if is_it {
            return Ok(path);
        }
    }
    bail!(
        "no cgroup2 file system is mounted here. A machine with cgroup v1 alone: boot it with \
         systemd.unified_cgroup_hierarchy=1, or mount one beside it (mount -t cgroup2 none \
         /sys/fs/cgroup/unified); in a container: make the machine's visible (-v \
         /sys/fs/cgroup:/sys/fs/cgroup)"
    )
}

/// The cgroup whose sockets are counted: the chosen one, or the root of the hierarchy.
///
/// # Errors
/// Where the chosen one is no cgroup, or no hierarchy is mounted.
pub fn cgroup(chosen: Option<&Path>) -> Result<PathBuf> {
    let Some(path) = chosen else {
        let root = cgroup2_mount()?;
        ensure_more_than_own_container(&root)?;
        return Ok(root);
    };
    let place = path.display();
    let below = cgroup2_mount().map_or_else(
        |_| String::new(),
        |mount| format!(" below {}", mount.display()),
    );
    match is_cgroup2(path) {
        Ok(true) => Ok(path.to_owned()),
        Ok(false) if path.exists() => bail!(
            "{place} is no cgroup2 directory: give one{below} with --cgroup, or leave --cgroup out to count \
             every process"
        ),
        Ok(false) => bail!(
            "there is no cgroup {place}: make it first (mkdir, a directory{below}), or leave --cgroup out to \
             count every process"
        ),
        Err(error) => Err(error).with_context(|| format!("cannot look at the cgroup {place}")),
    }
}

/// Who is in a cgroup namespace of its own sees its own cgroup as the root of the hierarchy: to
/// count there would be to count this container alone (`cgroup_namespaces(7)`).
fn ensure_more_than_own_container(root: &Path) -> Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let mounted = fs::read(MOUNTINFO).with_context(|| format!("cannot read {MOUNTINFO}"))?;
    // The real root has no type (`cgroup_base_files`, kernel/cgroup/cgroup.c).
    let is_real_root = !root.join("cgroup.type").exists();
    ensure!(
        is_real_root || !is_own_container(&mounts(&mounted), root, &own),
        "{} is the cgroup of this container alone, and nothing else on the machine would be \
         counted: start it with the machine's cgroups (docker run --cgroupns=host -v \
         /sys/fs/cgroup:/sys/fs/cgroup), or name the cgroup that is meant with --cgroup",
        root.display()
    );
    Ok(())
}

/// Whether the root of a cgroup namespace is mounted there, and this process is in it itself; `own`
/// is `/proc/self/cgroup`. On a node that is a container itself it is below.
fn is_own_container(mounts: &[Mount], path: &Path, own: &str) -> bool {
    let mounted =
        (mounts.iter().rev()).find(|mount| mount.kind == "cgroup2" && mount.point == path);
    let is_root = mounted.is_some_and(|mount| mount.root == Path::new("/"));
    is_root && own.lines().any(|line| line == "0::/")
}

/// Whether a path is a cgroup of the cgroup2 hierarchy. Where nothing has that name it is none.
///
/// # Errors
/// Where the path can't be looked at.
pub fn is_cgroup2(path: &Path) -> io::Result<bool> {
    if !present(fs::metadata(path))?.is_some_and(|found| found.is_dir()) {
        return Ok(false);
    }
    let found = present(statfs(path).map_err(io::Error::from))?;
    Ok(found.is_some_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC))
}

/// Whether a path, or what exists of it, lies on a BPF file system.
///
/// # Errors
/// Where the path can't be looked at.
pub fn is_bpffs(path: &Path) -> Result<bool> {
    let existing = path
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .with_context(|| format!("nothing exists of {}", path.display()))?;
    let found = statfs(existing)
        .with_context(|| format!("cannot tell the file system of {}", existing.display()))?;
    Ok(found.filesystem_type() == BPF_FS_MAGIC)
}

/// Makes sure that a state directory can be made on a BPF file system: mounts one at `/sys/fs/bpf`
/// where the directory is to be below it and there is none. Returns whether it did.
///
/// # Errors
/// Where the directory is elsewhere and not on bpffs, where the mount would be one of this
/// container alone, or mounting fails.
pub fn ensure_bpffs(state_dir: &Path) -> Result<bool> {
    ensure_bpffs_on(state_dir, Path::new("/proc/1/root"))
}

/// The same on a machine whose files, as its first process sees them, are below `machine`.
fn ensure_bpffs_on(state_dir: &Path, machine: &Path) -> Result<bool> {
    if is_bpffs(state_dir)? {
        return Ok(false);
    }
    // `..` may lead out of it again, and what is pinned in one that is there must not be covered.
    let leads_out = state_dir
        .components()
        .any(|part| part == Component::ParentDir);
    if leads_out || !state_dir.starts_with(BPFFS) || is_bpffs(Path::new(BPFFS))? {
        return Err(anyhow!(
            "{} is not on a BPF file system: choose a directory below {BPFFS}, or mount one there (mount -t bpf bpf DIRECTORY)",
            state_dir.display()
        ));
    }
    if stays_here(Path::new(BPFFS))? || is_in_a_container() {
        let there = machine.join(BPFFS.trim_start_matches('/'));
        if is_bpffs(&there).unwrap_or(false) {
            bail!(
                "a BPF file system is mounted at {BPFFS} on this machine, and this container, or \
                 service, was started before that and does not see it: start it again (on \
                 Kubernetes, delete the daemon's pod of this node)"
            );
        }
        bail!(
            "no BPF file system is mounted at {BPFFS} on this machine, and one that is mounted from this container, or \
             service, would end with it, with the data plane in it: mount one on the machine itself (mount -t bpf bpf \
             {BPFFS}; systemd does so when it starts) and start this again, or, on Kubernetes, install with \
             `bpffs.mountPropagation: Bidirectional`"
        );
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700"))
        .with_context(|| format!("cannot mount the BPF file system at {BPFFS}: are CAP_SYS_ADMIN and a writable /sys there?"))?;
    Ok(true)
}

/// Whether what is mounted on a path is seen in this mount namespace alone, although the path is
/// the machine's: mounts come in from there, and none go back (`MS_SLAVE`, `mount_namespaces(7)`).
///
/// # Errors
/// Where the mounts can't be read.
pub fn stays_here(path: &Path) -> Result<bool> {
    let text = fs::read(MOUNTINFO)
        .with_context(|| format!("cannot read {MOUNTINFO}: is /proc mounted?"))?;
    let around = mount_id(path)
        .with_context(|| format!("cannot tell which mount {} is on", path.display()))?;
    let mut mounts = mounts(&text).into_iter();
    Ok(mounts.any(|mount| mount.id == around && mount.only_receives))
}

/// Whether this process has another mount namespace than the first one that it sees, and what it
/// mounts is not handed on: `/` is shared where it is (`mount_namespaces(7)`).
fn is_in_a_container() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let (own, first) = (namespace("self"), namespace("1"));
    let is_other = own.is_some() && first.is_some() && own != first;
    is_other && !is_handed_on(Path::new(BPFFS)).unwrap_or(false)
}

/// Whether what is mounted on a path is seen in other mount namespaces too.
fn is_handed_on(path: &Path) -> Result<bool> {
    let text = fs::read(MOUNTINFO)
        .with_context(|| format!("cannot read {MOUNTINFO}: is /proc mounted?"))?;
    let around = mount_id(path)
        .with_context(|| format!("cannot tell which mount {} is on", path.display()))?;
    let mut mounts = mounts(&text).into_iter();
    Ok(mounts.any(|mount| mount.id == around && mount.shared))
}

/// The mount that a directory is on: by its path it could be one that another one covers.
fn mount_id(path: &Path) -> Result<u64> {
    let directory = fs::File::open(path)?;
    let info = format!("/proc/thread-self/fdinfo/{}", directory.as_raw_fd());
    let info = fs::read_to_string(&info).with_context(|| format!("cannot read {info}"))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    Ok(id.context("the kernel names no mount")?.trim().parse()?)
}

/// Where cgroup2 is mounted, in the order of preference: the whole hierarchy before a part of it,
/// and among equals the oldest mount, since later ones are as a rule copies for a chroot or a
/// container. Another file system may have been mounted over any of them.
fn cgroup2(mounts: Vec<Mount>) -> impl Iterator<Item = PathBuf> {
    let of_kind = mounts.into_iter().filter(|mount| mount.kind == "cgroup2");
    let (whole, parts): (Vec<_>, Vec<_>) = of_kind.partition(|mount| mount.root == Path::new("/"));
    whole.into_iter().chain(parts).map(|mount| mount.point)
}

fn mounts(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(mount_of)
        .collect()
}

/// `36 35 98:0 /root /point rw,noatime shared:1 - ext4 /dev/root rw` (proc(5)): the optional fields
/// end with a dash.
fn mount_of(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let root = unescape(fields.nth(2)?);
    let point = unescape(fields.next()?);
    let optional: Vec<_> = fields.by_ref().take_while(|field| *field != b"-").collect();
    let any = |prefix: &[u8]| optional.iter().any(|field| field.starts_with(prefix));
    let kind = fields.next()?;
    Some(Mount {
        id,
        root,
        point,
        kind: String::from_utf8_lossy(kind).into_owned(),
        shared: any(b"shared:"),
        only_receives: any(b"master:") && !any(b"shared:"),
    })
}

/// Blanks and backslashes of a path are written as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        match after.first_chunk().copied().and_then(octal) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

fn octal(digits: [u8; 3]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        mount::{MntFlags, umount2},
        sched::{CloneFlags, unshare},
    };
    use proptest::prelude::*;

    const HYBRID: &str = "\
        31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:9 master:2 - cgroup cgroup rw,name=systemd\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    fn chosen(text: &str) -> Option<PathBuf> {
        cgroup2(mounts(text.as_bytes())).next()
    }

    #[test]
    fn hybrid_and_unified_machines_are_understood() {
        assert_eq!(chosen(HYBRID), Some("/sys/fs/cgroup/unified".into()));
        let unified =
            "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(chosen(unified), Some("/sys/fs/cgroup".into()));
        let part = "50 1 0:26 /kubepods /host rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            chosen(&format!("{unified}{part}")),
            Some("/sys/fs/cgroup".into())
        );
        assert_eq!(
            chosen(&format!("{part}{unified}")),
            Some("/sys/fs/cgroup".into())
        );
        assert_eq!(chosen(part), Some("/host".into()));
        // The machine's, seen from a cgroup namespace of a container.
        let from_below = "30 23 0:26 /../.. /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        assert_eq!(chosen(from_below), Some("/sys/fs/cgroup".into()));
        let copy = "90 1 0:26 / /chroot/sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            chosen(&format!("{unified}{copy}")),
            Some("/sys/fs/cgroup".into())
        );
        assert_eq!(
            chosen("22 27 0:21 / /proc rw,relatime - proc proc rw\n"),
            None
        );
    }

    #[test]
    fn the_cgroup_of_a_container_is_told_from_that_of_a_node() {
        let at = |root: &str| {
            let line = format!("30 23 0:26 {root} /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n");
            mounts(line.as_bytes())
        };
        let path = Path::new("/sys/fs/cgroup");
        // `docker run`.
        assert!(is_own_container(&at("/"), path, "0::/\n"));
        // A node that is a container: its daemon is in a pod.
        assert!(!is_own_container(
            &at("/"),
            path,
            "0::/kubelet/kubepods/pod7/c\n"
        ));
        // The machine's, seen from a cgroup namespace of a container.
        assert!(!is_own_container(&at("/../.."), path, "0::/\n"));
        assert!(!is_own_container(&at("/"), Path::new("/other"), "0::/\n"));
    }

    #[test]
    fn blanks_in_a_path_are_read() {
        let text = "1 2 0:1 / /mnt/a\\040b\\134c\\9 rw - cgroup2 none rw";
        assert_eq!(chosen(text), Some("/mnt/a b\\c\\9".into()));
    }

    #[test]
    fn a_mount_that_cannot_be_looked_at_is_not_passed_over() {
        let paths = || ["/covered", "/a", "/b"].map(PathBuf::from).into_iter();
        let found = first_cgroup2(paths(), |path| Ok(path != Path::new("/covered")));
        assert_eq!(found.expect("the first"), Path::new("/a"));
        let found = first_cgroup2(paths(), |path| match path.to_str() {
            Some("/a") => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            _ => Ok(path == Path::new("/b")),
        });
        let error = format!("{:#}", found.expect_err("it may be /a"));
        assert!(
            error.starts_with("cannot look at the cgroup2 mount /a: "),
            "{error}"
        );
        let none = first_cgroup2(paths(), |_| Ok(false))
            .expect_err("none")
            .to_string();
        assert!(
            none.starts_with("no cgroup2 file system is mounted"),
            "{none}"
        );
        assert!(is_cgroup2(Path::new(&"/x".repeat(5_000))).is_err());
        assert!(!is_cgroup2(Path::new("/no/such/cgroup")).expect("absent"));
    }

    #[test]
    fn this_machine_has_a_hierarchy() {
        let found = cgroup2_mount().expect("cgroup2 is mounted");
        assert!(
            found.join("cgroup.controllers").exists(),
            "{}",
            found.display()
        );
    }

    #[test]
    fn a_cgroup_that_is_none_is_told_from_one_that_is_missing() {
        let mount = cgroup2_mount().expect("cgroup2 is mounted");
        assert_eq!(cgroup(None).expect("the root"), mount);
        assert_eq!(cgroup(Some(&mount)).expect("a cgroup"), mount);
        for (path, words) in [
            ("/tmp", "/tmp is no cgroup2 directory: give one below"),
            ("/proc/self/status", "is no cgroup2 directory"),
            (
                "/no/such/cgroup",
                "there is no cgroup /no/such/cgroup: make it first",
            ),
        ] {
            let error = cgroup(Some(Path::new(path))).expect_err("none").to_string();
            assert!(
                error.contains(words) && error.contains("--cgroup"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_path_outside_bpffs_is_told_and_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let below = directory.path().join("not/there/yet");
        assert!(!is_bpffs(&below).expect("it can be looked at"));
        let error = ensure_bpffs(&below).expect_err("not on bpffs").to_string();
        assert!(error.contains("below /sys/fs/bpf"), "{error}");
    }

    #[test]
    fn a_path_that_leads_out_of_bpffs_mounts_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let outside = directory.path().strip_prefix("/").expect("absolute");
        let state = Path::new("/sys/fs/bpf/../../..").join(outside).join("q");
        let before = fs::read("/proc/self/mountinfo").expect("/proc is mounted");
        ensure_bpffs(&state).expect_err("not on bpffs");
        assert!(before == fs::read("/proc/self/mountinfo").expect("/proc is mounted"));
    }

    /// In a mount namespace of its own, so that nothing stays mounted.
    #[test]
    fn bpffs_is_mounted_where_it_is_missing() {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private mounts");
            let state = Path::new("/sys/fs/bpf/no-such-balancer/state");
            while is_bpffs(state).expect("it can be looked at") {
                umount2(BPFFS, MntFlags::MNT_DETACH).expect("unmounted");
            }
            assert!(ensure_bpffs(state).expect("mounted"));
            assert!(is_bpffs(state).expect("it can be looked at"));
            assert!(!ensure_bpffs(state).expect("nothing to do"));
        };
        std::thread::spawn(work).join().expect("no panic");
    }

    #[test]
    fn a_mount_that_hands_nothing_on_is_told_from_others() {
        for (optional, expected) in [
            ("", false),
            ("shared:5 ", false),
            ("shared:5 master:2 ", false),
            ("master:2 ", true),
            ("master:2 propagate_from:1 ", true),
        ] {
            let line = format!("9 8 0:21 /fs/bpf /sys/fs/bpf rw {optional}- sysfs sysfs rw");
            let mount = mount_of(line.as_bytes()).expect("a mount");
            assert_eq!(mount.only_receives, expected, "{line}");
            assert_eq!(mount.kind, "sysfs");
        }
    }

    /// As in a container that is not privileged, on a machine without a BPF file system.
    #[test]
    fn bpffs_is_not_mounted_where_only_a_container_would_see_it() {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            let set = |place: &Path, flags: MsFlags| {
                mount(None::<&str>, place, None::<&str>, flags, None::<&str>).expect("set");
            };
            let bind = |from: &Path, to: &Path| {
                mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("bound");
            };
            set(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE);
            let machine = tempfile::tempdir().expect("a directory");
            let (machine, container) = (machine.path(), Path::new("/sys/fs"));
            // Without what is mounted below it, a BPF file system among others.
            bind(container, machine);
            set(machine, MsFlags::MS_SHARED);
            bind(machine, container);
            set(container, MsFlags::MS_SLAVE);
            let before = fs::read(MOUNTINFO).expect("/proc is mounted");
            let state = Path::new("/sys/fs/bpf/no-such-balancer/state");
            let refused = |machine: &Path| {
                let refused = ensure_bpffs_on(state, machine);
                refused.expect_err("not here").to_string()
            };
            let error = refused(Path::new("/nowhere"));
            assert!(error.contains("on the machine itself"), "{error}");
            // The thread that began this process is still outside, where there is one.
            let error = refused(Path::new("/proc/self/root"));
            assert!(error.contains("start it again"), "{error}");
            assert!(before == fs::read(MOUNTINFO).expect("/proc is mounted"));
            umount2(machine, MntFlags::MNT_DETACH).expect("unmounted");
        };
        std::thread::spawn(work).join().expect("no panic");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = mounts(&bytes);
        }
    }
}
