//! Kernels from Debian's archive, kept under `target/vm`. apt verifies them; its state and cache
//! for that are there as well, so that this machine's own apt is left as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{Kernel, Package};
use crate::{command, places};

/// Where the archive is if this machine's apt names no other place.
const ARCHIVE: &str = "http://deb.debian.org/debian";
/// The keys of Debian's archive, from the package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The kernel for virtual machines, which is smaller than the other one and as complete for what
/// the balancer needs.
const FLAVOUR: &str = "-cloud-amd64";
/// Written last, so that a directory without it is not complete: the package and its version.
const COMPLETE: &str = "package";

/// An unpacked kernel.
#[derive(Debug)]
pub struct Files {
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
    /// The package and its version.
    pub package: String,
    /// What QEMU boots.
    pub image: PathBuf,
    /// The directory of the kernel's modules.
    pub modules: PathBuf,
}

/// Where everything is kept.
///
/// # Errors
/// When the target directory can't be told.
pub fn cache() -> Result<PathBuf> {
    Ok(places::target()?.join("vm"))
}

/// The kernel's files, fetched from the archive if they are not there or if `refresh` says so.
///
/// # Errors
/// When apt fails, or the packages do not hold what is expected.
pub fn fetch(kernel: &Kernel, refresh: bool) -> Result<Files> {
    let directory = cache()?.join("kernels").join(&kernel.name);
    if refresh || !directory.join(COMPLETE).is_file() {
        eprintln!(
            "fetching the kernel {} from Debian's {}",
            kernel.name, kernel.suite
        );
        unpack(kernel, &directory)?;
    }
    files(&directory)
}

fn files(directory: &Path) -> Result<Files> {
    let package =
        fs::read_to_string(directory.join(COMPLETE)).context("cannot read what was unpacked")?;
    let root = directory.join("root");
    let modules = modules(&root)?;
    let release = modules
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    // Since Linux 7.3 it is beside the modules.
    let images = [
        root.join("boot").join(format!("vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ];
    let image = images.into_iter().find(|path| path.is_file());
    Ok(Files {
        image: image.with_context(|| format!("no kernel {release} is in {}", root.display()))?,
        modules,
        release,
        package: package.trim().to_owned(),
    })
}

/// The directory of the modules, which is named after the kernel: the only one there.
fn modules(root: &Path) -> Result<PathBuf> {
    let parents = ["lib/modules", "usr/lib/modules"].map(|parent| root.join(parent));
    let entries = parents
        .iter()
        .filter_map(|parent| fs::read_dir(parent).ok());
    let found: Vec<_> = entries
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    match &found[..] {
        [modules] => Ok(modules.clone()),
        _ => bail!(
            "{} holds the modules of {} kernels instead of one",
            root.display(),
            found.len()
        ),
    }
}

fn unpack(kernel: &Kernel, directory: &Path) -> Result<()> {
    let apt = Apt::update(kernel.suite)?;
    let package = match &kernel.package {
        Package::Latest => format!("linux-image{FLAVOUR}"),
        Package::Version(version) => apt.newest(version)?,
    };
    let packages = apt.parts(&package)?;
    remove(directory)?;
    let root = directory.join("root");
    let archives = directory.join("archives");
    fs::create_dir_all(&archives).with_context(|| format!("cannot make {}", archives.display()))?;
    let mut download = apt.command("apt-get");
    command::run(
        download
            .arg("download")
            .args(&packages)
            .current_dir(&archives),
    )?;
    for entry in fs::read_dir(&archives)?.flatten() {
        let mut extract = Command::new("dpkg-deb");
        command::run(extract.arg("--extract").arg(entry.path()).arg(&root))?;
    }
    let version = apt.version(&package)?;
    remove(&archives)?;
    fs::write(directory.join(COMPLETE), format!("{package} {version}\n"))
        .context("cannot write down what was unpacked")
}

fn remove(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    Ok(())
}

/// apt with a state of its own that knows one suite.
struct Apt {
    configuration: PathBuf,
}

impl Apt {
    fn update(suite: &str) -> Result<Self> {
        let directory = cache()?.join("apt").join(suite);
        for part in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let at = |name: &str| directory.join(name);
        fs::write(at("status"), "")?;
        let sources = format!(
            "deb [arch=amd64 signed-by={KEYRING}] {} {suite} main\n",
            archive()
        );
        fs::write(at("sources.list"), sources)?;
        let configuration = at("apt.conf");
        fs::write(&configuration, settings(&directory))?;
        let apt = Self { configuration };
        command::run(apt.command("apt-get").args(["--quiet", "update"])).with_context(|| {
            format!(
                "cannot read what Debian's {suite} holds (in {})",
                directory.display()
            )
        })?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.configuration);
        command
    }

    fn cache(&self, arguments: &[&str]) -> Result<String> {
        let mut query = self.command("apt-cache");
        query.args(arguments);
        command::output(&mut query).with_context(|| format!("`{}` failed", command::line(&query)))
    }

    /// The newest kernel package of a version: `linux-image-7.0.13+deb13-cloud-amd64`.
    fn newest(&self, version: &str) -> Result<String> {
        let names = self.cache(&["pkgnames", &format!("linux-image-{version}.")])?;
        names
            .lines()
            .filter(|name| name.ends_with(FLAVOUR))
            .max_by_key(|name| numbers(name))
            .map(str::to_owned)
            .with_context(|| format!("no kernel {version} is there"))
    }

    /// The package with those that hold parts of the kernel: its image and its modules may be in
    /// packages of their own.
    fn parts(&self, package: &str) -> Result<Vec<String>> {
        let closure = self.cache(&[
            "depends",
            "--recurse",
            "--important",
            "--no-pre-depends",
            package,
        ])?;
        let mut parts: Vec<_> = closure
            .lines()
            .filter(|line| line.starts_with("linux-") && line.ends_with(FLAVOUR))
            .map(str::to_owned)
            .collect();
        parts.sort();
        parts.dedup();
        Ok(parts)
    }

    fn version(&self, package: &str) -> Result<String> {
        let shown = self.cache(&["show", "--no-all-versions", package])?;
        shown
            .lines()
            .find_map(|line| line.strip_prefix("Version: "))
            .map(str::to_owned)
            .with_context(|| format!("{package} has no version"))
    }
}

/// Nothing of this machine's apt but its proxies. The indexes of translations and of what is in
/// packages are left out: they are large.
fn settings(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "Dir::Etc::SourceList \"{directory}/sources.list\";\n\
         Dir::Etc::SourceParts \"/dev/null\";\n\
         Dir::Etc::Preferences \"/dev/null\";\n\
         Dir::Etc::PreferencesParts \"/dev/null\";\n\
         Dir::State \"{directory}/state\";\n\
         Dir::State::Status \"{directory}/status\";\n\
         Dir::Cache \"{directory}/cache\";\n\
         APT::Sandbox::User \"root\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled \"false\";\n\
         Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled \"false\";\n"
    )
}

/// The archive that this machine's apt uses, so that a mirror is used here as well.
fn archive() -> String {
    let mut query = Command::new("apt-get");
    query.args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
    ]);
    let used = command::output(&mut query).unwrap_or_default();
    let archive = used
        .lines()
        .find(|line| line.trim_end_matches('/').ends_with("/debian"));
    archive.unwrap_or(ARCHIVE).to_owned()
}

/// The numbers in a name, to compare versions with.
fn numbers(name: &str) -> Vec<u32> {
    name.split(|character: char| !character.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn versions_are_compared_as_numbers() {
        let newer = numbers("linux-image-7.0.13+deb13-cloud-amd64");
        assert!(newer > numbers("linux-image-7.0.9+deb13-cloud-amd64"));
    }
}
