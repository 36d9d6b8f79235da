//! The real Kubernetes that the tests run: all of its programs in one, `kubeall`, built from
//! `tests/kit/kubernetes/programs`.
//!
//! It takes Go and about ten minutes of a processor, once: it is kept in `<target>/kubernetes`. A
//! directory with a packed copy of what would be built saves even that ([`CACHE`]). The tests run
//! the program as root: a copy is used only where nobody else can change it and the tree has its
//! checksum ([`SUMS`]).

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{command, machine, places};

/// Names a directory that may hold a packed copy, [`packed_name`]. Without it none is looked for.
const CACHE: &str = "BALANCER_CACHE";
/// The checksums of the programs that packed copies may hold, as `sha256sum` prints them.
const SUMS: &str = "kubeall.sha256";
/// What makes the program: all of it, because `go.sum` holds the hash of every module.
const SOURCES: [&str; 3] = ["go.mod", "go.sum", "main.go"];
/// The oldest Go that can build it, of `go.mod`.
pub const GO_MINOR: u32 = 24;
/// The oldest Go that can fetch that one by itself (<https://go.dev/doc/toolchain>).
const GO_MINOR_THAT_FETCHES: u32 = 21;

/// The program, made if it is not there yet.
///
/// # Errors
/// When there is no copy to unpack and it can't be built.
pub fn program() -> Result<PathBuf> {
    let program = kept()?;
    if command::is_executable(&program) {
        return Ok(program);
    }
    let directory = program.parent().context("it is in a directory")?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    // Under another name until it is complete: what is there under its own name is trusted from
    // then on.
    let unfinished = directory.join(format!("kubeall.{}", std::process::id()));
    let made = make(&unfinished).and_then(|()| {
        fs::rename(&unfinished, &program)
            .with_context(|| format!("cannot put {} into its place", program.display()))
    });
    if made.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    made.map(|()| program)
}

/// Whether [`program`] needs no Go: it is there, or a packed copy of it.
pub fn needs_no_go() -> bool {
    kept().is_ok_and(|program| command::is_executable(&program))
        || version().is_ok_and(|version| packed(&version).is_some())
}

/// Debian's packages of a Go that is new enough; the last one is in Debian 12's backports.
const DEBIAN_PACKAGES: [&str; 3] = ["golang-1.25-go", "golang-1.24-go", "golang-1.23-go"];

/// A Go that can build it: the one in the path, the one that go.dev tells to unpack to /usr/local,
/// or Debian's.
pub fn go() -> Option<PathBuf> {
    let others = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let mut debian: Vec<_> = others
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("go-1."))
        .map(|entry| entry.path().join("bin/go"))
        .collect();
    debian.sort();
    [command::find("go"), Some("/usr/local/go/bin/go".into())]
        .into_iter()
        .flatten()
        .chain(debian.into_iter().rev())
        .find(|go| is_usable(go))
}

fn make(program: &Path) -> Result<()> {
    let version = version()?;
    if let Some(packed) = packed(&version) {
        match unpack(&packed, program, &version) {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("note: {} is not used: {error:#}", packed.display()),
        }
    }
    build(program, &version)
}

/// Where it is kept: apart from one of other sources.
fn kept() -> Result<PathBuf> {
    let mut hash = Sha256::new();
    for source in SOURCES {
        let path = sources().join(source);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        hash.update(bytes.len().to_le_bytes());
        hash.update(&bytes);
    }
    let hash = u64::from_be_bytes(*hash.finalize().first_chunk().context("a hash is longer")?);
    Ok(places::target()?
        .join("kubernetes")
        .join(format!("{hash:016x}"))
        .join("kubeall"))
}

fn sources() -> PathBuf {
    places::workspace().join("tests/kit/kubernetes/programs")
}

/// The version of Kubernetes that `go.mod` names: `v1.34.4`.
fn version() -> Result<String> {
    let path = sources().join("go.mod");
    let module =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let version = version_in(&module)
        .with_context(|| format!("{} does not require k8s.io/kubernetes", path.display()))?;
    Ok(version.to_owned())
}

fn version_in(module: &str) -> Option<&str> {
    let mut words = module.split_whitespace();
    words.find(|word| *word == "k8s.io/kubernetes")?;
    words.next()
}

fn packed(version: &str) -> Option<PathBuf> {
    let directory = PathBuf::from(std::env::var_os(CACHE)?);
    let packed = directory.join(format!("{}.zst", packed_name(version)?));
    packed.is_file().then_some(packed)
}

/// What a copy is called, before it is packed. None: nobody packs it for this machine's
/// architecture.
fn packed_name(version: &str) -> Option<String> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        _ => return None,
    };
    Some(format!("kubeall-{version}-linux-{architecture}"))
}

fn unpack(packed: &Path, program: &Path, version: &str) -> Result<()> {
    println!("Unpacking Kubernetes {version} from {}", packed.display());
    let from = File::open(packed).context("cannot open it")?;
    only_ours(&from)?;
    let sum = unpack_to(from, program)?;
    let name = packed_name(version).context("it is for another architecture")?;
    let sums = sources().join(SUMS);
    let known =
        fs::read_to_string(&sums).with_context(|| format!("cannot read {}", sums.display()))?;
    ensure!(
        is_listed(&known, &name, &sum),
        "it holds a program with the SHA-256 {sum}, which is not in {}",
        sums.display()
    );
    // Not before: until here nobody can start it.
    fs::set_permissions(program, Permissions::from_mode(0o755))
        .context("cannot make it executable")?;
    check(program, version)
}

/// Fails for a file that somebody else could change before it is read, or while it is.
fn only_ours(file: &File) -> Result<()> {
    let found = file.metadata().context("cannot tell whose it is")?;
    is_ours(found.uid(), found.mode(), machine::effective_user())
}

fn is_ours(owner: u32, mode: u32, own: Option<u32>) -> Result<()> {
    ensure!(
        owner == 0 || Some(owner) == own,
        "it belongs to user {owner}: let it be root's or your own"
    );
    ensure!(
        mode & 0o022 == 0,
        "others may write to it (mode {:o}): chmod go-w",
        mode & 0o7777
    );
    Ok(())
}

/// Unpacks into a file that nobody can execute; returns the SHA-256 of what is in it.
fn unpack_to(packed: File, program: &Path) -> Result<String> {
    let mut from = ruzstd::decoding::StreamingDecoder::new(packed).context("it is not zstd")?;
    let to = File::create(program).with_context(|| format!("cannot make {}", program.display()))?;
    to.set_permissions(Permissions::from_mode(0o600))
        .context("cannot close it to others")?;
    let mut to = Summed {
        to,
        hash: Sha256::new(),
    };
    io::copy(&mut from, &mut to).context("cannot unpack it")?;
    Ok(oci_archive::hex(&to.hash.finalize()))
}

/// A file, and the SHA-256 of what is written to it.
struct Summed {
    to: File,
    hash: Sha256,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Whether a list as `sha256sum` prints it has this sum for this name.
fn is_listed(list: &str, name: &str, sum: &str) -> bool {
    let lines = list.lines().map(|line| line.split_whitespace());
    lines
        .map(Iterator::collect::<Vec<_>>)
        .any(|words| words == [sum, name])
}

fn build(program: &Path, version: &str) -> Result<()> {
    let Some(go) = go() else {
        bail!(
            "no Go here can build Kubernetes for the tests:\n{}",
            go_by_hand()
        );
    };
    println!("Building Kubernetes {version} for the tests: about ten minutes, this once");
    let mut build = Command::new(go);
    build
        .current_dir(sources())
        .env("CGO_ENABLED", "0")
        .args(["build", "-trimpath", "-buildvcs=false", "-ldflags"])
        .arg(linker_flags(version))
        .arg("-o")
        .arg(program)
        .arg(".");
    command::run(&mut build).context(
        "Kubernetes for the tests was not built: does the module proxy answer (`go env GOPROXY`)?",
    )?;
    check(program, version)
}

/// The version is not in the sources: Kubernetes' own build sets these variables
/// (`hack/lib/version.sh`).
fn linker_flags(version: &str) -> String {
    let minor = version.split('.').nth(1).unwrap_or_default();
    let settings = [
        format!("gitVersion={version}"),
        "gitMajor=1".to_owned(),
        format!("gitMinor={minor}"),
        "gitTreeState=clean".to_owned(),
    ];
    let packages = [
        "k8s.io/component-base/version",
        "k8s.io/client-go/pkg/version",
    ];
    let set = packages.iter().flat_map(|package| {
        let settings = settings.iter();
        settings.map(move |setting| format!("-X {package}.{setting}"))
    });
    let flags: Vec<_> = ["-s -w".to_owned()].into_iter().chain(set).collect();
    flags.join(" ")
}

/// Whether the program runs here and is of that version.
fn check(program: &Path, version: &str) -> Result<()> {
    // By its name: it is called something else until it is known to be whole.
    let mut ask = Command::new(program);
    std::os::unix::process::CommandExt::arg0(&mut ask, "kubeall");
    let answer = command::output(ask.args(["kube-apiserver", "--version"]));
    let answer = answer.context("it does not run here")?;
    ensure!(
        answer.trim() == format!("Kubernetes {version}"),
        "it says that it is {}, while {version} is wanted",
        answer.trim()
    );
    Ok(())
}

fn is_usable(go: &Path) -> bool {
    let Some(answer) = command::output(Command::new(go).current_dir("/").args([
        "env",
        "GOVERSION",
        "GOTOOLCHAIN",
    ])) else {
        return false;
    };
    let mut lines = answer.lines();
    let minor = lines.next().and_then(minor);
    let fetches = lines.next().is_some_and(|chosen| chosen == "auto");
    minor.is_some_and(|minor| minor >= GO_MINOR || fetches && minor >= GO_MINOR_THAT_FETCHES)
}

/// Of a Go 1.
fn minor(version: &str) -> Option<u32> {
    let minor = version.strip_prefix("go1.")?;
    minor
        .split(|character: char| !character.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// The command that installs it, where Debian's backports or a newer Debian are among the machine's
/// sources.
///
/// # Errors
/// Where they are not: nobody's sources are changed for them.
pub fn go_install() -> Result<Box<Command>> {
    let offered = DEBIAN_PACKAGES.iter().find(|package| {
        let policy = command::output(Command::new("apt-cache").args(["policy", package]));
        policy.is_some_and(|policy| {
            policy.contains("Candidate: ") && !policy.contains("Candidate: (none)")
        })
    });
    let Some(package) = offered else {
        bail!("this machine's package sources have no Go that is new enough");
    };
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive").args([
        "install",
        "--yes",
        "--no-remove",
        "--no-install-recommends",
        package,
    ]);
    Ok(Box::new(install))
}

/// How somebody gets a Go that is new enough. Debian 12's own is 1.19; the one in its backports,
/// 1.23, fetches a newer one by itself.
pub fn go_by_hand() -> String {
    format!(
        "on Debian 12: echo deb http://deb.debian.org/debian bookworm-backports main > /etc/apt/sources.list.d/backports.list \
         && apt-get update && apt-get install -t bookworm-backports golang-go\n    \
         elsewhere: Go 1.{GO_MINOR} or newer from https://go.dev/dl, unpacked to /usr/local/go"
    )
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::{
        SUMS, Sha256, is_listed, is_ours, linker_flags, minor, sources, unpack, unpack_to, version,
        version_in,
    };
    use sha2::Digest as _;

    /// A file in the format of zstd with these bytes, uncompressed (RFC 8878: a frame with a
    /// single segment, and one raw block that is the last).
    fn zstd(bytes: &[u8]) -> Vec<u8> {
        let length = u8::try_from(bytes.len()).unwrap();
        let header = u32::from(length) << 3 | 1;
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x20, length];
        [&frame[..], &header.to_le_bytes()[..3], bytes].concat()
    }

    #[test]
    fn a_copy_that_others_may_change_is_not_used() {
        let own = Some(1000);
        for (owner, mode) in [(1000, 0o644), (0, 0o555), (0, 0o600)] {
            is_ours(owner, mode, own).unwrap();
        }
        for (owner, mode) in [(1001, 0o644), (1000, 0o664), (0, 0o646), (65_534, 0o400)] {
            assert!(is_ours(owner, mode, own).is_err(), "{owner} {mode:o}");
        }
        assert!(is_ours(1000, 0o644, None).is_err());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("packed");
        fs::write(&path, zstd(b"")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        let refused = unpack(&path, &directory.path().join("program"), "v1").unwrap_err();
        assert!(format!("{refused:#}").contains("mode 666"), "{refused:#}");
    }

    #[test]
    fn a_copy_with_an_unknown_sum_is_never_executable() {
        let directory = tempfile::tempdir().unwrap();
        let [packed, program] = ["packed", "program"].map(|name| directory.path().join(name));
        let script = b"#!/bin/sh\ntouch ran\n";
        fs::write(&packed, zstd(script)).unwrap();
        let sum = unpack_to(File::open(&packed).unwrap(), &program).unwrap();
        assert_eq!(sum, oci_archive::hex(&Sha256::digest(script)));
        let refused = unpack(&packed, &program, &version().unwrap()).unwrap_err();
        assert!(format!("{refused:#}").contains(&sum), "{refused:#}");
        let mode = fs::metadata(&program).unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0, "{mode:o}");
    }

    #[test]
    fn sums_are_listed_as_sha256sum_prints_them() {
        let list = "# why\nabc  kubeall-v1-linux-amd64\nabd  kubeall-v1-linux-arm64\n";
        assert!(is_listed(list, "kubeall-v1-linux-amd64", "abc"));
        assert!(!is_listed(list, "kubeall-v1-linux-amd64", "abd"));
        assert!(!is_listed(list, "kubeall-v1-linux-amd64", ""));
        let kept = fs::read_to_string(sources().join(SUMS)).unwrap();
        let name = format!("kubeall-{}-linux-amd64", version().unwrap());
        assert!(kept.contains(&name), "{SUMS} is of another version");
    }

    #[test]
    fn the_version_is_the_one_that_is_required() {
        let module =
            "module m\n\nrequire (\n\tk8s.io/kubectl v0.34.4\n\tk8s.io/kubernetes v1.34.4\n)\n";
        assert_eq!(version_in(module), Some("v1.34.4"));
        assert_eq!(
            version_in("require k8s.io/kubernetes v1.35.0\n"),
            Some("v1.35.0")
        );
        assert_eq!(version_in("module m\n"), None);
        assert!(version().unwrap().starts_with("v1."));
    }

    #[test]
    fn a_version_of_go_is_read_as_go_prints_it() {
        assert_eq!(minor("go1.26.8"), Some(26));
        assert_eq!(minor("go1.24rc1"), Some(24));
        assert_eq!(minor("devel go1.27-abc"), None);
    }

    #[test]
    fn the_program_says_its_version() {
        let flags = linker_flags("v1.34.4");
        assert!(flags.contains("-X k8s.io/component-base/version.gitVersion=v1.34.4"));
        assert!(flags.contains("-X k8s.io/client-go/pkg/version.gitMinor=34"));
    }
}
