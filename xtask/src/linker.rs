//! bpf-linker: which one is trusted to link the kernel half, and how to get it.
//!
//! It reads the compiler's LLVM bitcode, so its LLVM must be at least as new as the compiler's, and
//! its version decides what the object looks like. Its `--version` does not tell the LLVM, but
//! cargo's record of what it installed does: only a bpf-linker that this record shows to be the
//! wanted version with the wanted LLVM is taken.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, places};

/// The version that the kernel half is built with.
const VERSION: &str = "0.13.0";
/// The LLVM that it is built against: the newest in Debian 12. Newer compilers' bitcode can't be
/// read.
pub const LLVM: u32 = 22;

/// Where Debian's packages put that LLVM.
pub fn llvm_prefix() -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{LLVM}"))
}

/// The trusted bpf-linker, if one is installed: this workspace's own, else the one in cargo's home.
pub fn find() -> Option<PathBuf> {
    [places::tools().ok(), places::cargo_home()]
        .into_iter()
        .flatten()
        .find_map(|root| installed_in(&root))
}

/// The command that installs this workspace's own bpf-linker.
///
/// # Errors
/// When the target directory can't be told.
pub fn install() -> Result<Command> {
    let mut install = Command::new(places::cargo());
    install.env("LLVM_PREFIX", llvm_prefix());
    install.args([
        "install",
        "bpf-linker",
        "--locked",
        "--force",
        "--no-default-features",
        "--version",
        VERSION,
    ]);
    install
        .args(["--features", &format!("llvm-{LLVM}"), "--root"])
        .arg(places::tools()?);
    Ok(install)
}

/// What somebody types where it can't be installed for them.
pub fn install_by_hand() -> String {
    format!(
        "LLVM_PREFIX=/usr/lib/llvm-{LLVM} cargo install bpf-linker --locked --version {VERSION} --no-default-features --features llvm-{LLVM}"
    )
}

fn installed_in(root: &Path) -> Option<PathBuf> {
    let record = std::fs::read_to_string(root.join(".crates2.json")).ok()?;
    let program = root.join("bin/bpf-linker");
    let wanted = is_wanted(&record).unwrap_or(false)
        && version_of(&program)? == format!("bpf-linker {VERSION}");
    wanted.then_some(program)
}

fn version_of(program: &Path) -> Option<String> {
    Some(
        command::output(Command::new(program).arg("--version"))?
            .trim()
            .to_owned(),
    )
}

/// Whether cargo's record (`.crates2.json`) says that the wanted bpf-linker was installed.
fn is_wanted(record: &str) -> Result<bool> {
    let record: serde_json::Value =
        serde_json::from_str(record).context("cargo's record of installed programs is not JSON")?;
    let wanted_package = format!("bpf-linker {VERSION} ");
    let wanted_llvm = format!("llvm-{LLVM}");
    let installs = record["installs"].as_object();
    Ok(installs.into_iter().flatten().any(|(package, details)| {
        let features = details["features"].as_array();
        package.starts_with(&wanted_package)
            && features
                .into_iter()
                .flatten()
                .any(|feature| feature == wanted_llvm.as_str())
    }))
}

#[cfg(test)]
mod tests {
    use super::is_wanted;

    fn record(package: &str, features: &str) -> String {
        format!(
            r#"{{"installs":{{"{package} (registry+https://example.org)":{{"bins":["bpf-linker"],"features":{features}}}}}}}"#
        )
    }

    #[test]
    fn only_the_wanted_version_and_llvm_are_trusted() {
        let cases = [
            ("bpf-linker 0.13.0", r#"["llvm-22"]"#, true),
            ("bpf-linker 0.13.0", r#"["llvm-21"]"#, false),
            ("bpf-linker 0.13.0", r#"["default","llvm-23"]"#, false),
            ("bpf-linker 0.13.01", r#"["llvm-22"]"#, false),
            ("bpf-linker 0.12.0", r#"["llvm-22"]"#, false),
            ("other-linker 0.13.0", r#"["llvm-22"]"#, false),
        ];
        for (package, features, wanted) in cases {
            assert_eq!(
                is_wanted(&record(package, features)).unwrap(),
                wanted,
                "{package} {features}"
            );
        }
    }

    #[test]
    fn a_record_that_is_not_json_trusts_nothing() {
        assert!(is_wanted("").is_err());
        assert!(!is_wanted("{}").unwrap());
    }
}
